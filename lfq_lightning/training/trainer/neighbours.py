"""What else a Trainer was given: which callbacks and plugins cannot share a run, and what the others must meet."""

from __future__ import annotations

from functools import partial

import lightning as L
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelSummary, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, TransformerEnginePrecision
from torch import nn

from lfq_lightning.placement.quantized_layer import qparams, quantizers
from lfq_lightning.private import averaged_model
from lfq_lightning.training.hiding import hidden_qparams, hidden_quantizers
from lfq_lightning.training.trainer.strategy import check_strategy
from lfq_lightning.training.wrapping import Wrappers

_OTHER = "pytorch_lightning"  # of the two packages that Lightning is published as, with classes of equal names
_AVERAGING = (WeightAveraging, StochasticWeightAveraging)


def check_neighbours(trainer: L.Trainer, own: L.Callback) -> None:
    """Refuse what cannot work.

    Raises:
        TypeError: if the Trainer is that of `pytorch_lightning`.
        ValueError: if a callback that copies the model stands before ours, the precision plugin swaps layers, or the
            strategy takes them apart.
    """
    check_package(trainer, own)
    check_strategy(trainer)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    ours = sum(isinstance(callback, type(own)) for callback in callbacks)
    if ours > 1:
        raise ValueError(
            f"A model is quantized by one {type(own).__name__}. Found {ours} among the Trainer's callbacks: leave one, "
            "and say what differs between layers by its `rules`."
        )
    for callback in callbacks[: callbacks.index(own)]:
        if isinstance(callback, _AVERAGING):
            name = type(callback).__name__
            raise ValueError(
                f"{name} copies the model when a fit begins, and must copy the quantizers too. Found it before "
                f"QuantizationAwareTraining: use the order `callbacks=[QuantizationAwareTraining(...), {name}(...)]`."
            )
    plugin = trainer.precision_plugin
    if isinstance(plugin, (BitsandbytesPrecision, TransformerEnginePrecision)):
        raise ValueError(
            f"{type(plugin).__name__} replaces Linear layers by ones that quantize by themselves. Found it together "
            'with QuantizationAwareTraining: choose one, for instance `precision="bf16-mixed"`.'
        )


def arrange(wrappers: Wrappers, trainer: L.Trainer, model: L.LightningModule) -> None:
    """Keep qparams out of what finetuning callbacks freeze and adopt, and quantizers out of pictures of the model."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning):
            wrappers.within(callback, "finetune_function", partial(hidden_qparams, model))
        if isinstance(callback, ModelSummary):
            wrappers.within(callback, "on_fit_start", partial(hidden_quantizers, model))
    for logger in trainer.loggers:
        wrappers.within(logger, "log_graph", partial(hidden_quantizers, model))


def require_gradients(model: nn.Module) -> None:
    """Undo what froze qparams along with their layer: DDP must know them from the start, and the layer decides."""
    for parameter in qparams(model):
        parameter.requires_grad_(True)


def share_with_averages(trainer: L.Trainer, model: nn.Module) -> None:
    """Give copies that other callbacks average the quantizers' present state: estimates are no weights to average."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = averaged_model(callback) if isinstance(callback, _AVERAGING) else None
        if average is not None:
            copies = quantizers(getattr(average, "module", average))
            for name, quantizer in quantizers(model).items():
                copies[name].load_state_dict(quantizer.state_dict())


def change_of_import(value: object) -> str:
    """The line to change where an object comes from the other package, or nothing."""
    if not any(kind.__module__.partition(".")[0] == _OTHER for kind in type(value).__mro__):
        return ""
    return f"write `import lightning.pytorch as pl` in place of `import {_OTHER} as pl`, everywhere in the program"


def check_package(trainer: L.Trainer, own: L.Callback) -> None:
    """Refuse what is of the other package, which would pass by every check of strategies, callbacks and modules.

    Raises:
        TypeError: unless the Trainer is one of `lightning`, and all that it was given.
    """
    if not isinstance(trainer, Trainer):
        _refuse(trainer, own)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for part in (*callbacks, *trainer.loggers, trainer.strategy, trainer.precision_plugin):
        if change_of_import(part):
            _refuse(part, own)


def _refuse(found: object, own: L.Callback) -> None:
    kind = type(found)
    raise TypeError(
        f"{type(own).__name__} needs a Trainer of the package `lightning`, with callbacks, loggers and plugins of it. "
        f"Found {kind.__module__}.{kind.__qualname__}: {change_of_import(found) or 'use `lightning.Trainer`'}."
    )
