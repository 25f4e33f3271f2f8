"""A tensor that several read is quantized once."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lfq_lightning.private import TensorWeakRef, version_of


class _Made(NamedTuple):
    source: TensorWeakRef
    value: TensorWeakRef
    state: tuple[Any, ...]


# Of each quantizer that serves several readers, what it made last. It is held by whoever reads it, and by nobody here.
_last: WeakKeyDictionary[nn.Module, _Made] = WeakKeyDictionary()


def quantized_once(quantizer: Any, x: Tensor, learn: bool) -> Tensor:
    """The quantizer's output for x; in eager execution the tensor that it gave to the reader before, if x is the same.

    Whatever changed since, x or its quantized values in place, the scale or the phase, x is quantized anew. A compiler
    sees every reader, and merges what is equal; in inference mode nobody knows what changed.
    """
    place = getattr(quantizer, "place", None)  # what stands in for a quantizer in an export has none
    if place is None or not place.also or torch.compiler.is_compiling() or x.is_inference():
        y: Tensor = quantizer(x, learn)
        return y
    made = _last.get(quantizer)
    if made is not None and made.source() is x:
        value = made.value()
        if value is not None and made.state == _state(quantizer, x, value, learn):
            return value
    y = quantizer(x, learn)
    _last[quantizer] = _Made(TensorWeakRef(x), TensorWeakRef(y), _state(quantizer, x, y, learn))
    return y


def _state(quantizer: Any, x: Tensor, y: Tensor, learn: bool) -> tuple[Any, ...]:
    versions = (version_of(each) for each in (x, y, quantizer.scale, quantizer.zero_point))
    return (*versions, quantizer.switches, quantizer.gathering, learn, torch.is_grad_enabled())
