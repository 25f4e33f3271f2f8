"""Where a technique stands among the Trainer's callbacks: after the one whose quantizers it works on."""

from __future__ import annotations

import lightning as L

from lfq_lightning.callback import QuantizationAwareTraining
from lfq_lightning.placement.quantized_layer import first_quantizer
from lfq_lightning.training.trainer.neighbours import check_package


def quantization_callback(trainer: L.Trainer) -> QuantizationAwareTraining | None:
    """The Trainer's QuantizationAwareTraining, or None where a user places and switches quantizers by hand."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, QuantizationAwareTraining)), None)


def epochs_before(trainer: L.Trainer) -> int:
    """How many epochs the Trainer had counted when the model's own count began: it goes on through all its fits."""
    quantization = quantization_callback(trainer)
    return 0 if quantization is None else quantization.since[0]


def check_quantized(own: L.Callback, model: L.LightningModule) -> None:
    """Raise ValueError if there is nothing that a technique could work on, when a fit begins."""
    if first_quantizer(model) is None:
        name = type(own).__name__
        raise ValueError(
            f"{name} works on a quantized model. Found {type(model).__name__} in float: use "
            f"`callbacks=[QuantizationAwareTraining(...), {name}(...)]`, or call `lfq_lightning.attach` first."
        )


def check_order(trainer: L.Trainer, own: L.Callback) -> None:
    """Raise ValueError if a technique stands before QuantizationAwareTraining, whose phases it follows.

    Raises:
        TypeError: if the Trainer is that of `pytorch_lightning`.
    """
    check_package(trainer, own)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    quantization = quantization_callback(trainer)
    if quantization is not None and callbacks.index(own) < callbacks.index(quantization):
        name = type(own).__name__
        raise ValueError(
            f"{name} follows the phases and scales of a batch, and must be called after they are set. Found it before "
            f"QuantizationAwareTraining: use the order `callbacks=[QuantizationAwareTraining(...), {name}(...)]`."
        )
