"""An exported graph in the form that ONNX Runtime computes in integers; what it computes stays the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from lfq_lightning.export.integers import IntegerWeight

CODES, TURNED = ".codes", ".codes_turned"  # how the codes of a weight are called, and those of a matrix turned over
UNCLIPPED = "_unclipped"


def for_onnxruntime(proto: onnx.ModelProto, weights: Mapping[str, IntegerWeight], optimize_for: str) -> None:
    """Rewrite a graph in place.

    Args:
        proto: what torch's exporter wrote.
        weights: the integer weights by name.
        optimize_for: "size" or "speed".
    """
    flatten_stacks(proto)
    turn_matrices(proto, weights)
    pool_globally(proto)
    free_products(proto)
    if optimize_for == "speed":
        saturate_codes(proto)


def turn_matrices(proto: onnx.ModelProto, weights: Mapping[str, IntegerWeight]) -> None:
    """Store matrices that meet floats as (inputs, outputs), and multiply by them as they are.

    ONNX Runtime multiplies by integers in this layout (MatMulNBits). As (outputs, inputs), which torch's exporter
    writes, it makes floats of all of them at each run. Source: microsoft/onnxruntime, qdq_selectors.cc, and 1.32 tried:
    blocks are of 16 inputs at least, and a power of two.
    """
    stored = {initializer.name: initializer for initializer in proto.graph.initializer}
    readers, makers = readers_of(proto), {name: node for node in proto.graph.node for name in node.output}
    for name, weight in weights.items():
        block = weight.group_size
        if weight.codes.ndim != 2 or weight.axis == 1 or (block is not None and (block < 16 or block & (block - 1))):
            continue
        found = [_product_of_floats(node, readers, makers) for node in readers.get(name + CODES, ())]
        if len(found) != 1 or found[0] is None:
            continue
        (node,), product = readers[name + CODES], found[0]
        for place, own in enumerate((TURNED, ".scale_turned", ".zero_point_turned")[: 1 if block is None else 3]):
            values = np.ascontiguousarray(numpy_helper.to_array(stored[node.input[place]]).T)
            proto.graph.initializer.append(numpy_helper.from_array(values, name + own))
            node.input[place] = name + own
        for attribute in node.attribute:
            if attribute.name == "axis":
                attribute.i = 1 - attribute.i
        product.input[1] = node.output[0]
        for attribute in product.attribute:
            if attribute.name == "transB":
                attribute.i = 0
    drop_unread(proto)


def _product_of_floats(
    node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]], makers: Mapping[str, onnx.NodeProto]
) -> onnx.NodeProto | None:
    """The one product of a matrix, transposed, that a node makes floats of, and of floats; None where there is none."""
    given, turned = node.output[0], False
    while len(readers.get(given, ())) == 1:
        (reader,) = readers[given]
        if reader.op_type == "Transpose" and not turned and settings_of(reader).get("perm") == [1, 0]:
            given, turned = reader.output[0], True
            continue
        if reader.op_type == "Gemm":
            turned = turned != bool(settings_of(reader).get("transB"))
        elif reader.op_type != "MatMul":
            return None
        other = makers.get(reader.input[0])
        in_integers = other is not None and other.op_type == "DequantizeLinear"
        return reader if turned and reader.input[1] == given and not in_integers else None
    return None


def flatten_stacks(proto: onnx.ModelProto) -> None:
    """Store weights that are several matrices, with a scale for each column, as one matrix, which is shaped again.

    ONNX Runtime would take the product of several matrices at once as one of integers, and fails on such scales.
    """
    stored = {initializer.name: initializer for initializer in proto.graph.initializer}
    products = {name for node in proto.graph.node if node.op_type == "MatMul" for name in node.input}
    for place, node in reversed(list(enumerate(proto.graph.node))):
        if node.op_type != "DequantizeLinear" or node.input[0] not in stored or node.output[0] not in products:
            continue
        codes, given = stored[node.input[0]], node.output[0]
        shape, axes = list(codes.dims), [attribute for attribute in node.attribute if attribute.name == "axis"]
        if len(shape) < 3 or not axes or axes[0].i % len(shape) != len(shape) - 1:
            continue
        codes.dims[:] = [math.prod(shape[:-1]), shape[-1]]
        axes[0].i = 1
        node.output[0], size = f"{given}_flat", f"{given}_shape"
        proto.graph.initializer.append(numpy_helper.from_array(np.array(shape), size))
        proto.graph.node.insert(place + 1, onnx.helper.make_node("Reshape", [node.output[0], size], [given]))


def saturate_codes(proto: onnx.ModelProto) -> None:
    """Clip integers after QuantizeLinear in place of floats before it, which is the same.

    A Clip between an operation and QuantizeLinear keeps ONNX Runtime from computing the operation in integers.
    """
    stored = {kept.name: numpy_helper.to_array(kept) for kept in proto.graph.initializer}
    makers = {name: node for node in proto.graph.node for name in node.output}
    for place, node in reversed(list(enumerate(proto.graph.node))):
        clip = makers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if clip is None or clip.op_type != "Clip" or not set(clip.input[1:]) <= set(stored):
            continue
        scale, zero_point = (stored[name] for name in node.input[1:])
        ends = [(stored[name] / scale).round() + zero_point.astype(np.int32) for name in clip.input[1:]]
        given, codes = node.output[0], node.output[0] + UNCLIPPED
        names = [f"{given}_lowest", f"{given}_highest"]
        proto.graph.initializer.extend(
            numpy_helper.from_array(end.reshape(()).astype(zero_point.dtype), name)
            for end, name in zip(ends, names, strict=True)
        )
        node.input[0], node.output[0] = clip.input[0], codes
        proto.graph.node.insert(place + 1, onnx.helper.make_node("Clip", [codes, *names], [given]))
    drop_unread(proto)


def pool_globally(proto: onnx.ModelProto) -> None:
    """Write means over all pixels as GlobalAveragePool: ReduceMean, as torch's exporter writes it, has no integers."""
    stored = {kept.name: kept for kept in proto.graph.initializer}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in _values(proto)}
    for node in proto.graph.node:
        if node.op_type != "ReduceMean" or len(node.input) != 2 or node.input[1] not in stored:
            continue
        rank, settings = ranks.get(node.input[0], 0), settings_of(node)
        axes = {int(axis) % max(rank, 1) for axis in numpy_helper.to_array(stored[node.input[1]]).flatten()}
        if rank > 2 and axes == set(range(2, rank)) and settings.get("keepdims", 1):
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]
    drop_unread(proto)


