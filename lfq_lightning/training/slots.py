"""The dimensionless value that stands for a scale or zero point in its optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lfq_lightning.placement.host import QuantizedLayer
from lfq_lightning.quantizer import LearnableFakeQuantize

_EPS = torch.finfo(torch.float32).eps


@dataclass
class Slot:
    """One qparam, and the dimensionless value that stands for it in the optimizer."""

    quantizer: LearnableFakeQuantize
    name: str
    host: QuantizedLayer | None  # None where the user has placed the quantizer
    proxy: nn.Parameter

    @property
    def value(self) -> Tensor:
        value: Tensor = getattr(self.quantizer, self.name)
        return value

    @property
    def in_log_domain(self) -> bool:
        """Whether the proxy is log2 of the scale relative to its unit (Jain et al. 2020, arXiv 1903.08066, eq. 8)."""
        return self.name == "scale" and self.quantizer.scale_domain != "linear"

    def unit(self) -> Tensor | float:
        """What the qparam is measured in: the scale it began to learn with, or the range of codes."""
        if self.name == "scale":
            return self.quantizer.scale_reference
        return float(self.quantizer.quant_max - self.quantizer.quant_min)

    def take_gradient(self, loss_scale: Tensor | None) -> bool:
        """Hand value and gradient to the proxy; False where there is nothing to learn from."""
        gradient = self.value.grad
        if (
            gradient is None
            or not self.quantizer.learning_enabled
            or not (self.host is None or self.host.weight.requires_grad)
        ):
            self.proxy.grad = None
            return False
        sound = gradient.nan_to_num(0.0, 0.0, 0.0)
        if self.in_log_domain:
            scale = self.value.clamp(min=_EPS)
            self.proxy.data.copy_((scale / self.unit()).log2())
            self.proxy.grad = sound * scale * math.log(2.0)
        else:
            self.proxy.data.copy_(self.value / self.unit())
            self.proxy.grad = sound * self.unit()
        if loss_scale is not None:
            self.proxy.grad /= loss_scale
        return True

    def write_back(self, before: Tensor) -> None:
        """Add the step to the qparam: a value that did not move keeps every bit."""
        step = self.proxy.data - before
        moved = self.value * step.exp2() if self.in_log_domain else self.value + step * self.unit()
        if self.name == "scale":
            moved = torch.minimum(torch.maximum(moved, self.value / 2), self.value * 2).clamp(min=_EPS)
        else:
            moved = moved.clamp(self.quantizer.quant_min, self.quantizer.quant_max)
        assert self.value.grad is not None
        sound = self.value.grad.isfinite() & moved.isfinite()
        self.value.data.copy_(torch.where(sound, moved, self.value))
