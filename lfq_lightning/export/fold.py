"""BatchNorm folded into the layers before it: into their scales and biases, so that no integer is rounded again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lfq_lightning.export.integers import IntegerInput, IntegerWeight, own_layers
from lfq_lightning.placement.layers import QUANTIZABLE, TRANSPOSED
from lfq_lightning.placement.meeting import input_name
from lfq_lightning.placement.quantized_layer import WEIGHT, QuantizedLayer, float_type
from lfq_lightning.private import BatchNorm, tree_leaves
from lfq_lightning.running import explained

MOST_QUANTA = 2.0**31 - 1  # back ends store a bias in 32 bits, in units of input scale times weight scale


def fold_batch_norm(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    example_kwargs: dict[str, Any] | None = None,
    bytes_hold: bool = False,
    mirrored: bool = True,
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
        bytes_hold: whether codes of fewer than 8 bits that meet a quantized input are stored a byte each, in which a
            negated one finds room.
        mirrored: whether the zero point of a weight may leave 0 where a negated code has none. Back ends of programs
            pass zero points of weights over.
    """
    room = _Room(bytes_hold, mirrored)
    folded: list[str] = []
    left_out: list[tuple[nn.Module, str]] = []
    biased: list[_Product] = []
    own = own_layers(model)
    for maker, norm in _pairs(model, example_inputs, example_kwargs or {}):
        if isinstance(maker, _Product):
            done = _fold_product(model, maker, norm, room)
            biased += [maker] * done
        else:
            done = maker in own and _fold(own[maker], norm, room)
        if not done:
            continue
        folded.append(norm.name)
        if _is_plain(norm.holder) and not isinstance(maker, _Product):
            # In place: the module may be registered under several names, or be called from a list.
            for held in (
                *dict(norm.holder.named_parameters(recurse=False)),
                *dict(norm.holder.named_buffers(recurse=False)),
            ):
                delattr(norm.holder, held)
            norm.holder.__class__ = nn.Identity
        else:
            left_out.append((norm.holder, norm.buffer))
    if left_out:
        _have_forward_follow(model, left_out, biased)
    for layer in own_layers(model).values():
        _silence(layer)
    return folded


@dataclass(frozen=True)
class _Room:
    """What negated codes may have; see `fold_batch_norm`."""

    bytes_hold: bool
    mirrored: bool


@dataclass
class _Product:
    """A call in a module's own code that reads a weight.

    Args:
        weight: its integers.
        bias: what the call adds.
    """

    weight: IntegerWeight
    bias: Tensor | None


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


def _fold(layer: QuantizedLayer, norm: _Norm, room: _Room) -> bool:
    weight, axis = layer.weight_quantizer, int(isinstance(layer, TRANSPOSED))
    if not isinstance(weight, IntegerWeight) or (axis == 1 and layer.groups != 1):
        return False  # output channels of grouped transposed convolutions are spread over both dimensions
    bias = layer.bias if isinstance(layer.bias, Tensor) else None
    found = _folded(weight, bias, norm, axis, layer.input_quantizer, room)
    if found is None:
        return False
    made, bias = found
    setattr(layer, WEIGHT, made)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return True


def _fold_product(model: nn.Module, product: _Product, norm: _Norm, room: _Room) -> bool:
    held = [
        (module, name)
        for module in model.modules()
        for name, child in module._modules.items()
        if child is product.weight
    ]
    (holder, name), *others = held
    activation = holder._modules.get(input_name(name.removesuffix("_quantizer")))
    found = None if others else _folded(product.weight, product.bias, norm, 0, activation, room)
    if found is None:
        return False
    product.weight, bias = found
    product.weight.register_buffer("bias", bias)
    holder._modules[name] = product.weight
    return True


