"""Gradual bit reduction: a run that begins with more bits than it ends with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lfq_lightning.checking import check_whole, in_words
from lfq_lightning.observers import Observer
from lfq_lightning.phases import forget_compiled_code
from lfq_lightning.placement.points import points
from lfq_lightning.placement.quantized_layer import quantizers
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.techniques.order import check_order, check_quantized, epochs_before, quantization_callback
from lfq_lightning.telling import tell
from lfq_lightning.training.trainer.neighbours import share_with_averages


def widened(quantizer: LearnableFakeQuantize, bits: int) -> tuple[int, int]:
    """The range of codes of a quantizer at a stage of this many bits, but never fewer than its specification says.

    Full ranges stay full, narrow ones (-7 to 7) narrow, and unsigned ones unsigned.
    """
    spec = quantizer.spec
    if spec is None:
        return quantizer.code_range
    low, high = spec.code_range(signed=quantizer.quant_min < 0)
    times = 2 ** max(bits - spec.bits, 0)
    highest = (high + 1) * times - 1
    return -highest if low == -high else low * times, highest


def carried_over(
    scale: Tensor, zero_point: Tensor, old: tuple[int, int], new: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Scale and zero point that keep the clipping range when the range of codes changes.

    With old range (n, p) and new range (n', p'): s' = s (p - n) / (p' - n'), and z' = n' - (n - z) s / s', so that
    s' (n' - z') = s (n - z) and s' (p' - z') = s (p - z). A zero point of a symmetric quantizer stays where it is.

    Args:
        scale: of shape (channels,).
        zero_point: of shape (channels,), in integer steps.
        old: smallest and largest code so far.
        new: smallest and largest code from now on.

    Returns:
        The new scale and zero point, of the same shapes.

    Example:
        >>> import torch
        >>> carried_over(torch.tensor([0.01]), torch.tensor([51.0]), (0, 255), (0, 3))[1]
        tensor([0.6000])
    """
    ratio = (old[1] - old[0]) / (new[1] - new[0])
    return scale * ratio, new[0] - (old[0] - zero_point) / ratio


@torch.no_grad()
def change_range(quantizer: LearnableFakeQuantize, new: tuple[int, int], weight: Tensor | None = None) -> None:
    """Give a quantizer and its observer another range of codes, in place.

    Its qparams are estimated anew for these codes, from the weight as it is now or from what was observed of the input;
    without either, the clipping range is kept. `scale_reference`, in whose units the scale learns, follows.

    Args:
        quantizer: any fake quantizer.
        new: the smallest and the largest code.
        weight: what the quantizer is for, if it is a weight.
    """
    scale, zero_point = carried_over(quantizer.scale, quantizer.zero_point, quantizer.code_range, new)
    quantizer.scale_reference.mul_(scale / quantizer.scale)
    quantizer.scale.copy_(scale)
    if not quantizer.symmetric:
        quantizer.zero_point.copy_(zero_point)
    quantizer.quant_min, quantizer.quant_max = new
    if isinstance(quantizer.observer, Observer):
        quantizer.observer.quant_min, quantizer.observer.quant_max = new
        if quantizer.estimated and (weight is not None or quantizer.saw_data()):
            if weight is not None:
                quantizer.estimate_from(weight)
            else:
                quantizer.estimate(sign=False)
            quantizer.scale_reference.copy_(quantizer.scale)
    quantizer.project_()


def _whole(value: object) -> int:
    if isinstance(value, str) and value.isdecimal():  # a key in YAML may be a text
        return int(value)
    check_whole("bits", value)
    assert isinstance(value, int)
    return value