def _values(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    return [*proto.graph.value_info, *proto.graph.input, *proto.graph.output]


def free_products(proto: onnx.ModelProto) -> None:
    """Take the bias out of matrix products of integers that give floats, and subtract its negative behind them.

    ONNX Runtime makes one operation of a product and an addition, and computes that in float where the bias is.
    """
    stored = {kept.name: kept for kept in proto.graph.initializer}
    readers, makers = readers_of(proto), {name: node for node in proto.graph.node for name in node.output}
    for place, node in reversed(list(enumerate(proto.graph.node))):
        made = [makers.get(name) for name in node.input[:2]]
        if node.op_type not in ("Gemm", "MatMul") or any(m is None or m.op_type != "DequantizeLinear" for m in made):
            continue
        if made[0].input[0] in stored:  # type: ignore[union-attr]
            continue  # a weight on the left, whose rows may have scales of their own
        if node.op_type == "Gemm":
            if len(node.input) < 3 or node.input[2] not in stored or _is_quantized(node.output[0], readers):
                continue
            given, (bias,) = node.output[0], node.input[2:]
            node.output[0] = f"{given}_product"
            del node.input[2:]
            product = node.output[0]
            subtract = onnx.helper.make_node("Sub", [product, _negative(proto, stored, bias)], [given])
            proto.graph.node.insert(place + 1, subtract)
            continue
        follow = readers.get(node.output[0], [])
        if len(follow) != 1 or follow[0].op_type != "Add" or _is_quantized(follow[0].output[0], readers):
            continue
        (add,) = follow
        biases = [name for name in add.input if name in stored]
        if len(biases) == 1:
            add.op_type = "Sub"
            add.input[:] = [node.output[0], _negative(proto, stored, biases[0])]
    drop_unread(proto)


def _is_quantized(tensor: str, readers: Mapping[str, list[onnx.NodeProto]]) -> bool:
    """Whether a tensor is quantized before anything else is done with it, but for what saturation does as well."""
    while len(readers.get(tensor, ())) == 1 and readers[tensor][0].op_type in ("Relu", "Clip"):
        tensor = readers[tensor][0].output[0]
    return len(readers.get(tensor, ())) == 1 and readers[tensor][0].op_type == "QuantizeLinear"


def _negative(proto: onnx.ModelProto, stored: dict[str, onnx.TensorProto], name: str) -> str:
    own = f"{name}.negative"
    if own not in stored:
        stored[own] = numpy_helper.from_array(-numpy_helper.to_array(stored[name]), own)
        proto.graph.initializer.append(stored[own])
    return own


# ---- graphs ---------------------------------------------------------------------------------------------------------


def readers_of(proto: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that read each tensor."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def settings_of(node: onnx.NodeProto) -> dict[str, Any]:
    """The attributes of a node, by name."""
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def drop_unread(proto: onnx.ModelProto) -> None:
    """Drop transposes, clips and tensors that nobody reads any more."""
    used = {name for node in proto.graph.node for name in node.input} | {output.name for output in proto.graph.output}
    idle = ("Transpose", "Clip")
    kept_nodes = [node for node in proto.graph.node if node.op_type not in idle or node.output[0] in used]
    used = {name for node in kept_nodes for name in node.input} | {output.name for output in proto.graph.output}
    kept = [initializer for initializer in proto.graph.initializer if initializer.name in used]
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(kept_nodes)
    proto.graph.initializer.extend(kept)
