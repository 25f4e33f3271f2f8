"""A quantized model in torch's own modules and operations, with constant weights, scales and zero points."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lfq_lightning.checking import check_flags, check_model
from lfq_lightning.export.exportable import own_copy
from lfq_lightning.export.integers import IntegerWeight
from lfq_lightning.placement.layers import TABLES, TRANSPOSED
from lfq_lightning.placement.meeting import (
    MeetsOperations,
    input_name,
    leave_operations,
    meeting_modules,
    weight_name,
)
from lfq_lightning.placement.points import points
from lfq_lightning.placement.quantized_layer import (
    float_type,
    let_fast_path,
    quantized_layers,
    replace_placed,
    restore_layer,
)
from lfq_lightning.quantizer import LearnableFakeQuantize


def freeze(model: nn.Module, integers: bool = False) -> nn.Module:
    """A copy of a quantized model that computes the same with constants, and needs only torch to run.

    Layers are of their float types again, and `weight` holds the quantized values: whoever reads it, in forward or to
    save it, has what was trained. What computed it (`weight_norm`, pruning) is gone. A layer's input is quantized by
    its child `quantize_input`, plain operations in a `torch.fx.GraphModule`. Where a module's own code quantizes what
    it reads by a function, as attention does when inputs are quantized, it needs this package to run. The copy goes
    through `torch.export`, `torch.jit.trace` and pickle. It computes in eval mode whatever the model's phase was.

    Args:
        model: a model with quantizers whose qparams are set; it is not changed.
        integers: keep beside each weight, as buffers, its integers (`weight_codes`), scales and zero points.

    Returns:
        The copy, in eval mode, without quantizers.

    Raises:
        ValueError: if there are no quantizers, one has never seen data, or a subclass of a layer takes several inputs.

    Example:
        >>> import torch, lfq_lightning as lfq
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> _ = lfq.attach(model, weight=4, activation=8)
        >>> lfq.calibrate(model, [torch.randn(8, 4)])
        >>> frozen = lfq.freeze(model)
        >>> x = torch.randn(3, 4)
        >>> type(frozen[0]).__name__, torch.equal(frozen(x), model.eval()(x))
        ('Linear', True)
        >>> frozen[0].weight.unique().numel() <= 16 * 2
        True
    """
    check_model(model)
    check_flags(integers=integers)
    frozen = own_copy(model)
    layers = quantized_layers(frozen)
    inputs = {name: layer.input_quantizer for name, layer in layers.items() if layer.input_quantizer is not None}
    for name in inputs:
        _check_one_input(name, layers[name])
    weights = _weights(frozen)
    for quantized in layers.values():
        restore_layer(quantized)
    _write_weights(frozen, weights, integers)
    read = {reads.owner for module in meeting_modules(frozen).values() for reads in module.met_reads}
    for name, activation in inputs.items():
        if not isinstance(layers[name], TABLES):  # which is given integers
            _quantize_input(layers[name], activation)
        if layers[name] in read:  # by another module's code
            layers[name].add_module(input_name("weight"), Constant(activation))
    _keep_constants(frozen)
    replace_placed(frozen, _in_plain_operations)
    _leave_what_is_constant(frozen)
    return frozen


# ---- weights --------------------------------------------------------------------------------------------------------


class _Weight(NamedTuple):
    """A parameter of a module, its quantizer, and its quantized values, which tied ones share."""

    module: nn.Module
    name: str
    quantizer: LearnableFakeQuantize
    value: nn.Parameter


def _weights(frozen: nn.Module) -> list[_Weight]:
    """The quantized parameters, under every name that a quantizer has."""
    made = {
        point.quantizer: nn.Parameter(point.quantizer.quantized(point.whole_parameter()).detach(), requires_grad=False)
        for point in points(frozen).values()
        if point.has_parameter
    }
    return [
        _Weight(module, name.removesuffix("_quantizer"), child, made[child])
        for module in frozen.modules()
        for name, child in module._modules.items()
        if isinstance(child, LearnableFakeQuantize) and child in made
    ]


def _write_weights(frozen: nn.Module, weights: list[_Weight], integers: bool) -> None:
    """Have parameters hold their quantized values."""
    read: dict[int, nn.Parameter] = {}  # by functions, which do not say under which name
    for module, name, quantizer, value in weights:
        before = getattr(module, name)
        if quantizer.place.readers:
            read[id(before)] = value
        if integers:
            kept = IntegerWeight(quantizer, before.detach())
            for part in ("codes", "scale", "zero_point"):
                module.register_buffer(f"{name}_{part}", getattr(kept, part))
        module._modules.pop(weight_name(name), None)
        _fix(module, name, value)
    for module in frozen.modules():
        for name, own in module._parameters.items():
            if own is not None and id(own) in read:
                module._parameters[name] = read[id(own)]


def _fix(module: nn.Module, name: str, value: nn.Parameter) -> None:
    """Have a module hold a value that was a parameter, or was computed from others."""
    if parametrize.is_parametrized(module):
        # Torch's own way would take the parametrizations off the model that this is a copy of.
        computed = {other: getattr(module, other).detach() for other in module.parametrizations}  # type: ignore[union-attr]
        module.__class__ = type(module).__bases__[0]
        del module._modules["parametrizations"]
        for other, tensor in computed.items():
            module.register_parameter(other, nn.Parameter(tensor, requires_grad=False))
    for key, hook in list(module._forward_pre_hooks.items()):
        if getattr(hook, "name", getattr(hook, "_tensor_name", None)) == name and isinstance(hook, _COMPUTES):
            del module._forward_pre_hooks[key]
            for ending in ("g", "v", "u", "orig", "mask"):
                module._parameters.pop(f"{name}_{ending}", None)
                module._buffers.pop(f"{name}_{ending}", None)
    module.__dict__.pop(name, None)
    module._buffers.pop(name, None)
    module._parameters[name] = value


_COMPUTES = (WeightNorm, SpectralNorm, prune.BasePruningMethod)  # hooks that make a weight before each forward


# ---- inputs ---------------------------------------------------------------------------------------------------------


def _check_one_input(name: str, layer: nn.Module) -> None:
    parameters = list(inspect.signature(float_type(layer).forward).parameters.values())[1:]
    if not isinstance(layer, TRANSPOSED) and len(parameters) != 1:
        raise ValueError(
            f"`freeze` quantizes the one input of a layer. Found {', '.join(map(str, parameters))} for {name!r}: use "
            "`export_pt2` or `export_onnx`, which see what it is given."
        )


def _quantize_input(layer: nn.Module, quantizer: LearnableFakeQuantize) -> None:
    """Have a layer's first input pass through a graph, which torch can run: a child, and a hook before `forward`."""
    first = list(inspect.signature(type(layer).forward).parameters)[1]

    def write(graph: Graph, quantize: Callable[[Node], Node]) -> Any:
        _, args, kwargs = (graph.placeholder(name) for name in ("module", "args", "kwargs"))
        named = graph.call_method("pop", (kwargs, first, None))
        every = graph.call_function(operator.add, (args, (named,)))
        rest = graph.call_function(operator.getitem, (args, slice(1, None)))
        given = quantize(graph.call_function(operator.getitem, (every, 0)))
        return graph.call_function(operator.add, ((given,), rest)), kwargs

    quantize = _graph(quantizer, write)
    layer.add_module("quantize_input", quantize)
    layer.register_forward_pre_hook(quantize, with_kwargs=True)


