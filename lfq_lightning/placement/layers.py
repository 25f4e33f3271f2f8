"""The kinds of layer that can be quantized, and why another cannot."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.utils import parametrize
from torchmetrics import Metric

from lfq_lightning.placement.computing import has_own_computation
from lfq_lightning.placement.quantized_layer import INPUT, WEIGHT, QuantizedLayer, float_type, tensor_of
from lfq_lightning.private import plain_name
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.rules import Rule
from lfq_lightning.spec import QuantSpec

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TABLES = (nn.Embedding, nn.EmbeddingBag)
QUANTIZABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Embedding)


def candidates(model: nn.Module, rules: Iterable[Rule]) -> tuple[dict[str, nn.Module], dict[str, str], set[str]]:
    """The layers that can be quantized by their type alone, those with weights that cannot, with the reason, and what
    no flow can change that of; each by its first name.
    """
    asked = {rule.match for rule in rules if isinstance(rule.match, type)}
    found: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    refused: set[str] = set()
    inside: set[nn.Module] = set()
    metrics: tuple[str, ...] = ()
    for module, (name, *others) in all_names(model).items():
        if isinstance(module, LearnableFakeQuantize):
            inside.update(module.modules())
        if isinstance(module, Metric):
            metrics += (f"{name}.",)
        if module in inside:
            refused.add(name)
            continue
        layer_type = float_type(module)
        never = _reason_for_ever(module)
        if never is None and all(any(n.startswith(metric) for metric in metrics) for n in (name, *others)):
            never = "it belongs to a metric, which computes by itself"
        if never is not None:
            refused.add(name)
            if isinstance(module, (*QUANTIZABLE, *TABLES)):
                left[name] = never
            continue
        reason = _reason_against(module, layer_type, layer_type in asked)
        if reason is None:
            found[name] = module
        elif reason:
            left[name] = reason
    return found, left, refused


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by their first dotted names."""
    return {plain_name(path): module for path, module in model.named_modules()}


def all_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every dotted name of each module; a shared one has several."""
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(plain_name(path))
    return names


def _reason_for_ever(module: nn.Module) -> str | None:
    """Why a module's weights cannot be quantized, whatever reads them."""
    taken = [name for name in (WEIGHT, INPUT) if name in module._modules and not is_quantized(module, name)]
    if taken and isinstance(module, QUANTIZABLE) and not isinstance(module, QuantizedLayer):
        return f"it has a `{taken[0]}` of its own; give that another name"
    if isinstance(module, TABLES) and module.max_norm is not None:
        return "max_norm changes its weights in forward"
    if isinstance(module, TABLES) and module.sparse:
        return "sparse=True gives its weights sparse gradients"
    return None


def _reason_against(module: nn.Module, layer_type: type[nn.Module], asked: bool) -> str | None:
    """None: its type alone says how it is quantized. Empty: it has no weights to speak of. Else: the reason to name."""
    known = layer_type in QUANTIZABLE or parametrize.is_parametrized(module, "weight")
    if (known and computes_directly(module)) or is_lazy(module) or (asked and issubclass(layer_type, QUANTIZABLE)):
        return None
    if isinstance(module, nn.MultiheadAttention):
        return "attention reads its projections' weights directly"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "attention reads these weights directly"
    if isinstance(module, nn.RNNBase):
        return "recurrent layers need an example batch"
    if isinstance(module, QUANTIZABLE):
        return f"a subclass of a supported type; a Rule({layer_type.__name__}, ...) with the type quantizes it"
    return ""


def computes_directly(module: nn.Module) -> bool:
    """Whether a module is a layer whose forward is torch's own, so that it can be handed its weight and input."""
    return isinstance(module, QUANTIZABLE) and has_own_computation(type(module)) and "forward" not in vars(module)


def is_lazy(module: nn.Module) -> bool:
    """Whether the layer waits for a first batch to know its shapes."""
    lazy = nn.parameter.UninitializedParameter
    return isinstance(module, QUANTIZABLE) and isinstance(module._parameters.get("weight"), lazy)


def check_quantizable(
    name: str, layer: nn.Module, weight: QuantSpec | None, activation: QuantSpec | None, own: str = "weight"
) -> None:
    """Raise unless this layer, or another module's parameter, can take these specifications now."""
    if is_lazy(layer):
        raise ValueError(
            f"Shapes must be known when quantizers are attached. Found the lazy layer {name!r} without a weight: run "
            "one batch through the model first."
        )
    tensor = tensor_of(layer, own)
    if not tensor.is_floating_point():
        raise ValueError(f"A weight must be floating to be quantized. Found {tensor.dtype} in {name!r}: exclude it.")
    if hasattr(tensor, "device_mesh") and not is_quantized(layer, f"{own}_quantizer"):
        raise ValueError(
            f"Quantizers are attached before parameters are sharded. Found a DTensor in {name!r}: make layers in "
            "`__init__` or `setup` and call `fully_shard` in `configure_model`, or call `lfq_lightning.attach` first."
        )
    if weight is not None and weight.axis is not None and not -tensor.ndim <= weight.axis < tensor.ndim:
        raise ValueError(
            f"`axis` must name a dimension of the weight. Found axis {weight.axis} for {name!r} of shape "
            f"{tuple(tensor.shape)}: use {-tensor.ndim} to {tensor.ndim - 1}."
        )
    if weight is not None and weight.group_size is not None and isinstance(layer, TRANSPOSED):
        raise ValueError(
            f"Groups lie along the input dimension, which a transposed convolution has first. Found 'per_group' for "
            f"{name!r}: use 'per_channel' there."
        )
    if activation is not None and activation.axis is not None and activation.axis == 0:
        raise ValueError(
            f"Dimension 0 of an activation is the batch. Found axis 0 for the input of {name!r}: use "
            f"{input_channels(layer)[1] if isinstance(layer, QUANTIZABLE) else -1}."
        )


def is_quantized(module: nn.Module, child: str) -> bool:
    """Whether `attach` has put a quantizer on a module, under this name."""
    quantizer = module._modules.get(child)
    return isinstance(quantizer, LearnableFakeQuantize) and quantizer.site is not None


def input_channels(layer: nn.Module) -> tuple[int, int]:
    """How many channels a layer's input has, and which dimension they are, counted from the last.

    There the features of one sample begin: what stands before is a batch, or nothing where a convolution is given one
    sample, or time and batch in any order, which a Linear treats alike.
    """
    if isinstance(layer, nn.Linear):
        return layer.in_features, -1
    return int(layer.in_channels), 1 - tensor_of(layer, "weight").ndim  # type: ignore[arg-type]
