"""Lossless 8-bit storage of what a layer keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lfq_lightning.ops import effective, spread
from lfq_lightning.quantizer import LearnableFakeQuantize


@dataclass
class Saved:
    """Bytes that a layer's last forward pass kept for backward: as they would be, and as they are stored."""

    full: int = 0
    stored: int = 0


class _Codes:
    """A fake-quantized float32 tensor as integer codes, from which the same bits can be computed again."""

    def __init__(self, value: Tensor, quantizer: LearnableFakeQuantize) -> None:
        s, z = effective(quantizer.scale.detach(), quantizer.zero_point.detach(), *quantizer.code_range)
        self._layout = (value.shape, quantizer.axis, quantizer.group_size)
        self._low = quantizer.quant_min - z
        # value / s is an integer up to two roundings, far closer than a half.
        codes = (value / spread(s, *self._layout)).round_().sub_(spread(self._low, *self._layout))
        self._codes = codes.to(torch.uint8)
        # A NaN has no code. It makes the whole tensor NaN, without waiting for the device to ask.
        self._scale = s * torch.where(value.sum().isnan(), torch.nan, 1.0)

    def rebuild(self) -> Tensor:
        """The tensor, bit for bit: (q - z) * s, as the forward pass computed it."""
        value = self._codes.to(torch.float32)
        return value.add_(spread(self._low, *self._layout)).mul_(spread(self._scale, *self._layout))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and qparams."""
        return self._codes.nbytes + self._low.nbytes + self._scale.nbytes


@contextmanager
def compressed(quantized: Iterable[tuple[Tensor, LearnableFakeQuantize]], saved: Saved) -> Iterator[None]:
    """Within it, autograd saves these fake-quantized tensors as integer codes; `saved` is told the bytes.

    Raises:
        RuntimeError: under torch.compile, which decides by itself what to keep for backward.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "`compress_saved` goes with eager execution: under torch.compile the compiler decides what is kept for "
            "backward, and would ignore it. Attach with compress_saved=False, or do not compile."
        )
    if not torch.is_grad_enabled():
        yield
        return
    saving = _Saving(quantized)
    try:
        with torch.autograd.graph.saved_tensors_hooks(saving.pack, saving.unpack):
            yield
    finally:
        saved.full, saved.stored = saving.full, saving.stored
        saving.forget()


class _Saving:
    """Packs what autograd saves of some fake-quantized tensors as integer codes, and unpacks it on demand.

    Tensors are recognised by their storage, so views of them (a transposed weight, a flattened input) count. What is
    saved beside them, such as autocast's copies, is stored as usual.

    Args:
        quantized: fake-quantized tensors with the quantizers that made them; only float32 with at most 256 codes is
            packed.
    """

    def __init__(self, quantized: Iterable[tuple[Tensor, LearnableFakeQuantize]]) -> None:
        self._known = {
            value.untyped_storage().data_ptr(): (value, quantizer)
            for value, quantizer in quantized
            if value.dtype is torch.float32 and quantizer.quantizes and quantizer.bitwidth <= 8
        }
        self._packed: dict[int, _Codes] = {}
        self.full = self.stored = 0

    def pack(self, tensor: Tensor) -> Any:
        """A saved tensor, or its codes and its place in the tensor they are of."""
        self.full += tensor.nbytes
        key = tensor.untyped_storage().data_ptr()
        if key not in self._known or tensor.dtype is not torch.float32:
            self.stored += tensor.nbytes
            return tensor
        if key not in self._packed:
            self._packed[key] = _Codes(*self._known[key])
            self.stored += self._packed[key].nbytes
        return self._packed[key], tensor.shape, tensor.stride(), tensor.storage_offset()

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        """What `pack` was given."""
        if isinstance(packed, Tensor):
            return packed
        codes, shape, stride, offset = packed
        tensor: Tensor = codes.rebuild().as_strided(shape, stride, offset)
        return tensor

    def forget(self) -> None:
        """Let go of the full tensors once the layer's forward pass is over; the codes live on in the graph."""
        self._known.clear()
        self._packed.clear()
