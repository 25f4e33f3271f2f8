"""What a quantizer says of itself: in a state dict beside its tensors, and in print."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from lfq_lightning.observers import Observer
from lfq_lightning.quantizer.switches import Switches
from lfq_lightning.spec import QuantSpec


class Described(Switches, nn.Module):
    """A module whose phase, range and specification travel with its state dict, and whose tensors stay float32."""

    spec: QuantSpec | None
    quant_min: int
    quant_max: int
    axis: int | None
    group_size: int | None
    symmetric: bool
    is_weight: bool
    observer: nn.Module
    estimated: bool
    learned: bool

    def get_extra_state(self) -> dict[str, Any]:
        """Phase, range and specification, as plain values; together these are a checkpoint's manifest."""
        return {
            "phase": self.phase,
            "switches": self.switches,
            "estimated": self.estimated,
            "learned": self.learned,
            "quant_min": self.quant_min,
            "quant_max": self.quant_max,
            "axis": self.axis,
            "spec": None if self.spec is None else self.spec.to_dict(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up what `get_extra_state` gave."""
        self.fake_quant_enabled, self.static_enabled, self.learning_enabled = state["switches"]
        self.estimated, self.learned = state["estimated"], state["learned"]
        self.quant_min, self.quant_max = state["quant_min"], state["quant_max"]
        if isinstance(self.observer, Observer):
            self.observer.quant_min, self.observer.quant_max = self.quant_min, self.quant_max

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move devices with the model, and stay float32 through `.half()`, `.bfloat16()` and `.double()`."""

        def in_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype is tensor.dtype else tensor.to(moved.device)

        super()._apply(in_float32, recurse)
        return self

    @property
    def bitwidth(self) -> int:
        """Bits that hold every code."""
        return math.ceil(math.log2(self.quant_max - self.quant_min + 1))

    @property
    def kind(self) -> str:
        """Symmetry and granularity, such as `symmetric per_channel(0)`."""
        if self.group_size is not None:
            granularity = f"per_group({self.group_size})"
        else:
            granularity = "per_tensor" if self.axis is None else f"per_channel({self.axis})"
        return f"{'symmetric' if self.symmetric else 'affine'} {granularity}"

    def extra_repr(self) -> str:
        """A label such as `w4 symmetric per_channel(0) learn`."""
        return f"{'w' if self.is_weight else 'a'}{self.bitwidth} {self.kind} {self.phase}"
