"""Longer steps for weights of few bits, whose codes would hardly change otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lfq_lightning.placement.points import Point, points, weights
from lfq_lightning.private import add_each_, subtract_each_
from lfq_lightning.spec import QuantSpec
from lfq_lightning.training.stepping.hooks import StepHooks, held_by, wrapped_by

_Moved = tuple[float, list[Tensor], list[Tensor]]  # a factor, weights, and what they were before the step


class WeightSteps:
    """Multiplies what a step of the user's optimizers does to each quantized weight by its `QuantSpec.lr_factor`.

    Any optimizer will do: learning rates, parameter groups, schedulers and optimizer states stay as they are. A weight
    is lengthened while it is quantized, and no other is touched or copied. Where an optimizer wraps another that makes
    the steps, those are lengthened: what the wrapper does to weights between them, as SAM's ascent, is no step.
    """

    def __init__(self) -> None:
        self.hooks = StepHooks()
        self._points: list[tuple[Point, QuantSpec]] = []
        self._before: dict[Optimizer, list[_Moved]] = {}

    def follow(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Lengthen the steps of these optimizers from now on, where the model has weights of few bits."""
        self.remove()
        lengthened: set[tuple[int, float]] = set()
        for point in weights(points(model)):
            spec = point.quantizer.spec
            if spec is None:
                continue
            bits = _bits_at_last(spec)
            factor = spec.lr_factor_at(bits)
            if factor != 1.0:
                self._points.append((point, spec))
                lengthened.add((bits, factor))
        for optimizer in optimizers if self._points else ():
            self.hooks.add([optimizer, *wrapped_by(optimizer)][-1], self._remember, self._lengthen)
        for bits, factor in sorted(lengthened):
            rank_zero_info(f"Weights of {bits} bits move {factor:g} times as far a step (`QuantSpec.lr_factor`).")

    @torch.no_grad()
    def _remember(self, optimizer: Optimizer) -> None:
        """Keep the weights that the optimizer is about to step; the first call before a step counts."""
        if optimizer in self._before:
            return
        held = held_by([optimizer])
        moving: dict[float, dict[int, Tensor]] = {}
        for point, spec in self._points:
            weight, quantizer = _stepped(point), point.quantizer
            if quantizer.fake_quant_enabled and weight.grad is not None and id(weight) in held:
                moving.setdefault(spec.lr_factor_at(quantizer.bitwidth), {})[id(weight)] = weight
        self._before[optimizer] = [
            (factor, list(step.values()), [weight.detach().clone() for weight in step.values()])
            for factor, step in moving.items()
        ]

    @torch.no_grad()
    def _lengthen(self, optimizer: Optimizer) -> None:
        for factor, moved, before in self._before.pop(optimizer, ()):
            subtract_each_(before, moved)
            add_each_(moved, before, alpha=1.0 - factor)

    def forget(self) -> None:
        """Drop what was kept for a step that a gradient scaler left out."""
        self._before.clear()

    def remove(self) -> None:
        """Let go of the optimizers."""
        self.hooks.remove()
        self._points.clear()
        self.forget()


def _bits_at_last(spec: QuantSpec) -> int:
    """Bits that hold every code, once annealing is over: the number of codes says how far it is to the next one."""
    lowest, highest = spec.code_range(signed=True)
    return (highest - lowest).bit_length()


def _stepped(point: Point) -> Tensor:
    """The parameter by which an optimizer moves the weight: `torch.nn.utils.prune` makes it another."""
    assert point.owner is not None
    assert point.parameter is not None
    pruned = point.owner._parameters.get(f"{point.quantizer.place.parameter}_orig")
    return point.parameter if pruned is None else pruned
