"""A program in the form that a runtime computes in integers; what it computes stays the same."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node

from lfq_lightning.private import quantized_decomposed

_decomposed, _aten = quantized_decomposed(), torch.ops.aten

QUANTIZE = _decomposed.quantize_per_tensor.default
DEQUANTIZE = _decomposed.dequantize_per_tensor.default
OF_CHANNELS = _decomposed.dequantize_per_channel.default
OF_GROUPS = torch.ops.lfq_lightning.dequantize_groups.default
_WEIGHTS = (DEQUANTIZE, OF_CHANNELS, OF_GROUPS)

_VIEWS = {_aten.flatten.using_ints, _aten.view.default, _aten.reshape.default}
# What gives some of its operand's values again, so that it may as well choose among their codes.
_CHOOSING = _VIEWS | {
    *(_aten.max_pool2d.default, _aten.upsample_nearest2d.vec, _aten.upsample_nearest2d.default),
    _aten.contiguous.default,
    *(_aten.permute.default, _aten.transpose.int, _aten.squeeze.dim, _aten.squeeze.dims, _aten.unsqueeze.default),
    *(_aten.slice.Tensor, _aten.select.int, _aten.dropout.default, _aten.clone.default),
}
_CLIPPING = {_aten.relu.default, _aten.hardtanh.default, _aten.relu6.default}
_LAYERS = {_aten.linear.default, _aten.conv1d.default, _aten.conv1d.padding, _aten.conv2d.default, _aten.conv2d.padding}
_LAYERS |= {_aten.conv_transpose2d.input}
_OF_SERIES = {_aten.conv1d.default, _aten.conv1d.padding, _aten.conv_transpose1d.default}
_PRODUCTS = _LAYERS | {_aten.conv_transpose1d.default, _aten.conv_transpose3d.input}
_PRODUCTS |= {_aten.conv3d.default, _aten.conv3d.padding, _aten.bilinear.default}
_PRODUCTS |= {_aten.matmul.default, _aten.mm.default, _aten.bmm.default, _aten.addmm.default, _aten.einsum.default}


@dataclass(frozen=True)
class Form:
    """How a runtime wants programs.

    Args:
        signed: codes of inputs as int8, unsigned ones 128 lower.
        whole: layers whose result is not quantized are to be in float altogether.
        quantizes: weights as floats that are quantized and dequantized, in place of their codes.
        looks_up: rows of tables as codes, of which floats are made alone: otherwise the whole table is, at each run.
        copies: what is flattened is copied first: torchao's convolutions give their channels last, of which its views
            cannot be made.
    """

    signed: bool
    whole: bool = False
    quantizes: bool = False
    looks_up: bool = False
    copies: bool = False


FORMS = {
    "executorch": Form(signed=True, whole=True, looks_up=True),
    "x86": Form(signed=False, copies=True),
    "litert": Form(signed=True, quantizes=True),
}


def drop_unread(program: ExportedProgram) -> None:
    """Drop tensors that no operation reads, such as the floats of weights that are stored as codes, in place."""
    specs = program.graph_signature.input_specs
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, spec in list(zip(inputs, specs, strict=True)):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and not node.users and spec.target is not None:
            specs.remove(spec)
            program.state_dict.pop(spec.target, None)
            program.graph.erase_node(node)
    program.graph_module.recompile()
    program.validate()


def arrange(module: GraphModule, form: Form) -> list[str]:
    """Rewrite a traced module in place.

    Args:
        module: of a program that has its quantizers as operators, BatchNorm folded, and changes nothing in place.
        form: that of the runtime.

    Returns:
        The names of the layers with integer weights that are in float now.
    """
    graph = module.graph
    _drop_copies(graph)
    _keep_pixels(graph)
    _merge(graph)
    _choose_codes(graph)
    _merge(graph)
    _part(graph)
    if form.looks_up:
        _look_up_codes(module)
    released = _release(module) if form.whole else []
    if form.quantizes:
        _quantize_weights(module)
    if form.copies:
        _copy_before_views(graph)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return released


def _of(graph: Graph, *targets: Any) -> list[Node]:
    return [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


def _drop_copies(graph: Graph) -> None:
    """Read what was copied itself: nothing is changed in place."""
    for node in _of(graph, _aten.clone.default, _aten.copy.default):
        given: Any = node.args[-1] if node.target is _aten.copy.default else node.args[0]
        if not node.kwargs and _shape_of(given) == _shape_of(node) and _dtype_of(given) is _dtype_of(node):
            node.replace_all_uses_with(given)
            graph.erase_node(node)


def _merge(graph: Graph) -> None:
    """Quantize a tensor once for all who read it with one quantizer."""
    known: dict[Any, Node] = {}
    for node in _of(graph, QUANTIZE, DEQUANTIZE):
        first = known.setdefault((node.target, node.args), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _part(graph: Graph) -> None:
    """Dequantize for each reader by itself, so that what runs in integers need not stand together."""
    for node in _of(graph, DEQUANTIZE):
        for user in list(node.users)[1:]:
            with graph.inserting_before(user):
                user.replace_input_with(node, graph.call_function(DEQUANTIZE, node.args))


def _choose_codes(graph: Graph) -> None:
    """Quantize before what only chooses among values, too, where nothing but one quantizer reads its result."""
    for node in reversed(_of(graph, *_CHOOSING)):
        (given, *rest), users = node.args, list(node.users)
        alike = {user.args[1:] for user in users if user.target is QUANTIZE and user.args[0] is node}
        if len(alike) != 1 or any(user.target is not QUANTIZE for user in users):
            continue
        (settings,) = alike
        with graph.inserting_before(node):
            codes = graph.call_function(QUANTIZE, (given, *settings))
            node.args = (graph.call_function(DEQUANTIZE, (codes, *settings)), *rest)


def _copy_before_views(graph: Graph) -> None:
    """Have what is flattened lie in memory as its dimensions stand."""
    for node in _of(graph, *_VIEWS):
        with graph.inserting_before(node):
            kept = graph.call_function(_aten.clone.default, node.args[:1], {"memory_format": torch.contiguous_format})
        node.args = (kept, *node.args[1:])


def _keep_pixels(graph: Graph) -> None:
    """Have means over all pixels keep their dimensions, and flatten behind them, as runtimes pool."""
    for node in _of(graph, _aten.mean.dim):
        given, dims, *keeps = node.args
        shape = _shape_of(given)
        if len(shape) != 4 or {d % 4 for d in dims} != {2, 3} or any(keeps) or node.kwargs:  # type: ignore[union-attr, operator]
            continue
        users, node.args = list(node.users), (given, [2, 3], True)
        with graph.inserting_after(node):
            flat = graph.call_function(_aten.flatten.using_ints, (node, 1))
        for user in users:
            user.replace_input_with(node, flat)


def _shape_of(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape) if isinstance(node, Node) and "val" in node.meta else ()


def _dtype_of(node: Any) -> torch.dtype | None:
    return node.meta["val"].dtype if isinstance(node, Node) and "val" in node.meta else None


# ---- weights --------------------------------------------------------------------------------------------------------


def _stored(module: GraphModule, name: str) -> Tensor:
    found: Tensor = attrgetter(name)(module)
    return found


def _weights(module: GraphModule) -> list[Node]:
    """What makes floats of stored codes."""
    return [
        node
        for node in _of(module.graph, *_WEIGHTS)
        if isinstance(node.args[0], Node) and node.args[0].op == "get_attr"
    ]


def _layer_of(weight: Node) -> str:
    """The name of the layer that has a weight, or of the parameter where that has another name."""
    codes: Any = weight.args[0]
    return str(codes.target).removesuffix(".codes").removesuffix("_quantizer").removesuffix(".weight")


def _floats(module: GraphModule, weight: Node) -> Node:
    """A weight's floats, kept beside its codes."""
    values = [_stored(module, str(arg.target)) if isinstance(arg, Node) else arg for arg in weight.args]
    assert callable(weight.target)
    name = f"{weight.name}_in_float"
    module.register_buffer(name, weight.target(*values))
    with module.graph.inserting_before(weight):
        return module.graph.get_attr(name)


