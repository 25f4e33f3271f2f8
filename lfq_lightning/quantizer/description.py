"""What a quantizer says of itself: in a state dict beside its tensors, and in print."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Self

from torch import Tensor, nn

from lfq_lightning.observers import Observer
from lfq_lightning.quantizer.saved import NOTE, Description, Place, Role, described
from lfq_lightning.quantizer.switches import Switches
from lfq_lightning.spec import QuantSpec


class Described(Switches, nn.Module):
    """A module whose phase, range and specification travel with its state dict, and whose tensors stay float32."""

    role: Role | None = None  # what it quantizes
    site: str | None = None  # where that is read, below the module that holds it; None for one that the user has placed
    place: Place = Place()
    spec: QuantSpec | None
    scale: Tensor
    quant_min: int
    quant_max: int
    axis: int | None
    group_size: int | None
    symmetric: bool
    observer: nn.Module
    estimated: bool
    learned: bool
    late: bool

    def describe(self) -> Description:
        """Phase, range and specification, as plain values; of all quantizers together, a checkpoint's manifest."""
        fake_quant, static, learning = self.switches
        spec = None if self.spec is None else self.spec.to_dict()
        ends, switches = (self.quant_min, self.quant_max), (fake_quant, static, learning)
        stands = (switches, self.estimated, self.learned, self.late)
        return Description(*stands, *ends, self.axis, self.role, self.site, spec, self.place)

    def get_extra_state(self) -> Tensor:
        """What `describe` says, as a tensor."""
        device = self.scale.device
        return self.describe().to_tensor(None if device.type == "meta" else device)

    def set_extra_state(self, state: Tensor | Mapping[str, Any]) -> None:
        """Take up what `get_extra_state` gave; what it was made with, and where it stands, stay as they are here.

        Raises:
            ValueError: if it is another.
        """
        if isinstance(state, Tensor) and state.is_meta:
            return  # shapes alone, as for a state that is filled later
        found = described(state)
        if found is None:
            raise ValueError(
                f"A quantizer's extra state must be what `state_dict()` gave. Found {_shown(state)}: load a state dict "
                "whose quantizers have the same settings, or average only such."
            )
        self.fake_quant_enabled, self.static_enabled, self.learning_enabled = found.switches
        self.estimated, self.learned, self.late = found.estimated, found.learned, found.late
        self.quant_min, self.quant_max = found.quant_min, found.quant_max
        if isinstance(self.observer, Observer):
            self.observer.quant_min, self.observer.quant_max = self.quant_min, self.quant_max

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # With `assign=True` a state takes the place of the tensors here, and kernels read float32.
        for name, own in (*self.named_parameters(), *self.named_buffers()):
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.dtype is not own.dtype:
                state_dict[prefix + name] = given.to(own.dtype)
        rest = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        unexpected_keys[:] = [key for key in unexpected_keys if not key.endswith(NOTE)]  # it is for other models

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
    def per_token(self) -> bool:
        """Whether each token brings its own scale; `scale` is then that of all that was seen, for the record."""
        return self.spec is not None and self.spec.granularity == "per_token"

    @property
    def kind(self) -> str:
        """Symmetry and granularity, such as `symmetric per_channel(0)`."""
        if self.per_token:
            granularity = "per_token"
        elif self.group_size is not None:
            granularity = f"per_group({self.group_size})"
        else:
            granularity = "per_tensor" if self.axis is None else f"per_channel({self.axis})"
        return f"{'symmetric' if self.symmetric else 'affine'} {granularity}"

    def extra_repr(self) -> str:
        """A label such as `w4 symmetric per_channel(0) learn`."""
        letter = "w" if self.role == "weight" else "a"
        return f"{letter}{self.bitwidth} {self.kind} {self.phase}"


def _shown(state: object) -> str:
    return f"a tensor of shape {tuple(state.shape)}" if isinstance(state, Tensor) else f"{state!r:.80}"