def _in_plain_operations(name: str, quantizer: LearnableFakeQuantize) -> nn.Module:
    """What the user calls in place of a quantizer of their own."""
    if quantizer.group_size is not None:
        raise ValueError(
            f"`freeze` gives a tensor one scale, or one for each channel. Found groups in {name!r}: use "
            "granularity 'per_channel' there."
        )
    return _graph(quantizer, lambda graph, quantize: quantize(graph.placeholder("x")))


def _graph(quantizer: LearnableFakeQuantize, write: Callable[[Graph, Callable[[Node], Node]], Any]) -> GraphModule:
    """A graph with a quantizer's constants.

    Written node by node: `torch.fx.symbolic_trace` changes how every module of the process is called meanwhile.

    Args:
        quantizer: whose constants.
        write: adds nodes to the graph and gives its output; what it is handed adds those that quantize one.
    """
    constants = _Constants(quantizer)
    graph, (low, high), axis = Graph(), quantizer.code_range, quantizer.axis

    def quantize(x: Node) -> Node:
        if quantizer.per_token:
            x = graph.call_method("contiguous", (x,))  # as the tokens are laid out in training
            scale, zero_point = _of_tokens(graph, x, low, high, quantizer.symmetric)
        else:
            scale, zero_point = graph.get_attr("scale"), graph.get_attr("zero_point")
        moved = x if axis is None else graph.call_method("movedim", (x, axis, -1))
        codes = graph.call_function(operator.truediv, (graph.call_method("float", (moved,)), scale))
        codes = graph.call_function(operator.add, (graph.call_method("round", (codes,)), zero_point))
        codes = graph.call_function(torch.clamp, (codes, low, high))
        centred = graph.call_function(operator.sub, (codes, zero_point))
        made = graph.call_function(operator.mul, (centred, scale))
        made = made if axis is None else graph.call_method("movedim", (made, -1, axis))
        return graph.call_method("to", (made, graph.call_function(getattr, (x, "dtype"))))

    graph.output(write(graph, quantize))
    return GraphModule(constants, graph).eval()