def _release(module: GraphModule) -> list[str]:
    """Give layers that XNNPACK does not compute in integers their weights in float; the names of these.

    Its partitioner refuses such a layer after it has marked the layer's input as served, and the network then computes
    with what no one has written (pytorch/executorch, backends/xnnpack/partition/config/gemm_configs.py).
    """
    released = []
    for weight in _weights(module):
        products = [user for user in weight.users if user.target in _PRODUCTS]
        wrong = [user for user in products if not _is_in_integers(user, weight)]
        if wrong or (weight.target is OF_GROUPS and weight.users):
            floats = _floats(module, weight)
            for user in wrong if weight.target is not OF_GROUPS else list(weight.users):
                user.replace_input_with(weight, floats)
                if user.target in _OF_SERIES:
                    _part_input(module.graph, user)
            released.append(_layer_of(weight))
    return released


def _part_input(graph: Graph, layer: Node) -> None:
    """Put one operation between a layer and the quantizer before it: of one-dimensional ones XNNPACK takes both."""
    with graph.inserting_before(layer):
        layer.replace_input_with(layer.args[0], graph.call_function(_aten.mul.Tensor, (layer.args[0], 1.0)))  # type: ignore[arg-type]


def _is_in_integers(layer: Node, weight: Node) -> bool:
    given, last = layer.args[0], layer
    while len(last.users) == 1 and next(iter(last.users)).target in _CLIPPING:
        last = next(iter(last.users))
    reads = [user.target for user in last.users]
    of_groups = layer.target is _aten.conv_transpose2d.input and [*layer.args[6:7], 1][0] != 1
    return (
        layer.target in _LAYERS
        and not of_groups
        and weight.target in (OF_CHANNELS, DEQUANTIZE)
        and layer.args[1] is weight
        and isinstance(given, Node)
        and given.target is DEQUANTIZE
        and reads == [QUANTIZE]
    )


