"""The quantized layers of a checkpoint without the model's code: they can be described, and not run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lfq_lightning.private import plain_name
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.state_dicts import descriptions, other_names, stored_quantizer, without_quantizers


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
    shared: dict[int, tuple[nn.Parameter, LearnableFakeQuantize]] = {}
    again = other_names(saved)
    for name, description in saved.items():
        quantizer = stored_quantizer(name, description, state_dict)
        if quantizer is None or (name in again and description.role != "weight"):
            continue
        owner, _, leaf = name.rpartition(".")
        module, own = _module(root, owner), description.place.parameter
        quantizer.role, quantizer.site, quantizer.place = description.role, description.site, description.place
        if description.site is not None and description.role == "weight" and not description.place.call:
            weight = _weight(module, own)
            if weight is None:
                continue
            # Tied weights are one tensor in the file too.
            kept = nn.Parameter(weight, requires_grad=False), quantizer
            parameter, quantizer = shared.setdefault(weight.data_ptr(), kept)
            module.register_parameter(own, parameter)
        module._modules[leaf] = quantizer
    _tie(root, {place: parameter for place, (parameter, _) in shared.items()})
    return root


def _tie(root: nn.Module, quantized: Mapping[int, nn.Parameter]) -> None:
    """Have modules that hold a quantized weight without a quantizer of their own hold that very parameter."""
    for module in list(root.modules()):
        for name, tensor in list(module._buffers.items()):
            parameter = None if tensor is None or not tensor.numel() else quantized.get(tensor.data_ptr())
            if parameter is not None and tensor is not None and parameter.shape == tensor.shape:
                del module._buffers[name]
                module.register_parameter(name, parameter)


def _module(root: nn.Module, path: str) -> nn.Module:
    module = root
    for name in filter(None, path.split(".")):
        # `add_module` would refuse names that nn.Module has uses for, which a ModuleDict may hold.
        module = module._modules.setdefault(name, nn.Module())  # type: ignore[assignment]
    return module


def _weight(layer: nn.Module, name: str) -> Tensor | None:
    tensors = layer._buffers
    if f"{name}_orig" in tensors and f"{name}_mask" in tensors:  # pruned by torch.nn.utils.prune
        return tensors[f"{name}_orig"] * tensors[f"{name}_mask"]  # type: ignore[operator]
    return tensors.pop(name, None)
