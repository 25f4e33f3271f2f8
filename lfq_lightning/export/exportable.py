"""Whether a quantized model can be exported, or why not, by name."""

from __future__ import annotations

import copy

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lfq_lightning.placement.host import INPUT, hosts, placed_by_users, quantizers
from lfq_lightning.quantizer import LearnableFakeQuantize

MOST_BITS = 8


def check_estimated(model: nn.Module) -> None:
    """Raise ValueError unless the model has quantizers and each has its qparams."""
    found = quantizers(model)
    if not found:
        raise ValueError(
            f"The model has no quantizers to export. Found {type(model).__name__} in float: call "
            "`lfq_lightning.attach` and train it first."
        )
    blind = [name for name, quantizer in found.items() if not (quantizer.estimated or quantizer.learned)]
    if blind:
        raise ValueError(
            f"A quantizer must have a scale before it is exported. Found none set for {', '.join(blind[:5])}: train, "
            "or call `lfq_lightning.calibrate`."
        )


def without_late(model: nn.Module) -> nn.Module:
    """The model, or a copy whose late quantizers, which have no range, are gone: what they are for stays in float."""
    late = [name for name, quantizer in quantizers(model).items() if quantizer.late]
    if not late:
        return model
    rank_zero_warn(
        f"What no data has reached is exported in float. Found no range for {', '.join(late[:5])}"
        f"{f' and {len(late) - 5} more' if len(late) > 5 else ''}: train or calibrate on data that reach it."
    )
    copied = copy.deepcopy(model)
    for layer in hosts(copied).values():
        if layer.input_quantizer is not None and layer.input_quantizer.late:
            layer._modules[INPUT] = None
    for module in list(copied.modules()):
        for name, child in module._modules.items():
            if isinstance(child, LearnableFakeQuantize) and child.late:
                module._modules[name] = nn.Identity()  # the user's own, which the user calls
    return copied


def check_exportable(model: nn.Module) -> None:
    """Raise ValueError if a quantizer has settings that integer formats do not hold; known before training."""
    reasons = []
    for name, layer in hosts(model).items():
        if layer.weight.dtype is not torch.float32:
            reasons.append(f"{name!r} computes in {layer.weight.dtype}, where the formats hold float32")
        for role, quantizer in (("weight", layer.weight_quantizer), ("input", layer.input_quantizer)):
            if quantizer is None:
                continue
            reasons += _against(quantizer, f"the {role} of {name!r}")
            if role == "weight" and quantizer.axis not in (None, 0, 1):
                reasons.append(f"the weight of {name!r} has a scale for each index of dimension {quantizer.axis}")
    for name, quantizer in placed_by_users(model).items():
        reasons += _against(quantizer, repr(name))
        if quantizer.group_size is not None:
            reasons.append(f"{name!r} has groups, which only the weight of a layer can have there")
    if reasons:
        raise ValueError(f"This model cannot be exported to integers: {'; '.join(reasons)}. Change those settings.")


def _against(quantizer: LearnableFakeQuantize, what: str) -> list[str]:
    low, high = quantizer.code_range
    if quantizer.bitwidth > MOST_BITS:
        return [f"{what} has {quantizer.bitwidth} bits, of at most {MOST_BITS}"]
    if not (low >= -128 and high <= 127) and not (low >= 0 and high <= 255):
        return [f"the codes {low} to {high} of {what} are neither int8 nor uint8"]
    return []