def _folded(
    weight: IntegerWeight, bias: Tensor | None, norm: _Norm, axis: int, activation: nn.Module | None, room: _Room
) -> tuple[IntegerWeight, Tensor] | None:
    """A weight and a bias that stand for theirs and a normalization; None where they cannot."""
    gamma = torch.ones_like(norm.variance) if norm.weight is None else norm.weight
    factor = gamma.double() / (norm.variance.double() + norm.eps).sqrt()
    total = torch.zeros_like(factor) if bias is None else bias.double()
    total = (total - norm.mean.double()) * factor
    total = (total if norm.bias is None else total + norm.bias.double()).float()
    made = weight.scaled(factor.float(), axis, room.bytes_hold and isinstance(activation, IntegerInput), room.mirrored)
    if made is None:
        return None
    too_many, idle = _out_of_range(activation, made, total, axis)
    if bool((too_many & ~idle).any()):
        return None  # a factor so small that its channel's bias finds no room in 32 bits
    return _with_room(made, too_many & idle, axis), total


def _silence(layer: QuantizedLayer) -> None:
    """Give output channels that say nothing a scale in whose units their bias fits 32 bits."""
    weight, axis = layer.weight_quantizer, int(isinstance(layer, TRANSPOSED))
    bias = getattr(layer, "bias", None)
    if not isinstance(weight, IntegerWeight) or not isinstance(bias, Tensor) or float_type(layer) not in QUANTIZABLE:
        return
    if axis == 1 and layer.groups != 1:
        return
    too_many, idle = _out_of_range(layer.input_quantizer, weight, bias, axis)
    setattr(layer, WEIGHT, _with_room(weight, too_many & idle, axis))


def _with_room(weight: IntegerWeight, channels: Tensor, axis: int) -> IntegerWeight:
    """The weight with zeros in channels that say nothing, and a scale in whose units their bias fits 32 bits."""
    return (weight.silenced(channels, axis) or weight) if bool(channels.any()) else weight


