"""What of a quantized model is exported, or why it cannot be, by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lfq_lightning.placement.points import points
from lfq_lightning.placement.quantized_layer import QuantizedLayer
from lfq_lightning.quantizer import LearnableFakeQuantize

MOST_BITS = 8


def own_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode of what can be exported: quantizers that no data has reached, which have no range, are gone.

    Raises:
        ValueError: unless the model has quantizers and each of the others has its qparams.
    """
    return _copied(model, {})


def sharing_copy(model: nn.Module) -> nn.Module:
    """As `own_copy`, with modules and buffers of its own and the model's weights: they are looked at, and not kept."""
    weights = (p for p in model.parameters() if type(p) is nn.Parameter)  # a subclass knows itself how it is copied
    return _copied(model, {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in weights})


def _copied(model: nn.Module, known: dict[int, Any]) -> nn.Module:
    found = points(model)
    late = [name for name, point in found.items() if point.quantizer.late]
    if late:
        rank_zero_warn(
            f"What no data has reached is exported in float. Found no range for {', '.join(late[:5])}"
            f"{f' and {len(late) - 5} more' if len(late) > 5 else ''}: train or calibrate on data that reach it."
        )
    if len(late) == len(found):
        raise ValueError(
            f"The model has no quantizers to export. Found {type(model).__name__} in float: call "
            "`lfq_lightning.attach` and train it first."
        )
    states = {name: point.quantizer for name, point in found.items() if name not in late}
    blind = [name for name, quantizer in states.items() if not (quantizer.estimated or quantizer.learned)]
    if blind:
        raise ValueError(
            f"A quantizer must have a scale before it is exported. Found none set for {', '.join(blind[:5])}: train, "
            "or call `lfq_lightning.calibrate`."
        )
    for module in model.modules():
        for value in module.__dict__.values():  # as old weight_norm leaves one, which deepcopy refuses
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                known[id(value)] = value.detach().clone()
    copied = copy.deepcopy(model, known).eval().requires_grad_(False)
    if late:
        _drop(copied, lambda quantizer: quantizer.late)
    return copied


def leave_tokens_to_runtime(model: nn.Module) -> list[str]:
    """Take off a copy the quantizers whose scales tokens bring; their names.

    Raises:
        ValueError: if there are no others.
    """
    every = points(model)
    found = [name for name, point in every.items() if point.quantizer.per_token]
    if found and len(found) == len(every):
        raise ValueError(
            f"What tokens bring themselves is left to the runtime, which needs integer weights for it. Found "
            f"{found[0]!r} and no quantized weight: quantize weights too, in groups of 4 bits for instance."
        )
    if found:
        _drop(model, lambda quantizer: quantizer.per_token)
    return found


def _drop(model: nn.Module, which: Callable[[LearnableFakeQuantize], bool]) -> None:
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, LearnableFakeQuantize) and which(module):
            parent, _, name = path.rpartition(".")
            # A user calls their own; whoever else asks for one knows that there may be none.
            model.get_submodule(parent)._modules[name] = nn.Identity() if module.site is None else None


def check_exportable(model: nn.Module) -> None:
    """Raise ValueError if a quantizer has settings that integer formats do not hold; known before training."""
    reasons: list[str] = []
    for name, point in points(model).items():
        quantizer, layer = point.quantizer, point.owner
        reasons += _against(quantizer, repr(name) if layer is None else f"the {point.role} of {point.site!r}")
        if layer is None:
            if quantizer.group_size is not None:
                reasons.append(f"{name!r} has groups, which only the weight of a layer can have there")
            continue
        parameter = point.parameter
        if parameter is not None and parameter.dtype is not torch.float32:
            reasons.append(f"{point.site!r} computes in {parameter.dtype}, where the formats hold float32")
        if isinstance(layer, QuantizedLayer) and point.role == "weight" and quantizer.axis not in (None, 0, 1):
            reasons.append(f"the weight of {point.site!r} has a scale for each index of dimension {quantizer.axis}")
    if reasons:
        raise ValueError(
            f"This model cannot be exported to integers: {'; '.join(dict.fromkeys(reasons))}. Change those settings."
        )


def _against(quantizer: LearnableFakeQuantize, what: str) -> list[str]:
    low, high = quantizer.code_range
    if quantizer.bitwidth > MOST_BITS:
        return [f"{what} has {quantizer.bitwidth} bits, of at most {MOST_BITS}"]
    if not (low >= -128 and high <= 127) and not (low >= 0 and high <= 255):
        return [f"the codes {low} to {high} of {what} are neither int8 nor uint8"]
    return []
