"""The quantized layers of a checkpoint without the model's code: they can be described, and not run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lfq_lightning.placement.quantized_layer import plain_name, quantize_layer
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.state_dicts import by_site, descriptions, stored_quantizer, without_quantizers


def stored_model(state_dict: Mapping[str, Any]) -> nn.Module:
    """Modules with the tensors of a state dict under their names, and quantized layers where it has quantizers.

    Args:
        state_dict: of a quantized model.

    Raises:
        ValueError: if it has no quantizers.
    """
    state_dict = {plain_name(key): value for key, value in state_dict.items()}
    saved = descriptions(state_dict)
    if not saved:
        raise ValueError(
            "A report is about a quantized model. Found a checkpoint without quantizers: pass one that a fit with "
            "`QuantizationAwareTraining` has saved."
        )
    root = nn.Module()
    for key, value in without_quantizers(state_dict).items():
        if isinstance(value, Tensor):
            owner, _, name = key.rpartition(".")
            _module(root, owner)._buffers[name] = value
    made = {name: stored_quantizer(name, description, state_dict) for name, description in saved.items()}
    for name, quantizer in made.items():
        if saved[name].site is None and quantizer is not None:
            owner, _, leaf = name.rpartition(".")
            _module(root, owner)._modules[leaf] = quantizer
    shared: dict[int, tuple[nn.Parameter, LearnableFakeQuantize | None]] = {}
    for site, names in by_site(saved).items():
        layer, by_role = _module(root, site), {role: made[name] for role, name in names.items()}
        weight = _weight(layer)
        if weight is None:
            continue
        # Tied weights are one tensor in the file too.
        kept = nn.Parameter(weight, requires_grad=False), by_role.get("weight")
        parameter, quantizer = shared.setdefault(weight.data_ptr(), kept)
        layer.register_parameter("weight", parameter)
        quantize_layer(layer, quantizer, by_role.get("input"))
    return root


def _module(root: nn.Module, path: str) -> nn.Module:
    module = root
    for name in filter(None, path.split(".")):
        # `add_module` would refuse names that nn.Module has uses for, which a ModuleDict may hold.
        module = module._modules.setdefault(name, nn.Module())  # type: ignore[assignment]
    return module


def _weight(layer: nn.Module) -> Tensor | None:
    tensors = layer._buffers
    if "weight_orig" in tensors and "weight_mask" in tensors:  # pruned by torch.nn.utils.prune
        return tensors["weight_orig"] * tensors["weight_mask"]  # type: ignore[operator]
    return tensors.pop("weight", None)
