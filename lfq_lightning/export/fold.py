"""BatchNorm folded into the layers before it: into their scales and biases, so that no integer is rounded again."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lfq_lightning.export.integers import IntegerInput, IntegerWeight, own_layers
from lfq_lightning.placement.layers import QUANTIZABLE, TRANSPOSED
from lfq_lightning.placement.quantized_layer import WEIGHT, QuantizedLayer, float_type
from lfq_lightning.private import BatchNorm, tree_leaves
from lfq_lightning.running import explained

MOST_QUANTA = 2.0**31 - 1  # back ends store a bias in 32 bits, in units of input scale times weight scale


def fold_batch_norm(
    model: nn.Module, example_inputs: tuple[Any, ...], example_kwargs: dict[str, Any] | None = None
) -> list[str]:
    """Fold every normalization that alone follows a layer with integer weights, in place, and return their names.

    Which one follows which layer shows in the calls of `F.batch_norm`, whatever module makes them. With f = gamma /
    sqrt(variance + eps): the scales of each output channel are multiplied by |f|, the sign of f goes into the integers,
    and the bias becomes (bias - mean) f + beta. (Jacob et al. 2018, arXiv 1712.05877, section 3.2, without the second
    rounding.)

    Args:
        model: what `integer_copy` made, in eval mode.
        example_inputs: positional inputs of the model, to see what follows what.
        example_kwargs: its keyword inputs.
    """
    folded, skipped = [], []
    own = own_layers(model)
    for layer_name, norm in _pairs(model, example_inputs, example_kwargs or {}):
        layer = model.get_submodule(layer_name)
        assert isinstance(layer, QuantizedLayer)
        if layer_name in own and _fold(layer, norm):
            folded.append(norm.name)
            if _is_plain(norm.holder):
                # In place: the module may be registered under several names, or be called from a list.
                for held in (*dict(norm.holder.named_parameters(recurse=False)), *dict(norm.holder.named_buffers())):
                    delattr(norm.holder, held)
                norm.holder.__class__ = nn.Identity
            else:
                skipped.append((norm.holder, norm.buffer))
    if skipped:
        _skip(model, skipped)
    for layer in own_layers(model).values():
        _silence(layer)
    return folded


@dataclass
class _Norm:
    """One call of `F.batch_norm` with running statistics.

    Args:
        name: by which it is shown.
        holder: the module that has the running mean.
        buffer: under which name it does.
    """

    name: str
    holder: nn.Module
    buffer: str
    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def _fold(layer: QuantizedLayer, norm: _Norm) -> bool:
    gamma = torch.ones_like(norm.variance) if norm.weight is None else norm.weight
    factor = gamma.double() / (norm.variance.double() + norm.eps).sqrt()
    weight, axis = layer.weight_quantizer, int(isinstance(layer, TRANSPOSED))
    if not isinstance(weight, IntegerWeight) or (axis == 1 and layer.groups != 1):
        return False  # output channels of grouped transposed convolutions are spread over both dimensions
    bias = layer.bias.double() if isinstance(layer.bias, Tensor) else torch.zeros_like(factor)
    bias = (bias - norm.mean.double()) * factor
    bias = (bias if norm.bias is None else bias + norm.bias.double()).float()
    made = weight.scaled(factor.float(), axis)
    if made is None:
        return False
    too_many, idle = _out_of_range(layer, made, bias, axis)
    if bool((too_many & ~idle).any()):
        return False  # a factor so small that its channel's bias finds no room in 32 bits
    setattr(layer, WEIGHT, made)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return True


def _silence(layer: QuantizedLayer) -> None:
    """Give output channels that say nothing a scale in whose units their bias fits 32 bits."""
    weight, axis = layer.weight_quantizer, int(isinstance(layer, TRANSPOSED))
    bias = getattr(layer, "bias", None)
    if not isinstance(weight, IntegerWeight) or not isinstance(bias, Tensor) or float_type(layer) not in QUANTIZABLE:
        return
    if axis == 1 and layer.groups != 1:
        return
    too_many, idle = _out_of_range(layer, weight, bias, axis)
    if bool((too_many & idle).any()):
        setattr(layer, WEIGHT, weight.silenced(too_many & idle, axis) or weight)


def _out_of_range(layer: QuantizedLayer, weight: IntegerWeight, bias: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Output channels whose bias is beyond 32 bits, and those in which nothing but the bias shows in float32."""
    quantizer = layer.input_quantizer
    nothing = bias.new_zeros(len(bias), dtype=torch.bool)
    if not isinstance(quantizer, IntegerInput):
        return nothing, nothing
    other = [d for d in range(weight.codes.ndim) if d != axis]
    scale = weight.wide(weight.scale).double().expand(weight.codes.shape)
    ends = torch.stack([quantizer.low, quantizer.high]).double().abs().max()
    largest = (weight.centred.double().abs() * scale).sum(other) * ends
    quantum = scale.amax(other) * quantizer.scale.double().min()
    size = bias.double().abs()
    return size > MOST_QUANTA * quantum, largest <= size * torch.finfo(torch.float32).eps / 4


