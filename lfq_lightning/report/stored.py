"""The quantized layers of a checkpoint without the model's code: they can be described, and not run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lfq_lightning.placement.host import plain_name, quantize_layer
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.quantizer.saved import Description, site_in_model
from lfq_lightning.state_dicts import descriptions, spec_of, without_quantizers


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
    layers: dict[str, dict[str | None, LearnableFakeQuantize]] = {}
    for name, description in saved.items():
        made = _quantizer(name, description, state_dict)
        owner, _, leaf = name.rpartition(".")
        if description.site is None and made is not None:
            _module(root, owner)._modules[leaf] = made
        elif made is not None:
            layers.setdefault(site_in_model(name, description.site), {})[description.role] = made
    shared: dict[int, tuple[nn.Parameter, LearnableFakeQuantize | None]] = {}
    for name, by_role in layers.items():
        layer = _module(root, name)
        weight = _weight(layer)
        if weight is None:
            continue
        # Tied weights are one tensor in the file too.
        kept = nn.Parameter(weight, requires_grad=False), by_role.get("weight")
        layer._parameters["weight"], made = shared.setdefault(weight.data_ptr(), kept)
        quantize_layer(layer, made, by_role.get("input"))
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


def _quantizer(name: str, description: Description, state_dict: Mapping[str, Any]) -> LearnableFakeQuantize | None:
    spec = spec_of(name, description)
    if spec is None:
        return None  # made without one, by the user's own code
    state = {k.removeprefix(f"{name}."): v for k, v in state_dict.items() if k.startswith(f"{name}.")}
    try:
        channels = None if spec.granularity == "per_tensor" else state["scale"].numel()
        weight, axis = description.role == "weight", description.axis
        made = LearnableFakeQuantize.from_spec(spec, channels, weight=weight, axis=axis)
        made.load_state_dict(state)
    except (KeyError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"A checkpoint must hold all of a quantizer. Found another state for {name} ({error}): load it with the "
            "version of lfq_lightning that saved it."
        ) from error
    return made
