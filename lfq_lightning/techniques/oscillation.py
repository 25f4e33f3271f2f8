"""Weights that oscillate between two integer values: measured, dampened or frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lfq_lightning.ops import spread
from lfq_lightning.quantizer import LearnableFakeQuantize


def integer_weights(weight: Tensor, quantizer: LearnableFakeQuantize) -> Tensor:
    """The integer value of each weight, without the zero point: clip(round(w / s), n - z, p - z), in float32.

    Nagel et al. 2022 (arXiv 2203.11086), section 2.1.

    Args:
        weight: what the quantizer is for.
        quantizer: its scale, zero point and range of codes are used, whatever its phase.

    Returns:
        A tensor of the weight's shape.
    """
    return (quantizer.quantized(weight.detach().float()) / element_scales(weight, quantizer)).round()


def element_scales(weight: Tensor, quantizer: LearnableFakeQuantize) -> Tensor:
    """The scale of each weight, as a view that broadcasts against it."""
    scale, _ = quantizer.used_qparams()
    return spread(scale, weight.shape, quantizer.axis, quantizer.group_size)


def dampening_gradient(weight: Tensor, quantizer: LearnableFakeQuantize, strength: float) -> Tensor:
    """The gradient of strength * ||w_q - clip(w, s n, s p)||^2 in w, with the quantized weight w_q held constant.

    Nagel et al. 2022 (arXiv 2203.11086), section 4.2: 2 * strength * (w - w_q) within the clipping range, where it
    pulls weights to the middle of their bin, and 0 outside.

    Args:
        weight: what the quantizer is for.
        quantizer: its qparams are used.
        strength: lambda, the weight of the loss.

    Returns:
        A tensor of the weight's shape and dtype.
    """
    value = weight.detach()
    scale, zero_point = quantizer.used_qparams()
    scale, zero_point = (spread(p, weight.shape, quantizer.axis, quantizer.group_size) for p in (scale, zero_point))
    steps = value.float() / scale
    inside = (steps > quantizer.quant_min - zero_point) & (steps < quantizer.quant_max - zero_point)
    return torch.where(inside, 2.0 * strength * (value - quantizer.quantized(value)), 0.0).to(weight.dtype)


def annealed(value: float | tuple[float, float], progress: float) -> float:
    """A constant, or the cosine from a first to a last value at this share of the way, in [0, 1]."""
    if not isinstance(value, tuple):
        return value
    first, last = value
    return last + (first - last) * (1.0 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2.0


@dataclass
class Oscillation:
    """What is known of the oscillations of one weight; every tensor has its shape.

    Attributes:
        integers: integer value after the last step, float32.
        direction: sign of its last change, or 0 before any, int8.
        frequency: moving average of how often a change reverses the one before, float32.
        average: moving average of the integer value, float32.
        frozen: which weights keep their integer value, bool.
    """

    integers: Tensor
    direction: Tensor
    frequency: Tensor
    average: Tensor
    frozen: Tensor

    @classmethod
    def begin(cls, integers: Tensor) -> Oscillation:
        """Nothing has moved yet."""
        return cls(
            integers.clone(),
            torch.zeros_like(integers, dtype=torch.int8),
            torch.zeros_like(integers),
            integers.clone(),
            torch.zeros_like(integers, dtype=torch.bool),
        )

    def follow(self, integers: Tensor, momentum: float) -> None:
        """Take in the integer values after a step.

        Nagel et al. 2022, section 2.3: a weight oscillates in a step if its integer value changes, in the direction
        opposite to that of its last change; the frequency is f = m o + (1 - m) f.
        """
        change = (integers - self.integers).sign().to(torch.int8)
        oscillates = change * self.direction < 0
        self.frequency.lerp_(oscillates.float(), momentum)
        self.average.lerp_(integers, momentum)
        self.direction = torch.where(change != 0, change, self.direction)
        self.integers = integers.clone()

    def freeze(self, threshold: float) -> None:
        """Freeze weights whose frequency exceeds a threshold to the nearest integer of their moving average.

        Nagel et al. 2022, section 4.3 and algorithm 1.
        """
        fresh = (self.frequency > threshold) & ~self.frozen
        self.integers = torch.where(fresh, self.average.round(), self.integers)
        self.frozen |= fresh

    def to(self, device: torch.device) -> Oscillation:
        """The same on another device."""
        return Oscillation(**{name: tensor.to(device) for name, tensor in self.to_dict().items()})

    def to_dict(self) -> dict[str, Tensor]:
        """Plain tensors, as `Oscillation(**tensors)` takes them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
