"""Storage of what a layer keeps for its backward pass: quantized tensors are rebuilt instead of kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lfq_lightning.private import saved_tensors_are_hooked, version_of
from lfq_lightning.quantizer import LearnableFakeQuantize


@dataclass
class Saved:
    """Bytes that a layer's last forward pass kept for backward: as they would be, and as they are stored."""

    full: int = 0
    stored: int = 0


class Quantized(NamedTuple):
    """A fake-quantized tensor, what it was made of, and the quantizer that made it."""

    value: Tensor
    source: Tensor
    quantizer: LearnableFakeQuantize


class _Recipe:
    """A fake-quantized tensor as the float tensor it came from, which the quantizer's own backward keeps anyway.

    Integer codes would take a byte an element more, and to pack and unpack them more time than to quantize again.
    """

    def __init__(self, quantized: Quantized) -> None:
        _, source, quantizer = quantized
        self._source, self._version = source.detach(), version_of(source)
        self._quantize = quantizer.as_now()
        self._nbytes = sum(p.nbytes for p in quantizer.used_qparams())

    def rebuild(self) -> Tensor:
        """The tensor, bit for bit, as the forward pass computed it.

        Raises:
            RuntimeError: if what it came from was changed in place since.
        """
        if version_of(self._source) != self._version:
            raise RuntimeError(
                "A tensor needed for backward was modified in place after a quantized layer had used it. Found shape "
                f"{tuple(self._source.shape)}, version {version_of(self._source)} instead of {self._version}: use an "
                "operation out of place there (relu instead of relu_)."
            )
        with torch.no_grad():
            return self._quantize(self._source)

    @property
    def nbytes(self) -> int:
        """Bytes beyond what is kept anyway: the qparams'."""
        return self._nbytes


@contextmanager
def compressed(quantized: Iterable[Quantized], saved: Saved) -> Iterator[None]:
    """Within it, autograd keeps recipes of these fake-quantized tensors; `saved` is told the bytes.

    Where others have hooks for saved tensors (activation checkpointing, `save_on_cpu`), tensors are left to those: of
    nested hooks torch calls the innermost alone.

    Raises:
        RuntimeError: under torch.compile, which decides by itself what to keep for backward.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "`compress_saved` goes with eager execution: under torch.compile the compiler decides what is kept for "
            "backward, and would ignore it. Attach with compress_saved=False, or do not compile."
        )
    if not torch.is_grad_enabled() or saved_tensors_are_hooked():
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
    """Packs what autograd saves of some fake-quantized tensors as recipes, and rebuilds it on demand.

    Tensors are recognised by their storage, so views of them (a transposed weight, a flattened input) count. What is
    saved beside them, such as autocast's copies or what the layer has changed in place, is stored as usual.
    """

    def __init__(self, quantized: Iterable[Quantized]) -> None:
        made = [q for q in quantized if q.quantizer.quantizes]
        self._known = {q.value.untyped_storage().data_ptr(): (q, version_of(q.value)) for q in made}
        self._packed: dict[int, _Recipe] = {}
        self.full = self.stored = 0

    def pack(self, tensor: Tensor) -> Any:
        """A saved tensor, or its recipe and its place in the tensor that it makes."""
        self.full += tensor.nbytes
        key = tensor.untyped_storage().data_ptr()
        quantized, version = self._known.get(key, (None, 0))
        if quantized is None or tensor.dtype is not quantized.value.dtype or version_of(tensor) != version:
            self.stored += tensor.nbytes
            return tensor
        if key not in self._packed:
            self._packed[key] = _Recipe(quantized)
            self.stored += self._packed[key].nbytes
        return self._packed[key], tensor.shape, tensor.stride(), tensor.storage_offset()

    @staticmethod
    def unpack(packed: Any) -> Tensor:
        """What `pack` was given."""
        if isinstance(packed, Tensor):
            return packed
        recipe, shape, stride, offset = packed
        tensor: Tensor = recipe.rebuild().as_strided(shape, stride, offset)
        return tensor

    def forget(self) -> None:
        """Let go of the quantized tensors once the layer's forward pass is over; the recipes live on in the graph."""
        self._known.clear()
        self._packed.clear()