def _out_of_range(quantizer: nn.Module | None, weight: IntegerWeight, bias: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Output channels whose bias is beyond 32 bits, and those in which nothing but the bias shows in float32."""
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


def _pairs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str | _Product, _Norm]]:
    """Layers, by name, and calls, and the normalizations that alone read what they give; each used once."""
    names = {module: name for name, module in model.named_modules()}
    watch = _Watch(names)
    layers = [module for module in names if isinstance(module, QuantizedLayer)]
    of_layers: set[nn.Module | None] = {layer.weight_quantizer for layer in layers}
    weights = [module for module in names if isinstance(module, IntegerWeight) and module not in of_layers]
    # Before the user's own hooks, which may change or read what a layer gives.
    handles = [layer.register_forward_hook(watch.see_layer, prepend=True) for layer in layers]
    handles += [weight.register_forward_hook(watch.see_weight) for weight in weights]
    try:
        rule = f"{type(model).__name__} must take `example_inputs`"
        with torch.no_grad(), watch, explained(rule, args or kwargs, "as `forward` does"):
            result = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    returned = {id(leaf) for leaf in tree_leaves(result)}
    means = [id(norm.mean) for _, norm in watch.norms]
    found: list[tuple[str | _Product, _Norm]] = []
    for given, norm in watch.norms:
        maker = watch.outputs[given]
        used = watch.used.count(maker.weight if isinstance(maker, _Product) else maker)
        if means.count(id(norm.mean)) == used == watch.count[given] == 1 and given not in returned:
            found.append((maker, norm))
    return found


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


_PRODUCTS = {F.linear, F.conv1d, F.conv2d, F.conv3d}  # input, weight and bias first, and output channels first


class _Watch(TorchFunctionMode):
    """Notes the normalizations of what layers and products give, and counts the operations that read each of these.

    Args:
        names: of the model's modules.

    Attributes:
        outputs: what gave a tensor, by the tensor's identity.
        used: the layers, by name, and the weights in order of use.
        norms: the identity of what was normalized, and how.
    """

    def __init__(self, names: dict[nn.Module, str]) -> None:
        super().__init__()
        self.outputs: dict[int, str | _Product] = {}
        self.used: list[str | IntegerWeight] = []
        self.count: dict[int, int] = {}
        self.norms: list[tuple[int, _Norm]] = []
        self._names = names
        self._kept: list[Any] = []  # so that no address is used twice
        self._weights: dict[int, IntegerWeight] = {}
        self._holders = {
            id(buffer): (module, own, name) for module, name in names.items() for own, buffer in module._buffers.items()
        }

    def see_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A hook on layers."""
        self.used.append(self._names[module])
        self._kept.append(output)
        if isinstance(output, Tensor) and _channels_second(module, output):
            self.outputs[id(output)] = self._names[module]

    def see_weight(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """A hook on weights that modules' own code reads."""
        assert isinstance(module, IntegerWeight)
        self.used.append(module)
        self._kept.append(output)
        self._weights[id(output)] = module

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is F.batch_norm:
            self._note_norm(*args, **kwargs)
        elif function in _PRODUCTS:
            self._note_product(function, result, args, kwargs)
        name = getattr(function, "__name__", "")
        # Looking at a tensor's shape or grad mode (BatchNorm checks its input's dimensions) is not reading it.
        looks = name in ("dim", "size", "__get__", "numel") and not isinstance(result, Tensor)
        if not looks:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and id(tensor) in self.outputs:
                    self.count[id(tensor)] = self.count.get(id(tensor), 0) + 1
        return result

    def _note_product(self, function: Any, result: Tensor, args: Any, kwargs: Any) -> None:
        weight, bias = _weight_and_bias(args, kwargs)
        own = self._weights.get(id(weight))
        if own is not None and result.ndim == own.codes.ndim:
            self._kept.append(result)
            self.outputs[id(result)] = _Product(own, bias)

    def _note_norm(self, *args: Any, **kwargs: Any) -> None:
        given = _arguments(args, kwargs)
        mean, variance = given["running_mean"], given["running_var"]
        # Without running statistics, its factors are each batch's own.
        if id(given["input"]) in self.outputs and id(mean) in self._holders and not given["training"]:
            holder, own, name = self._holders[id(mean)]
            shown = name if isinstance(holder, BatchNorm) else ".".join(filter(None, (name, own)))
            norm = _Norm(shown, holder, own, mean, variance, given["weight"], given["bias"], given["eps"])
            self.norms.append((id(given["input"]), norm))


_BATCH_NORM = inspect.signature(F.batch_norm)


def _arguments(args: Any, kwargs: Any) -> dict[str, Any]:
    """Those of `F.batch_norm`, by name."""
    bound = _BATCH_NORM.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _weight_and_bias(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Those of a product."""
    return (
        args[1] if len(args) > 1 else kwargs.get("weight"),
        args[2] if len(args) > 2 else kwargs.get("bias"),
    )


# ---- a forward that follows -----------------------------------------------------------------------------------------


def _have_forward_follow(model: nn.Module, left_out: list[tuple[nn.Module, str]], biased: Sequence[_Product]) -> None:
    """Have a model's forward leave normalizations out, and give products their biases, wherever its code calls them."""
    kind: type[nn.Module] = type(model)
    given: dict[int, tuple[Any, Tensor]] = {}

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        given[id(output)] = output, module.bias  # type: ignore[assignment]

    for product in biased:
        product.weight.register_forward_hook(note)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given.clear()
        with _Following(left_out, given):
            return kind.forward(self, *args, **kwargs)

    members = {"__module__": kind.__module__, "forward": functools.wraps(kind.forward)(forward)}
    model.__class__ = type(kind.__name__, (kind,), members)


class _Following(TorchFunctionMode):
    def __init__(self, left_out: list[tuple[nn.Module, str]], given: Mapping[int, tuple[Any, Tensor]]) -> None:
        super().__init__()
        self._left_out, self._given = left_out, given

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm:
            given = _arguments(args, kwargs)
            if any(given["running_mean"] is holder._buffers[own] for holder, own in self._left_out):
                return given["input"]
        elif function in _PRODUCTS:
            _, bias = self._given.get(id(_weight_and_bias(args, kwargs)[0]), (None, None))
            if bias is not None and len(args) > 2:
                args = (*args[:2], bias, *args[3:])
            elif bias is not None:
                kwargs = kwargs | {"bias": bias}
        return function(*args, **kwargs)