def _look_up_codes(module: GraphModule) -> None:
    """Make floats of the rows alone that are looked up, by the same arithmetic as of the whole table."""
    graph = module.graph
    for weight in _weights(module):
        codes, scale, zero_point = weight.args[:3]
        one = weight.target is DEQUANTIZE
        lookups = [user for user in weight.users if user.target is _aten.embedding.default and user.args[0] is weight]
        if len(lookups) != len(weight.users) or not (one or (weight.target is OF_CHANNELS and weight.args[3] == 0)):
            continue
        for lookup in lookups:
            with graph.inserting_before(lookup):
                rows = graph.call_function(_aten.embedding.default, (codes, lookup.args[1]))
                rows = graph.call_function(_aten.to.dtype, (rows, torch.float32))
                settings = []
                for each in (zero_point, scale):
                    if not one:
                        each = graph.call_function(_aten.index.Tensor, (each, [lookup.args[1]]))
                        each = graph.call_function(_aten.unsqueeze.default, (each, -1))
                    settings.append(each)
                centred = graph.call_function(_aten.sub.Tensor, (rows, settings[0]))
                lookup.replace_all_uses_with(graph.call_function(_aten.mul.Tensor, (centred, settings[1])))
            graph.erase_node(lookup)


def _quantize_weights(module: GraphModule) -> None:
    """Have weights be floats that are quantized, and give the same codes."""
    for weight in _weights(module):
        if weight.target is OF_GROUPS:
            continue
        axis = 3 if weight.target is OF_CHANNELS else None
        quantize = _decomposed.quantize_per_channel.default if axis else QUANTIZE
        floats = _floats(module, weight)
        with module.graph.inserting_before(weight):
            codes = module.graph.call_function(quantize, (floats, *weight.args[1:]))
        weight.args = (codes, *weight.args[1:])