class BitAnnealing(L.Callback):
    """Lowers the bits of every quantizer in stages, each of which starts from what the one before has learned.

    `QuantizationAwareTraining` is given the bits that the run ends with: checkpoints say these, and no quantizer ever
    has fewer. A first or last layer at 8 bits stays there. When a stage begins, weights take their scale from the
    weights as they are, and inputs from what was observed of them; the optimizer of qparams forgets its momentum. To
    keep the clipping range instead, which suits many bits and not few, lost 8 to 11 points on the digits at 2 bits. A
    stage is a pure function of the epoch, and the range of codes is in each quantizer's state, so a resumed run equals
    the uninterrupted one.

    Args:
        bits: the first epoch of each stage, from 0, and its bits. `{0: 8, 5: 4, 10: 2}` trains five epochs in 8 bits,
            five in 4 and the rest in 2.

    Raises:
        ValueError: if the stages are not in order, here; if a run ends before the last stage, or the last stage leaves
            a quantizer with more bits than its specification, when training starts.

    Example:
        >>> import lfq_lightning as lfq
        >>> callbacks = [lfq.QuantizationAwareTraining(weight=2, activation=2), lfq.BitAnnealing({0: 8, 5: 4, 10: 2})]
    """

    def __init__(self, bits: Mapping[int, int]) -> None:
        if not isinstance(bits, Mapping):
            raise TypeError(
                f"`bits` must map first epochs to bits, as {{0: 8, 5: 4, 10: 2}} does. Found {in_words(bits)}."
            )
        self.bits = {_whole(epoch): _whole(value) for epoch, value in bits.items()}
        epochs, values = list(self.bits), list(self.bits.values())
        if epochs[:1] != [0] or epochs != sorted(epochs) or values != sorted(set(values), reverse=True):
            raise ValueError(
                f"`bits` must name a first stage at epoch 0, and fewer bits at each later epoch. Found {dict(bits)}: "
                "{0: 8, 5: 4, 10: 2} is an example."
            )
        if not 2 <= values[-1] <= values[0] <= 16:
            raise ValueError(f"`bits` must lie between 2 and 16. Found {dict(bits)}.")

    def stage(self, epoch: int) -> int:
        """The bits of the stage that an epoch, counted from 0, belongs to."""
        return next(bits for first, bits in reversed(self.bits.items()) if first <= epoch)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check what can be checked before anything is changed."""
        check_order(trainer, self)
        last = max(self.bits)
        epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs - epochs_before(trainer)
        if stage == "fit" and last >= epochs and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ValueError(
                f"The last stage of BitAnnealing starts at epoch {last}. Found a run of {epochs} epochs, which would "
                f"end with {self.stage(int(epochs) - 1)} bits: train longer, or reduce bits earlier."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Have observers keep what they observed, which the stages to come estimate from."""
        for quantizer in quantizers(pl_module).values():
            quantizer.keeps_observations = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse stages that do not reach what checkpoints would say."""
        check_quantized(self, pl_module)
        final = list(self.bits.values())[-1]
        missed = [n for n, q in quantizers(pl_module).items() if q.spec is not None and q.spec.bits < final]
        if missed:
            raise ValueError(
                f"BitAnnealing must end with the bits that QuantizationAwareTraining was given. Found a last stage of "
                f"{final} bits, and fewer for {', '.join(missed[:5])}: end with the smallest number of bits."
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Enter the epoch's stage."""
        epoch = trainer.current_epoch - epochs_before(trainer)
        changed = self._enter(pl_module, self.stage(epoch))
        if epoch >= max(self.bits):
            _let_go(pl_module)
        if changed:
            self._tell(trainer, pl_module, changed)

    @staticmethod
    def _enter(model: nn.Module, bits: int) -> list[LearnableFakeQuantize]:
        changed = []
        for point in points(model).values():
            wanted = widened(point.quantizer, bits)
            if wanted != point.quantizer.code_range:
                weight = point.whole_parameter() if point.has_parameter else None
                change_range(point.quantizer, wanted, weight)
                changed.append(point.quantizer)
        return changed

    def _tell(self, trainer: L.Trainer, model: L.LightningModule, changed: list[LearnableFakeQuantize]) -> None:
        """Let everyone know who remembers these quantizers as they were."""
        quantization = quantization_callback(trainer)
        if quantization is not None and quantization.qparam_optimizer is not None:
            for quantizer in changed:
                quantization.qparam_optimizer.forget(quantizer)
        share_with_averages(trainer, model)
        forget_compiled_code()
        bits = self.stage(trainer.current_epoch - epochs_before(trainer))
        tell(trainer, f"Epoch {trainer.current_epoch}: {len(changed)} quantizers go to {bits} bits.")


def _let_go(model: nn.Module) -> None:
    """Let observers keep no more than others do, once no stage is to come."""
    for quantizer in quantizers(model).values():
        if quantizer.keeps_observations:
            quantizer.keeps_observations = False
            if quantizer.learned:
                quantizer.settle()
