"""Callbacks that judge epochs, and are to judge only those of a quantized model that learns."""

from __future__ import annotations

from typing import Any, TypeVar

import lightning as L

from lfq_lightning.checking import in_words
from lfq_lightning.phases import model_phase
from lfq_lightning.training.trainer.neighbours import change_of_import

SomeCallback = TypeVar("SomeCallback", bound=L.Callback)


class _OnlyWhileLearning:
    """One hook of a callback, called while the model's quantizers learn or are frozen."""

    def __init__(self, callback: L.Callback, hook: str) -> None:
        self.callback, self.hook = callback, hook

    def __call__(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        if model_phase(pl_module) in ("learn", "freeze"):
            getattr(type(self.callback), self.hook)(self.callback, trainer, pl_module, *args, **kwargs)


def while_learning(callback: SomeCallback) -> SomeCallback:
    """Let a callback see only what comes out of a quantized model that learns, so that "best" is the best of those.

    An epoch in float, before quantization, is often better than all that follow, and of no use.

    Args:
        callback: a ModelCheckpoint or EarlyStopping, for instance.

    Returns:
        The same callback: its hooks at the end of training batches, training epochs and validation wait for phase
        "learn" or "freeze".

    Example:
        >>> import lfq_lightning as lfq
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> best = lfq.while_learning(ModelCheckpoint(monitor="val_loss"))
    """
    if not isinstance(callback, L.Callback):
        raise TypeError(
            f"`callback` must be a Lightning callback, for instance a ModelCheckpoint. Found {in_words(callback)}: "
            f"{change_of_import(callback) or 'pass what goes into the callbacks of a Trainer'}."
        )
    if any(kind.__module__.startswith("lfq_lightning.") for kind in type(callback).__mro__):
        raise TypeError(
            "`callback` must judge epochs, as a ModelCheckpoint or EarlyStopping does. Found "
            f"{type(callback).__name__}, which goes by the phases itself: pass it to the Trainer as it is."
        )
    for hook in ("on_train_batch_end", "on_train_epoch_end", "on_validation_end"):
        setattr(callback, hook, _OnlyWhileLearning(callback, hook))
    return callback
