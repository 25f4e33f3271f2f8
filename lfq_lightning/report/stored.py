"""The quantized layers of a checkpoint without the model's code: they can be described, and not run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lfq_lightning.checkpoint import manifest, without_quantizers
from lfq_lightning.placement.host import INPUT, WEIGHT, plain_name, quantize_layer
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.spec import QuantSpec


def stored_model(state_dict: Mapping[str, Any]) -> nn.Module:
    """Modules with the tensors of a state dict under their names, and quantized layers where it has quantizers.

    Args:
        state_dict: of a quantized model.

    Raises:
        ValueError: if it has no quantizers.
    """
    state_dict = {plain_name(key): value for key, value in state_dict.items()}
    specs = manifest(state_dict)
    if not specs:
        raise ValueError(
            "A report is about a quantized model. Found a checkpoint without quantizers: pass one that a fit with "
            "`QuantizationAwareTraining` has saved."
        )
    root = nn.Module()
    for key, value in without_quantizers(state_dict).items():
        if isinstance(value, Tensor):
            owner, _, name = key.rpartition(".")
            _module(root, owner)._buffers[name] = value
    shared: dict[int, tuple[nn.Parameter, LearnableFakeQuantize | None]] = {}
    for name in dict.fromkeys(quantizer.rpartition(".")[0] for quantizer in specs):
        layer = _module(root, name)
        weight = _weight(layer)
        if weight is None:
            continue
        made = _quantizer(f"{name}.{WEIGHT}", specs, state_dict)
        # Tied weights are one tensor in the file too.
        parameter, made = shared.setdefault(weight.data_ptr(), (nn.Parameter(weight, requires_grad=False), made))
        layer._parameters["weight"] = parameter
        quantize_layer(layer, made, _quantizer(f"{name}.{INPUT}", specs, state_dict))
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


def _quantizer(
    name: str, specs: Mapping[str, QuantSpec], state_dict: Mapping[str, Any]
) -> LearnableFakeQuantize | None:
    if name not in specs:
        return None
    spec = specs[name]
    state = {k.removeprefix(f"{name}."): v for k, v in state_dict.items() if k.startswith(f"{name}.")}
    channels = None if spec.granularity == "per_tensor" else state["scale"].numel()
    axis = state["_extra_state"].get("axis")
    made = LearnableFakeQuantize.from_spec(spec, channels, weight=name.endswith(WEIGHT), axis=axis)
    made.load_state_dict(state)
    return made
