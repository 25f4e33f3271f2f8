"""The trained model as an ONNX file when a fit ends."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils._pytree import tree_map_only

from lfq_lightning.checkpoint import load_state_dict
from lfq_lightning.export import export_onnx
from lfq_lightning.export.parity import Parity


def export_fit(trainer: L.Trainer, model: L.LightningModule, path: str | Path, batch: Any) -> Parity:
    """Export the best checkpoint, the last, or the model as it is where there are none; the model is not changed.

    Args:
        trainer: whose checkpoints and directory are used; a relative path is taken from its log directory.
        model: the trained module.
        path: the file to write.
        batch: a batch of training data; `example_input_array` is used instead where the module has one.
    """
    exported = copy.deepcopy(model).cpu().eval()
    saved = _checkpoint(trainer)
    if saved is not None:
        load_state_dict(exported, torch.load(saved, map_location="cpu", weights_only=True))
    inputs: Any = model.example_input_array
    if inputs is None:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    inputs = tree_map_only(torch.Tensor, lambda x: x.detach().cpu(), inputs)
    where = Path(trainer.log_dir or trainer.default_root_dir, path)
    parity = export_onnx(exported, inputs, where)
    rank_zero_info(f"Exported {saved or 'the model'} to {where}.\n{parity}")
    return parity


def _checkpoint(trainer: L.Trainer) -> Path | None:
    callback = trainer.checkpoint_callback
    names = (getattr(callback, name, "") for name in ("best_model_path", "last_model_path"))
    return next((Path(name) for name in names if name and Path(name).is_file()), None)