def _pairs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, _Norm]]:
    """Names of layers and the normalizations that are the only readers of what they give; each used once."""
    calls: list[str] = []
    names = {module: name for name, module in model.named_modules()}
    watch = _Watch(names)

    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append(names[module])
        if isinstance(output, Tensor):
            watch.kept.append(output)
            if _channels_second(module, output):
                watch.outputs[id(output)] = names[module]

    # Before the user's own hooks, which may change or read what a layer gives.
    layers = [module for module in names if isinstance(module, QuantizedLayer)]
    handles = [layer.register_forward_hook(see, prepend=True) for layer in layers]
    try:
        rule = f"{type(model).__name__} must take `example_inputs`"
        with torch.no_grad(), watch, explained(rule, args or kwargs, "as `forward` does"):
            result = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    returned = {id(leaf) for leaf in tree_leaves(result)}
    means = [id(norm.mean) for _, norm in watch.norms]
    return [
        (watch.outputs[given], norm)
        for given, norm in watch.norms
        if means.count(id(norm.mean)) == calls.count(watch.outputs[given]) == watch.count[given] == 1
        and given not in returned
    ]


def _is_plain(norm: nn.Module) -> bool:
    """Whether a module's forward is torch's BatchNorm and no more: a subclass may add an activation."""
    own = type(norm).forward in (BatchNorm.forward, nn.SyncBatchNorm.forward) and "forward" not in vars(norm)
    return isinstance(norm, BatchNorm) and own


def _channels_second(module: nn.Module, output: Tensor) -> bool:
    """Whether the layer's output is torch's own, of which BatchNorm takes the output channels for its channels.

    A Linear in a sequence has them last; a subclass may use its weight in another way.
    """
    kind = float_type(module)
    if not isinstance(module, QuantizedLayer) or kind not in QUANTIZABLE or "forward" in vars(module):
        return False
    if kind is nn.Embedding:
        return False
    return output.ndim == (2 if kind is nn.Linear else module.weight.ndim)


_BATCH_NORM = inspect.signature(F.batch_norm)


class _Watch(TorchFunctionMode):
    """Notes the normalizations of layers' outputs, and counts the operations that read each of these.

    Args:
        names: of the model's modules.

    Attributes:
        outputs: the layer that gave a tensor, by the tensor's identity.
        norms: the identity of what was normalized, and how.
    """

    def __init__(self, names: dict[nn.Module, str]) -> None:
        super().__init__()
        self.outputs: dict[int, str] = {}
        self.kept: list[Tensor] = []  # so that no address is used twice
        self.count: dict[int, int] = {}
        self.norms: list[tuple[int, _Norm]] = []
        self._holders = {
            id(buffer): (module, own, name) for module, name in names.items() for own, buffer in module._buffers.items()
        }

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is F.batch_norm:
            self._note(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        # Looking at a tensor's shape or grad mode (BatchNorm checks its input's dimensions) is not reading it.
        looks = name in ("dim", "size", "__get__", "numel") and not isinstance(result, Tensor)
        if not looks:
            for tensor in tree_leaves((args, kwargs or {})):
                if isinstance(tensor, Tensor) and id(tensor) in self.outputs:
                    self.count[id(tensor)] = self.count.get(id(tensor), 0) + 1
        return result

    def _note(self, *args: Any, **kwargs: Any) -> None:
        bound = _BATCH_NORM.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        mean, variance = given["running_mean"], given["running_var"]
        # Without running statistics, its factors are each batch's own.
        if id(given["input"]) in self.outputs and id(mean) in self._holders and not given["training"]:
            holder, own, name = self._holders[id(mean)]
            shown = name if isinstance(holder, BatchNorm) else ".".join(filter(None, (name, own)))
            norm = _Norm(shown, holder, own, mean, variance, given["weight"], given["bias"], given["eps"])
            self.norms.append((id(given["input"]), norm))


def _skip(model: nn.Module, norms: list[tuple[nn.Module, str]]) -> None:
    """Have a model's forward leave normalizations out, wherever its code calls them."""
    kind: type[nn.Module] = type(model)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Skipping(norms):
            return kind.forward(self, *args, **kwargs)

    members = {"__module__": kind.__module__, "forward": functools.wraps(kind.forward)(forward)}
    model.__class__ = type(kind.__name__, (kind,), members)


class _Skipping(TorchFunctionMode):
    def __init__(self, norms: list[tuple[nn.Module, str]]) -> None:
        super().__init__()
        self._norms = norms

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm:
            given = _BATCH_NORM.bind(*args, **kwargs).arguments
            if any(given["running_mean"] is holder._buffers[own] for holder, own in self._norms):
                return given["input"]
        return function(*args, **kwargs)