def _of_tokens(graph: Graph, x: Node, low: int, high: int, symmetric: bool) -> tuple[Node, Node | float]:
    """What `token_qparams` computes, as nodes that keep the last dimension."""
    wide, call = graph.call_method("float", (x,)), graph.call_function
    least = call(torch.clamp, (call(torch.amin, (wide, -1, True)),), {"max": 0.0})
    most = call(torch.clamp, (call(torch.amax, (wide, -1, True)),), {"min": 0.0})
    if symmetric:
        scale = call(torch.maximum, (call(operator.truediv, (most, high)), call(operator.truediv, (least, low))))
    else:
        scale = call(operator.truediv, (call(operator.sub, (most, least)), float(high - low)))
    sound = call(torch.isfinite, (scale,))
    scale = call(torch.clamp, (call(torch.where, (sound, scale, 1.0)),), {"min": torch.finfo(torch.float32).eps})
    if symmetric:
        return scale, 0.0
    middle = (low + high + 1) // 2
    ends = [(least, low - middle), (most, high - middle)]
    scaled = [call(operator.truediv, (call(torch.where, (sound, end, 0.0)), scale)) for end, _ in ends]
    errors = [call(operator.add, (each, code)) for each, (_, code) in zip(scaled, ends, strict=True)]
    below, above = (call(operator.sub, (code, each)) for each, (_, code) in zip(scaled, ends, strict=True))
    chosen = call(torch.where, (call(operator.gt, (call(operator.add, tuple(errors)), 0)), below, above))
    whole = graph.call_method("round", (call(torch.clamp, (chosen, low - middle, high - middle)),))
    return scale, call(operator.add, (whole, middle))


class _Constants(nn.Module):
    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: LearnableFakeQuantize) -> None:
        super().__init__()
        scale, zero_point = quantizer.used_qparams()
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", zero_point.clone())


# ---- operations -----------------------------------------------------------------------------------------------------


def _keep_constants(frozen: nn.Module) -> None:
    """Constants in place of what else quantizes operands and outputs in the code of modules."""
    made = {point.quantizer: Constant(point.quantizer) for point in points(frozen).values() if point.owner is not None}
    for module in frozen.modules():
        module._modules.update({name: made[child] for name, child in module._modules.items() if child in made})


class Constant(nn.Module):
    """Stands for a quantizer that a module's own code meets."""

    def __init__(self, quantizer: LearnableFakeQuantize) -> None:
        super().__init__()
        self.quantize = _in_plain_operations("", quantizer)

    def forward(self, x: Tensor, learn: bool = True) -> Tensor:
        """X on the grid."""
        made: Tensor = self.quantize(x)
        return made

    def in_graph(self, x: Tensor) -> Tensor:
        """Nothing more."""
        return x


def _leave_what_is_constant(frozen: nn.Module) -> None:
    """Modules go on meeting operations, and stay out of torch's fused layers, only where inputs are quantized."""
    meeting = {module for module in frozen.modules() if _quantizes(module)}
    leave_operations(frozen, meeting)
    for module in frozen.modules():
        if module not in meeting:
            let_fast_path(module)  # torch itself stays out of it where a layer within has a hook


def _quantizes(module: nn.Module) -> bool:
    """Whether constants stand in a module's own code."""
    reads = module.met_reads if isinstance(module, MeetsOperations) else ()
    met = (each.owner._modules.get(input_name(each.parameter)) for each in reads)
    return any(isinstance(each, Constant) for each in (*module._modules.values(), *met))
