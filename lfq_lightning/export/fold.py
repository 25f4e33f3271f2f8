"""BatchNorm folded into the layers before it: into their scales and biases, so that no integer is rounded again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lfq_lightning.export.integers import IntegerInput, IntegerWeight, own_layers
from lfq_lightning.placement.layers import QUANTIZABLE, TRANSPOSED
from lfq_lightning.placement.quantized_layer import WEIGHT, QuantizedLayer, float_type
from lfq_lightning.private import BatchNorm, tree_leaves
from lfq_lightning.running import explained

MOST_QUANTA = 2.0**31 - 1  # back ends store a bias in 32 bits, in units of input scale times weight scale


def fold_batch_norm(
    model: nn.Module, example_inputs: tuple[Any, ...], example_kwargs: dict[str, Any] | None = None
) -> list[str]:
    """Fold every BatchNorm that alone follows a layer with integer weights, in place, and return their names.

    With f = gamma / sqrt(variance + eps): the scales of each output channel are multiplied by |f|, the sign of f goes
    into the integers, and the bias becomes (bias - mean) f + beta. (Jacob et al. 2018, arXiv 1712.05877, section 3.2,
    without the second rounding.)

    Args:
        model: what `integer_copy` made, in eval mode.
        example_inputs: positional inputs of the model, to see what follows what.
        example_kwargs: its keyword inputs.
    """
    folded = []
    own = own_layers(model)
    for layer_name, norm_name in _pairs(model, example_inputs, example_kwargs or {}):
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        assert isinstance(layer, QuantizedLayer)
        assert isinstance(norm, BatchNorm)
        if layer_name in own and _fold(layer, norm):
            # In place: the module may be registered under several names, or be called from a list.
            for held in (*dict(norm.named_parameters(recurse=False)), *dict(norm.named_buffers(recurse=False))):
                delattr(norm, held)
            norm.__class__ = nn.Identity  # type: ignore[assignment]
            folded.append(norm_name)
    for layer in own_layers(model).values():
        _silence(layer)
    return folded


def _fold(layer: QuantizedLayer, norm: BatchNorm) -> bool:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gamma = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    factor = gamma.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight, axis = layer.weight_quantizer, int(isinstance(layer, TRANSPOSED))
    if not isinstance(weight, IntegerWeight) or (axis == 1 and layer.groups != 1):
        return False  # output channels of grouped transposed convolutions are spread over both dimensions
    bias = layer.bias.double() if isinstance(layer.bias, Tensor) else torch.zeros_like(factor)
    bias = (bias - norm.running_mean.double()) * factor
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


def _pairs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, str]]:
    """Names of layers and of the BatchNorms that are the only readers of what they give; each used once."""
    calls: list[tuple[str, nn.Module, list[int]]] = []
    outputs: dict[int, str] = {}
    kept: list[Tensor] = []  # so that no address is used twice
    names = {module: name for name, module in model.named_modules()}

    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append((names[module], module, [id(a) for a in args if isinstance(a, Tensor)]))
        if isinstance(output, Tensor):
            kept.append(output)
            if _channels_second(module, output):
                outputs[id(output)] = names[module]

    # Before the user's own hooks, which may change or read what a layer gives.
    watched = [m for m in names if isinstance(m, (QuantizedLayer, BatchNorm))]
    handles = [m.register_forward_hook(see, prepend=True) for m in watched]
    reads = _Reads(outputs)
    try:
        rule = f"{type(model).__name__} must take `example_inputs`"
        with torch.no_grad(), reads, explained(rule, args or kwargs, "as `forward` does"):
            result = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    returned = {id(leaf) for leaf in tree_leaves(result)}
    found = []
    for name, module, inputs in calls:
        if not isinstance(module, BatchNorm) or not _is_plain(module) or module.running_mean is None:
            continue  # without running statistics, its factors are each batch's own
        once = sum(call[0] == name for call in calls) == 1
        if once and inputs and inputs[0] in outputs:
            layer = outputs[inputs[0]]
            used = sum(call[0] == layer for call in calls) == 1 and inputs[0] not in returned
            if used and reads.count.get(inputs[0], 0) == 1:
                found.append((layer, name))
    return found


def _is_plain(norm: BatchNorm) -> bool:
    """Whether its forward is torch's: a subclass may do more, such as an activation."""
    return type(norm).forward in (BatchNorm.forward, nn.SyncBatchNorm.forward) and "forward" not in vars(norm)


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


class _Reads(torch.overrides.TorchFunctionMode):
    """Counts the operations that read each watched tensor."""

    def __init__(self, watched: dict[int, str]) -> None:
        super().__init__()
        self.watched, self.count = watched, dict[int, int]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        # Looking at a tensor's shape or grad mode (BatchNorm checks its input's dimensions) is not reading it.
        looks = name in ("dim", "size", "__get__", "numel") and not isinstance(result, Tensor)
        if not looks:
            for tensor in tree_leaves((args, kwargs or {})):
                if isinstance(tensor, Tensor) and id(tensor) in self.watched:
                    self.count[id(tensor)] = self.count.get(id(tensor), 0) + 1
        return result
