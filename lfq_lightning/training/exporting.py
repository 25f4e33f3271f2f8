"""The export of one fit to a file: what stands in its way, the batch that is kept, and the file at its end."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lfq_lightning.checking import check_path
from lfq_lightning.checkpoint import load_state_dict
from lfq_lightning.export import export_onnx, export_pt2
from lfq_lightning.export.exportable import check_exportable
from lfq_lightning.export.inputs import arguments, on_cpu, traced
from lfq_lightning.export.parity import Parity
from lfq_lightning.export.pt2_passes import FORMS
from lfq_lightning.export.to_onnx import require_onnx
from lfq_lightning.placement import to_float
from lfq_lightning.placement.quantized_layer import quantizers
from lfq_lightning.private import tree_leaves
from lfq_lightning.running import example_of, inputs_of
from lfq_lightning.telling import tell
from lfq_lightning.training.trainer.length import is_dev_run

Export = str | Path | Mapping[str, Any] | None

_SETTINGS = (
    "dynamic_axes",
    "opset",
    "tolerance",
    "output_tolerance",
    "optimized_tolerance",
    "distance",
    "on_mismatch",
    "external_data",
    "optimize_for",
)


_OF_PROGRAMS = ("dynamic_shapes", "fold", "signed", "target")


def check_export(export: Export, target: str | Sequence[str] | None) -> None:
    """Raise unless this is a file to write, or a mapping with one and with arguments of what writes it."""
    if not isinstance(export, Mapping):
        check_path("export", export, needed=False)
    path = export.get("path") if isinstance(export, Mapping) else export
    known = _OF_PROGRAMS if _is_program(path) else _SETTINGS
    unknown = [name for name in export if name not in ("path", *known)] if isinstance(export, Mapping) else []
    if isinstance(export, Mapping) and (path is None or unknown):
        raise ValueError(
            f"`export` must hold `path`, and may hold {', '.join(known)}. Found {', '.join(map(str, export))}: "
            f"give the path, or call `lfq_lightning.{_writer(path)}` by hand after the fit."
        )
    if isinstance(export, Mapping):
        check_path("export", path)
    named = isinstance(export, Mapping) and "target" in export
    if _is_program(path) and not named and len(_forms(target)) > 1:
        raise ValueError(
            f"A program is written for one runtime. Found `target` {target!r}, of which {' and '.join(_forms(target))} "
            f'take programs: name one, as in export={{"path": {str(path)!r}, "target": {_forms(target)[0]!r}}}.'
        )


def _is_program(path: Any) -> bool:
    return isinstance(path, (str, Path)) and Path(path).suffix == ".pt2"


def _writer(path: Any) -> str:
    return "export_pt2" if _is_program(path) else "export_onnx"


def _forms(target: str | Sequence[str] | None) -> list[str]:
    """Those of the runtimes that take programs."""
    named = [target] if isinstance(target, str) else list(target or ())
    return [name for name in named if name in FORMS]


class FitExport:
    """Exports a fit's model to a file, or does nothing without one.

    Args:
        export: the file to write, or a mapping with `path` and arguments of `export_onnx`, or of `export_pt2` where the
            path ends in `.pt2`; a relative path is taken from the Trainer's log directory.
        target: what the model is quantized for, or None; with one, files are optimized for speed, and programs
            arranged for it.
    """

    def __init__(self, export: Export, target: str | Sequence[str] | None = None) -> None:
        settings = dict(export) if isinstance(export, Mapping) else {"path": export}
        if _is_program(settings["path"]):
            settings.setdefault("target", (*_forms(target), None)[0])
        elif target is not None:
            settings.setdefault("optimize_for", "speed")
        self.path: str | Path | None = settings.pop("path")
        self._settings = settings
        self._last_batch: Any = None

    def begin(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Refuse a fit whose model could not be exported."""
        if self.path is not None:
            check_fit(trainer, model, self.path)

    def see(self, model: L.LightningModule, batch: Any) -> None:
        """Refuse, at the first batch, a model that cannot be traced; keep the batch."""
        if self.path is not None:
            if self._last_batch is None:
                check_batch(model, batch)
            self._last_batch = batch

    def end(self, trainer: L.Trainer, model: L.LightningModule) -> Parity | None:
        """Write the file on rank zero; every rank calls this. What fails is told, for the fit has ended well."""
        if self.path is None or is_dev_run(trainer):
            return None
        settings = dict(self._settings) if _is_program(self.path) else {"on_mismatch": "warn", **self._settings}
        try:
            return export_fit(trainer, model, self.path, self._last_batch, settings)
        except Exception as error:  # of any kind: the exporter's, the runtime's, the disk's
            if settings.get("on_mismatch") == "raise":
                raise
            rank_zero_warn(
                f"The fit has ended, and its export failed: {type(error).__name__}: {error} The checkpoints are whole: "
                f"call `lfq_lightning.{_writer(self.path)}` on `lfq_lightning.load_from_checkpoint(...)`."
            )
            return None


