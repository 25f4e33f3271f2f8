"""The trained model as an ONNX file when a fit ends, and what stands in its way before the fit begins."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils._pytree import tree_map_only

from lfq_lightning.checkpoint import load_state_dict
from lfq_lightning.export import export_onnx
from lfq_lightning.export.exportable import check_exportable
from lfq_lightning.export.inputs import arguments, traced
from lfq_lightning.export.parity import Parity
from lfq_lightning.export.to_onnx import require_onnx
from lfq_lightning.placement import detach
from lfq_lightning.placement.host import quantizers


def check_fit(trainer: L.Trainer, model: L.LightningModule) -> None:
    """Refuse, before training, a fit whose model could not be exported when it ends.

    Raises:
        ImportError: if onnx, onnxscript or onnxruntime is missing.
        ValueError: for settings that integer formats do not hold, a module without `forward`, or sharded weights.
    """
    require_onnx()
    check_exportable(model)
    if type(model).forward is L.LightningModule.forward:
        raise ValueError(
            f"`export` writes what `forward` computes. {type(model).__name__} has none: define it, and call "
            "`self(...)` in `training_step`."
        )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise ValueError(
            "`export` needs whole weights on one rank. Found ModelParallelStrategy, which shards them: leave `export` "
            "out, and call `lfq_lightning.export_onnx` on `lfq_lightning.load_from_checkpoint(...)` afterwards."
        )


def check_batch(model: L.LightningModule, batch: Any) -> None:
    """Refuse, before the first step, a model that `torch.export` cannot trace.

    Raises:
        ValueError: with torch's reason.
    """
    plain = copy.deepcopy(model).cpu().eval()
    detach(plain)
    traced(plain, *arguments(_inputs(model, batch)))


def export_fit(trainer: L.Trainer, model: L.LightningModule, path: str | Path, batch: Any) -> Parity:
    """Export the best checkpoint, the last, or the model as it is where neither has quantizers that were set.

    The model is not changed.

    Args:
        trainer: whose checkpoints and directory are used; a relative path is taken from its log directory.
        model: the trained module.
        path: the file to write.
        batch: a batch of training data; `example_input_array` is used instead where the module has one.
    """
    for saved in (*_checkpoints(trainer), None):
        exported = copy.deepcopy(model).cpu().eval()
        if saved is not None:
            load_state_dict(exported, torch.load(saved, map_location="cpu", weights_only=True))
        if saved is None or all(
            quantizer.estimated or quantizer.learned for quantizer in quantizers(exported).values()
        ):
            break
        rank_zero_warn(f"{saved} is from before quantization and is not exported: see `lfq_lightning.while_learning`.")
    where = Path(trainer.log_dir or trainer.default_root_dir, path)
    parity = export_onnx(exported, _inputs(model, batch), where)
    rank_zero_info(f"Exported {saved or 'the model'} to {where}.\n{parity}")
    return parity


def _inputs(model: L.LightningModule, batch: Any) -> Any:
    """What `forward` is traced with: the module's example, or of a batch the first entry, or the whole mapping."""
    inputs: Any = model.example_input_array
    if inputs is None:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return tree_map_only(torch.Tensor, lambda x: x.detach().cpu(), inputs)


def _checkpoints(trainer: L.Trainer) -> list[Path]:
    callback = trainer.checkpoint_callback
    names = (getattr(callback, name, "") for name in ("best_model_path", "last_model_path"))
    return [Path(name) for name in names if name and Path(name).is_file()]
