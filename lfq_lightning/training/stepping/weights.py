"""Longer steps for weights of few bits, whose codes would hardly change otherwise."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lfq_lightning.placement.points import Point, points, weights
from lfq_lightning.private import add_each_, subtract_each_
from lfq_lightning.spec import QuantSpec
from lfq_lightning.training.stepping.hooks import StepHooks, held_by, wrapped_by

PATH = 4.0  # quantization steps
MOST = 8.0

_Moved = tuple[float, list[Tensor], list[Tensor]]  # a factor, weights, and what they were before the step


class Travel:
    """How far weights of so many bits will go in a run, and by how much longer their steps must be to go far enough.

    The first quantized steps are let pass, as an optimizer's differ from all that follow, and as many more are
    measured: a twentieth of the run each, at most 20.

    Attributes:
        factor: by which steps are multiplied; 1 until it is known.
    """

    def __init__(self) -> None:
        self.factor, self.known = 1.0, False
        self._window, self._passed, self._elements = 0, 0, 0
        self._moved: float | Tensor = 0.0

    def begin(self, left: float) -> bool:
        """Whether the coming step is measured, where so many are left; an endless run leaves steps as they are."""
        if not self._window:
            self._window = round(min(max(left / 20, 1.0), 20.0)) if math.isfinite(left) else 0
            self.known = not self._window
        return not self.known and self._passed >= self._window

    def end(self) -> bool:
        """Count a step; whether it was the last to measure."""
        self._passed += 1
        return not self.known and self._passed >= 2 * self._window

    def measure(self, moved: Tensor, scale: Tensor) -> None:
        """Take in by how much a step has moved a weight, or the part of it that this rank has."""
        own = moved.to_local() if isinstance(moved, DTensor) else moved
        self._moved = self._moved + own.abs().sum(dtype=torch.float32) / scale.mean()
        self._elements += own.numel()

    def settle(self, left: float, over_ranks: Callable[[Tensor], Tensor] | None) -> float:
        """Decide the factor for the steps that are left; how many quantization steps an element would go without it."""
        pair = torch.as_tensor(self._moved).new_tensor([float(self._moved), float(self._elements)])
        moved, elements = (pair if over_ranks is None else over_ranks(pair)).tolist()
        path = left * moved / max(1.0, elements)
        self.factor, self.known = min(max(PATH / path, 1.0), MOST) if path > 0 else 1.0, True
        return path

    def state_dict(self) -> dict[str, float | int | bool]:
        """Plain values."""
        return {**vars(self), "_moved": float(self._moved)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        vars(self).update(state)


class WeightSteps:
    """Multiplies what a step of the user's optimizers does to each quantized weight as its `QuantSpec.lr_factor` says.

    Any optimizer will do: learning rates, parameter groups, schedulers and optimizer states stay as they are. A weight
    is lengthened while it is quantized, and no other is touched or copied. Where an optimizer wraps another that makes
    the steps, those are lengthened: what the wrapper does to weights between them, as SAM's ascent, is no step.
    """

    def __init__(self) -> None:
        self.hooks = StepHooks()
        self._points: list[tuple[Point, QuantSpec]] = []
        self._before: dict[Optimizer, list[_Moved]] = {}
        self._measured: dict[Optimizer, dict[int, list[tuple[Point, Tensor]]]] = {}
        self._order: dict[Optimizer, int] = {}
        self._travels: defaultdict[str, Travel] = defaultdict(Travel)  # by optimizer and bits

    def follow(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        left: Callable[[], float] = lambda: math.inf,
        over_ranks: Callable[[Tensor], Tensor] | None = None,
        say: Callable[[str], None] = rank_zero_info,
    ) -> None:
        """Lengthen the steps of these optimizers from now on, where the model has weights of few bits.

        Args:
            model: a model with quantizers.
            optimizers: the user's.
            left: how many steps each will make from now on.
            over_ranks: the mean of a flat tensor over ranks, where each has a part of every weight.
            say: takes a line for the user.
        """
        self.remove()
        self._left, self._over_ranks, self._say = left, over_ranks, say
        lengthened: set[tuple[int, float]] = set()
        for point in weights(points(model)):
            spec = point.quantizer.spec
            if spec is None:
                continue
            bits = bits_at_last(spec)
            factor = spec.lr_factor_at(bits)
            if factor != 1.0:
                self._points.append((point, spec))
            if factor not in (1.0, None):
                lengthened.add((bits, factor))
        for index, optimizer in enumerate(optimizers if self._points else ()):
            stepping = [optimizer, *wrapped_by(optimizer)][-1]
            self._order[stepping] = index
            self.hooks.add(stepping, self._remember, self._lengthen)
        for bits, factor in sorted(lengthened):
            self._say(f"Weights of {bits} bits move {factor:g} times as far a step (`QuantSpec.lr_factor`).")

    @torch.no_grad()
    def _remember(self, optimizer: Optimizer) -> None:
        """Keep the weights that the optimizer is about to step; the first call before a step counts."""
        if optimizer in self._before:
            return
        held = held_by([optimizer])
        moving: defaultdict[float, dict[int, Tensor]] = defaultdict(dict)
        measured: defaultdict[int, dict[int, Point]] = defaultdict(dict)
        for point, spec in self._points:
            weight, quantizer = _stepped(point), point.quantizer
            if not quantizer.fake_quant_enabled or weight.grad is None or id(weight) not in held:
                continue
            bits = quantizer.bitwidth
            factor = spec.lr_factor_at(bits)
            if factor is None:
                travel = self._travel(optimizer, bits)
                if not travel.known:
                    measured[bits][id(weight)] = point
                factor = travel.factor
            if factor != 1.0:
                moving[factor][id(weight)] = weight
        self._before[optimizer] = [
            (factor, list(step.values()), [weight.detach().clone() for weight in step.values()])
            for factor, step in moving.items()
        ]
        self._measured[optimizer] = {
            bits: [(point, _stepped(point).detach().clone()) for point in found.values()]
            if self._travel(optimizer, bits).begin(self._left())
            else []
            for bits, found in measured.items()
        }

    @torch.no_grad()
    def _lengthen(self, optimizer: Optimizer) -> None:
        for factor, moved, before in self._before.pop(optimizer, ()):
            subtract_each_(before, moved)
            add_each_(moved, before, alpha=1.0 - factor)
        for bits, found in self._measured.pop(optimizer, {}).items():
            travel = self._travel(optimizer, bits)
            for point, was in found:
                travel.measure(_stepped(point).detach() - was, point.quantizer.scale)
            if travel.end():
                self._tell(bits, travel.settle(self._left(), self._over_ranks), travel.factor)

    def _travel(self, optimizer: Optimizer, bits: int) -> Travel:
        return self._travels[f"{self._order[optimizer]}.{bits}"]

    def _tell(self, bits: int, path: float, factor: float) -> None:
        goes = f"Weights of {bits} bits go {path:.2g} quantization steps on the rest of this run at their learning rate"
        if factor == 1.0:
            self._say(f"{goes}: their steps stay as they are.")
            return
        hint = "; few codes will change: raise the learning rate, or train longer" if path * factor < PATH / 4 else ""
        self._say(f"{goes}: they move {factor:.2g} times as far a step (`QuantSpec.lr_factor`){hint}.")

    def forget(self) -> None:
        """Drop what was kept for a step that a gradient scaler left out."""
        self._before.clear()
        self._measured.clear()

    def remove(self) -> None:
        """Let go of the optimizers; what was measured stays for a checkpoint."""
        self.hooks.remove()
        self._points.clear()
        self._order.clear()
        self.forget()

    def state_dict(self) -> dict[str, dict[str, float | int | bool]]:
        """What was measured, by optimizer and bits; plain values."""
        return {key: travel.state_dict() for key, travel in self._travels.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take up what `state_dict` gave."""
        for key, measured in state.items():
            self._travels[key].load_state_dict(measured)


def bits_at_last(spec: QuantSpec) -> int:
    """Bits that hold every code, once annealing is over: the number of codes says how far it is to the next one."""
    lowest, highest = spec.code_range(signed=True)
    return (highest - lowest).bit_length()


def _stepped(point: Point) -> Tensor:
    """The parameter by which an optimizer moves the weight: `torch.nn.utils.prune` makes it another."""
    assert point.owner is not None
    assert point.parameter is not None
    pruned = point.owner._parameters.get(f"{point.quantizer.place.parameter}_orig")
    return point.parameter if pruned is None else pruned
