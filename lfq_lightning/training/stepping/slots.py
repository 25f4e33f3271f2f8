"""The dimensionless values that stand for scales and zero points in their optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lfq_lightning.placement.points import Point, points
from lfq_lightning.private import copy_each_
from lfq_lightning.quantizer import LearnableFakeQuantize

_EPS = torch.finfo(torch.float32).eps

Kind = Literal["scale", "log scale", "zero point"]


def places(model: nn.Module) -> list[Point]:
    """Where a model is quantized, layers first: the order that optimizers in checkpoints have."""
    return sorted(points(model).values(), key=lambda point: point.owner is None)


@dataclass(slots=True)
class Slot:
    """One qparam, and the dimensionless value that stands for it in the optimizer.

    The qparam is looked up whenever it is used: moving a module puts other tensors, or other parameters, in its place.
    There are thousands, and each is looked up several times a step, so what holds them is kept at hand.
    """

    point: Point
    name: str
    quantizer: LearnableFakeQuantize = field(init=False)
    proxy: nn.Parameter = field(init=False)
    held: dict[str, nn.Parameter | None] = field(init=False)

    def __post_init__(self) -> None:
        self.quantizer = self.point.quantizer
        self.held = self.quantizer._parameters

    @property
    def value(self) -> nn.Parameter:
        """The scale or zero point, as it is now."""
        value = self.held.get(self.name)
        return getattr(self.quantizer, self.name) if value is None else value  # it is hidden at times

    @property
    def kind(self) -> Kind:
        """A proxy of a log scale is log2 of the scale in its unit (Jain et al. 2020, arXiv 1903.08066, eq. 8)."""
        if self.name != "scale":
            return "zero point"
        return "scale" if self.quantizer.scale_domain == "linear" else "log scale"

    @property
    def learns(self) -> bool:
        """Whether the phase and the layer let it move."""
        return self.quantizer.learning_enabled and self.point.learns


@dataclass
class _Taken:
    """What a row held before a step."""

    moving: list[bool]
    qparams: list[Tensor]
    values: Tensor
    units: Tensor
    proxies: Tensor
    sound: Tensor


class Row:
    """Slots of one kind, device and dtype, whose proxies lie one after another in one tensor.

    A network has many qparams of few elements each. Laid out in a row, a step takes as many operations for hundreds of
    them as for one.

    Args:
        slots: are given proxies that are views of the row.
    """

    def __init__(self, slots: list[Slot]) -> None:
        self.slots, self.kind = slots, slots[0].kind
        values = [slot.value for slot in slots]
        self._sizes = [value.numel() for value in values]
        self._device = values[0].device
        self._proxies = values[0].new_zeros(sum(self._sizes))
        self._nothing = torch.zeros_like(self._proxies).split(self._sizes)
        # Made once with their parts: a step would take longer to cut them than to compute them.
        self._gradients, self._moved = torch.zeros_like(self._proxies), torch.zeros_like(self._proxies)
        self._gradient_parts, self._moved_parts = (t.split(self._sizes) for t in (self._gradients, self._moved))
        self._one = torch.ones((), device=self._device)
        self._ranges: list[tuple[int, int]] = []
        for slot, part in zip(slots, self._proxies.split(self._sizes), strict=True):
            slot.proxy = nn.Parameter(part)

    @property
    def is_in_place(self) -> bool:
        """Whether all qparams are on the row's device still."""
        return all(slot.value.device == self._device for slot in self.slots)

    def take_gradients(self, scaler: Any) -> _Taken | None:
        """Hand values and gradients to the proxies; None where there is nothing to learn from.

        Args:
            scaler: the gradient scaler of mixed precision, or None; its own `unscale_` would wait for the device.
        """
        qparams: list[Tensor] = [slot.value for slot in self.slots]
        found = [qparam.grad if slot.learns else None for qparam, slot in zip(qparams, self.slots, strict=True)]
        moving = [gradient is not None for gradient in found]
        if not any(moving):
            for slot in self.slots:
                slot.proxy.grad = None
            return None
        values, units = torch.cat(qparams), self._units()
        held = torch.cat([zeros if own is None else own for own, zeros in zip(found, self._nothing, strict=True)])
        gradients = held.nan_to_num(0.0, 0.0, 0.0)
        if self.kind == "log scale":
            scales = values.clamp(min=_EPS)
            proxies, learned = (scales / units).log2(), gradients * scales * math.log(2.0)
        else:
            proxies, learned = values / units, gradients * units
        if scaler is not None:
            learned /= scaler.scale(self._one)
        self._proxies.copy_(proxies)
        self._gradients.copy_(learned)
        for slot, moves, part in zip(self.slots, moving, self._gradient_parts, strict=True):
            slot.proxy.grad = part if moves else None
        return _Taken(moving, qparams, values, units, proxies, held == gradients)

    def write_back(self, taken: _Taken) -> None:
        """Add the step to the qparams: a value that did not move keeps every bit."""
        values, step = taken.values, self._proxies - taken.proxies
        moved = values * step.exp2() if self.kind == "log scale" else values + step * taken.units
        if self.kind == "zero point":
            moved = moved.clamp(self._lowest, self._highest)
        else:
            moved = torch.minimum(torch.maximum(moved, values / 2), values * 2).clamp(min=_EPS)
        torch.where(taken.sound & moved.isfinite(), moved, values, out=self._moved)
        copy_each_(list(compress(taken.qparams, taken.moving)), list(compress(self._moved_parts, taken.moving)))

    def _units(self) -> Tensor:
        """What the qparams are measured in: the scales they began to learn with, or their ranges of codes."""
        if self.kind != "zero point":
            return torch.cat([vars(slot.quantizer)["_buffers"]["scale_reference"] for slot in self.slots])
        ranges = [slot.quantizer.code_range for slot in self.slots]
        if ranges != self._ranges:  # another bit width has another range
            self._ranges = ranges
            each = torch.tensor(ranges, dtype=self._proxies.dtype).repeat_interleave(torch.tensor(self._sizes), 0)
            self._lowest, self._highest = each.to(self._proxies.device, non_blocking=True).unbind(1)
            self._span = self._highest - self._lowest
        return self._span


def rows_of(slots: Iterable[Slot]) -> list[Row]:
    """Lay slots out in as few rows as there are kinds, devices and dtypes."""
    alike: dict[tuple[Any, ...], list[Slot]] = {}
    for slot in slots:
        alike.setdefault((slot.kind, slot.value.device, slot.value.dtype), []).append(slot)
    return [Row(row) for row in alike.values()]
