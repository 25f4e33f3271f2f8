"""Tensors that an observer needs only while it observes: in checkpoints until then, and in nobody's way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

# Their names in a state dict, where they stand while there is something in them.
NAMES = ("histogram", "batches", "by_batch", "blank")


class Passing(nn.Module):
    """A module with tensors that come with the first data and go when they have served.

    They are no buffers: DistributedDataParallel sends buffers to every rank before each forward, weight averages
    average them, and a state dict that lacks one does not load.

    Attributes:
        passing: the tensors by name; their first dimension is the channels.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.passing: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        # As buffers are: distributed checkpoints look each key of a state dict up.
        found = self.__dict__.get("passing", {}).get(name)
        return super().__getattr__(name) if found is None else found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.passing = {name: fn(tensor) for name, tensor in self.passing.items()}
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.passing.items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        found = {name: state_dict.pop(prefix + name) for name in NAMES if prefix + name in state_dict}
        super()._load_from_state_dict(state_dict, prefix, *args)
        device = next(self.buffers()).device
        self.passing = {name: torch.empty_like(tensor, device=device).copy_(tensor) for name, tensor in found.items()}


def is_passing(key: str) -> bool:
    """Whether a key of a state dict is that of a tensor which comes and goes."""
    return key.rpartition(".")[2] in NAMES and ".observer." in f".{key}"


def lasting(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without what comes and goes."""
    return {key: value for key, value in state_dict.items() if not is_passing(key)}
