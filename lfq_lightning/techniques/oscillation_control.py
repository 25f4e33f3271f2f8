"""Oscillating weights in a Trainer's run: followed after each step, dampened before it, or frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lfq_lightning.checking import check_number, in_words
from lfq_lightning.placement.points import points
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.techniques.order import check_order, check_quantized
from lfq_lightning.techniques.oscillation import (
    Oscillation,
    annealed,
    dampening_gradient,
    element_scales,
    integer_weights,
)
from lfq_lightning.techniques.served import Served
from lfq_lightning.training.trainer.length import length_of
from lfq_lightning.training.wrapping import AtRest

_OSCILLATES = 0.005  # from this frequency on, Nagel et al. 2022 call a weight oscillating

Annealed = float | tuple[float, float]


class OscillationControl(AtRest):
    """Measures which weights oscillate between two integer values, and dampens or freezes them.

    Nagel et al. 2022 (arXiv 2203.11086). While weights learn in a quantized phase, each step's integer values are
    compared with those before; `lfq/oscillating` logs the share of weights whose frequency exceeds 0.005, and
    `lfq/frozen` the share that is frozen. Without `dampen` and `freeze` it only measures. A pair is annealed by a
    cosine from the first to the second value, from the first quantized step to the end of the run. What is known of
    each weight is in the checkpoint: a resumed run equals the uninterrupted one.

    Args:
        dampen: weight of the dampening loss, whose gradient is added to the weights' before each optimizer step; the
            paper anneals (0, 0.1).
        freeze: frequency above which a weight is frozen to its average integer value, for good; the paper anneals
            (0.1, 0.01).
        momentum: of the moving averages of frequency and integer value.

    Raises:
        ValueError: if an argument is out of range, here; if the order of callbacks is wrong, weights are sharded, or a
            pair is given for a run of unknown length, when a fit begins.

    Example:
        >>> import lfq_lightning as lfq
        >>> control = lfq.OscillationControl(freeze=(0.1, 0.01))
        >>> callbacks = [lfq.QuantizationAwareTraining(weight=3, activation=3), control]
    """

    def __init__(
        self,
        dampen: float | Sequence[float] | None = None,
        freeze: float | Sequence[float] | None = None,
        momentum: float = 0.01,
    ) -> None:
        self.dampen, self.freeze = _value("dampen", dampen), _value("freeze", freeze)
        check_number("momentum", momentum)
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"`momentum` must be in (0, 1]. Found {momentum}.")
        self.momentum = momentum
        self._rest()

    def _rest(self) -> None:
        self._served = Served()
        self._forget()
        self._step_before = 0
        self._length = math.inf

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse an order in which steps would be seen too early, and forget another model's weights."""
        check_order(trainer, self)
        if self._served.is_another(pl_module):
            self._forget()

    def _forget(self) -> None:
        self._known: dict[str, Oscillation] = {}
        self._ranges: dict[str, list[int]] = {}
        self._began: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn how long the run is, and check that weights are whole."""
        check_quantized(self, pl_module)
        _, self._length = length_of(trainer)
        if math.isinf(self._length) and any(isinstance(value, tuple) for value in (self.dampen, self.freeze)):
            raise ValueError("A pair is annealed over the run, which must have an end. Found none: give one number.")
        sharded = [name for name, (weight, _) in _quantized_weights(pl_module).items() if isinstance(weight, DTensor)]
        if sharded:
            raise ValueError(
                f'OscillationControl needs whole weights. Found {sharded[0]} sharded: use `strategy="ddp"`.'
            )
        if self._began is not None and self._began > trainer.global_step:  # a second fit counts from 0 again
            self._began = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the step, as a batch whose gradients are only accumulated makes none."""
        self._step_before = trainer.global_step

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Add the dampening loss to the gradients."""
        if self.dampen is None or self._began is None:
            return
        strength = annealed(self.dampen, self._progress(trainer)) * _gradient_scale(trainer, optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for weight, quantizer in _quantized_weights(pl_module).values():
            if id(weight) in held and weight.grad is not None and quantizer.quantizes:
                weight.grad.add_(dampening_gradient(weight, quantizer, strength))

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the weights after a step, and hold those that are frozen."""
        followed = {n: w for n, w in _quantized_weights(pl_module).items() if w[1].phase in ("learn", "freeze")}
        if not followed or trainer.global_step == self._step_before:
            return
        self._began = self._step_before if self._began is None else self._began
        for name, (weight, quantizer) in followed.items():
            self._follow(trainer, name, weight, quantizer)
        self._log(pl_module)

    def _follow(self, trainer: L.Trainer, name: str, weight: Tensor, quantizer: LearnableFakeQuantize) -> None:
        integers = integer_weights(weight, quantizer)
        known = self._known.get(name)
        if known is None or self._ranges[name] != list(quantizer.code_range):  # other bits are another grid
            self._known[name], self._ranges[name] = Oscillation.begin(integers), list(quantizer.code_range)
            return
        known = self._known[name] = known.to(integers.device)
        held = known.integers
        known.follow(torch.where(known.frozen, held, integers), self.momentum)
        if self.freeze is None:
            return
        known.freeze(annealed(self.freeze, self._progress(trainer)))
        grid = (known.integers * element_scales(weight, quantizer)).to(weight.dtype)
        weight.data.copy_(torch.where(known.frozen, grid, weight))

    def _progress(self, trainer: L.Trainer) -> float:
        began = self._began or 0
        return (trainer.global_step - began) / max(1.0, self._length - began)

    def _log(self, module: L.LightningModule) -> None:
        total = sum(known.frequency.numel() for known in self._known.values())
        for name, counted in (
            ("lfq/oscillating", [(k.frequency > _OSCILLATES) & ~k.frozen for k in self._known.values()]),
            ("lfq/frozen", [k.frozen for k in self._known.values()]),
        ):
            share: Tensor = torch.stack([c.sum().float() for c in counted]).sum() / total
            module.log(name, share, on_step=True, on_epoch=False)

    def state_dict(self) -> dict[str, Any]:
        """What is known of each weight, as plain values and tensors."""
        known = {name: oscillation.to_dict() for name, oscillation in self._known.items()}
        return {"known": known, "ranges": dict(self._ranges), "began": self._began}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self._known = {name: Oscillation(**tensors) for name, tensors in state_dict["known"].items()}
        self._ranges = dict(state_dict["ranges"])
        self._began = state_dict["began"]


def _value(name: str, given: float | Sequence[float] | None) -> Annealed | None:
    if given is None:
        return None
    pair = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
    for number in pair:
        check_number(name, number)
    values = [float(number) for number in pair if isinstance(number, (int, float))]
    if len(values) not in (1, 2) or not all(0.0 <= value < math.inf for value in values):
        raise ValueError(
            f"`{name}` must be one number, or a pair to anneal, from 0 on. Found {in_words(given)}: 0.1 and "
            "(0.1, 0.01) are examples."
        )
    return values[0] if len(values) == 1 else (values[0], values[1])


def _quantized_weights(model: L.LightningModule) -> dict[str, tuple[Tensor, LearnableFakeQuantize]]:
    """Each weight once, with its quantizer, by the name of the first layer that has it."""
    found = ((point, point.parameter) for point in points(model).values())
    return {point.site: (weight, point.quantizer) for point, weight in found if weight is not None}


def _gradient_scale(trainer: L.Trainer, optimizer: Optimizer) -> float:
    """What gradients are multiplied by at this point: fused optimizers unscale those of mixed precision themselves."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return float(scaler.get_scale()) if scaler is not None and fused else 1.0
