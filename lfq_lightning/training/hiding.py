"""Quantizers, and their scales and zero points, that others do not meet for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from lfq_lightning.placement.quantized_layer import quantizers
from lfq_lightning.quantizer import LearnableFakeQuantize


def any_parameter(parameter: Tensor) -> bool:
    """What `hidden` hides unless told."""
    return True


@contextmanager
def hidden(found: Iterable[LearnableFakeQuantize], hide: Callable[[Tensor], bool] = any_parameter) -> Iterator[None]:
    """Within it, quantizers do not list the scales and zero points that `hide` holds for, and compute with them."""
    taken: list[tuple[LearnableFakeQuantize, dict[str, Any], list[str]]] = []
    for quantizer in found:
        listed = dict(quantizer._parameters)
        names = [name for name, p in listed.items() if p is not None and hide(p)]
        for name in names:
            object.__setattr__(quantizer, name, quantizer._parameters.pop(name))
        taken.append((quantizer, listed, names))
    try:
        yield
    finally:
        for quantizer, listed, names in taken:
            for name in names:
                object.__delattr__(quantizer, name)
            quantizer._parameters.clear()
            quantizer._parameters.update(listed)  # in their order


def hidden_qparams(model: nn.Module) -> AbstractContextManager[None]:
    """Within it, `model.parameters()` does not know the qparams, so that no user optimizer decays or misses them."""
    return hidden(quantizers(model).values())


@contextmanager
def hidden_quantizers(model: nn.Module) -> Iterator[None]:
    """Within it, the model has no quantizers but those that the user has placed, and computes in float."""
    children = [(parent, name, child) for parent in model.modules() for name, child in parent._modules.items()]
    placed = [entry for entry in children if isinstance(entry[2], LearnableFakeQuantize) and entry[2].site is not None]
    for parent, name, _ in placed:
        parent._modules[name] = None
    users = {quantizer: quantizer.switches for quantizer in quantizers(model).values()}
    for quantizer in users:
        quantizer.phase = "off"
    try:
        yield
    finally:
        for quantizer, switches in users.items():
            quantizer.fake_quant_enabled, quantizer.static_enabled, quantizer.learning_enabled = switches
        for parent, name, child in placed:
            parent._modules[name] = child