def check_fit(trainer: L.Trainer, model: L.LightningModule, path: str | Path) -> None:
    """Refuse, before training, a fit whose model could not be exported when it ends.

    Raises:
        ImportError: if onnx, onnxscript or onnxruntime is missing.
        ValueError: for settings that integer formats do not hold, a module without `forward`, sharded weights, or
            hyper-parameters that no checkpoint gives back safely, or a file that cannot be written.
    """
    if not _is_program(path):
        require_onnx()
    _check_writable(trainer, _target(trainer, path))
    check_exportable(model)
    if type(model).forward is L.LightningModule.forward:
        raise ValueError(
            f"`export` writes what `forward` computes. {type(model).__name__} has none: define it, and call "
            "`self(...)` in `training_step`."
        )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise ValueError(
            "`export` needs whole weights on one rank. Found ModelParallelStrategy, which shards them: leave `export` "
            f"out, and call `lfq_lightning.{_writer(path)}` on `lfq_lightning.load_from_checkpoint(...)` afterwards."
        )
    data = getattr(trainer, "datamodule", None)
    saved = {**getattr(data, "hparams", {}), **model.hparams}
    unreadable = [name for name, value in saved.items() if not _reads(value)]
    if unreadable and trainer.checkpoint_callback is not None:
        raise ValueError(
            "`export` reads the best checkpoint when the fit ends, and runs nothing that a file names. Found the "
            f"hyper-parameters {', '.join(unreadable)}, whose classes must be run to be read: keep them out with "
            "`self.save_hyperparameters(ignore=[...])`."
        )


def _target(trainer: L.Trainer, path: str | Path) -> Path:
    return Path(trainer.log_dir or trainer.default_root_dir, path)  # the first is a broadcast: every rank asks


def _check_writable(trainer: L.Trainer, where: Path) -> None:
    if not trainer.is_global_zero:
        return
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=where.parent):
            found = "a directory" if where.is_dir() else ""
    except OSError as error:
        found = str(error)
    if found:
        raise ValueError(f"`export` must name a file that can be written. Found `{where}` ({found}): choose another.")


def check_batch(model: L.LightningModule, batch: Any) -> None:
    """Refuse, before the first step, a model that `torch.export` cannot trace.

    Raises:
        ValueError: with torch's reason; or if the module cannot be copied.
    """
    plain = _copy(model)
    to_float(plain)
    traced(plain, *arguments(plain, _inputs(model, batch)))


def export_fit(
    trainer: L.Trainer, model: L.LightningModule, path: str | Path, batch: Any, settings: Mapping[str, Any]
) -> Parity | None:
    """Export the best checkpoint, the last, or the model as it is where neither has quantizers that were set.

    The model is not changed. Every rank calls this, and rank zero alone exports: None on the others.

    Args:
        trainer: whose checkpoints and directory are used; a relative path is taken from its log directory.
        model: the trained module.
        path: the file to write.
        batch: a batch of training data; `example_input_array` is used instead where the module has one.
        settings: further arguments of what writes the file.
    """
    where = _target(trainer, path)
    if not trainer.is_global_zero:
        return None
    for saved in (*_checkpoints(trainer), None):
        exported = _copy(model)
        if saved is not None:
            with saved.open("rb") as file:
                load_state_dict(exported, _read(file))
        if saved is None or all(
            quantizer.estimated or quantizer.learned or quantizer.late for quantizer in quantizers(exported).values()
        ):
            break
        rank_zero_warn(f"{saved} is from before quantization and is not exported: see `lfq_lightning.while_learning`.")
    told = f"Exported {saved or 'the model'} to {where}."
    if _is_program(path):
        where.parent.mkdir(parents=True, exist_ok=True)
        export_pt2(exported, _inputs(model, batch), where, **settings)
        tell(trainer, told)
        return None
    parity = export_onnx(exported, _inputs(model, batch), where, **settings)
    tell(trainer, f"{told}\n{parity}")
    return parity


def _copy(model: L.LightningModule) -> L.LightningModule:
    """A copy on the CPU, for evaluation, without what a module keeps that cannot be copied, such as a lock."""
    try:
        copied = copy.deepcopy(model)
    except Exception:
        kept = [leaf for module in model.modules() for leaf in tree_leaves(module.__getstate__())]
        kept = [leaf for leaf in kept if not isinstance(leaf, nn.Module) and not _copies(leaf)]
        try:
            copied = copy.deepcopy(model, {id(leaf): _stand_in(leaf) for leaf in kept})
        except Exception as error:
            raise ValueError(
                f"`export` writes a copy of the module. Found a {type(model).__name__} that cannot be copied "
                f"({error}): leave out what it holds, or leave `export` out."
            ) from error
    return copied.cpu().eval()


def _copies(value: Any) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:
        return False
    return True


def _stand_in(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else _LeftOut()  # a loss that is kept with its graph


class _LeftOut(dict[Any, Any]):
    """Stands for an object whose class is neither imported nor called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


def _read(file: IO[bytes]) -> Any:
    """Plain values and tensors of a checkpoint; what a user's own classes made of hyper-parameters is left out."""
    file.seek(0)
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    file.seek(0)
    with torch.serialization.safe_globals([(_LeftOut, name) for name in unknown]):
        return torch.load(file, map_location="cpu", weights_only=True)


def _reads(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
    except Exception:
        return True  # Lightning leaves it out of checkpoints, and says so
    try:
        _read(file)
    except pickle.UnpicklingError:
        return False
    return True


def _inputs(model: L.LightningModule, batch: Any) -> Any:
    """What `forward` is traced with: the module's example, or the inputs in a batch."""
    example: Any = model.example_input_array
    args, kwargs = inputs_of(model, batch) if example is None else example_of(model, example)
    return on_cpu(kwargs or args)


def _checkpoints(trainer: L.Trainer) -> list[Path]:
    callback = trainer.checkpoint_callback
    names = (getattr(callback, name, "") for name in ("best_model_path", "last_model_path"))
    return [Path(name) for name in names if name and Path(name).is_file()]
