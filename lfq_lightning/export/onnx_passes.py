"""An exported graph in the form that ONNX Runtime computes in integers; what it computes stays the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import numpy_helper

from lfq_lightning.export.integers import IntegerWeight

CODES, TURNED = ".codes", ".codes_turned"  # how the codes of a weight are called, and those of a matrix turned over
ROWS_SCALE, ROWS_ZERO_POINT = ".rows_scale", ".rows_zero_point"  # of tables whose rows are looked up as codes


class Padded(NamedTuple):
    """How codes are padded by the convolution that reads them: before and behind each dimension, and with what."""

    widths: tuple[tuple[int, int], ...]
    code: int


def for_onnxruntime(
    proto: onnx.ModelProto, weights: Mapping[str, IntegerWeight], optimize_for: str
) -> dict[str, Padded]:
    """Rewrite a graph in place.

    Args:
        proto: what torch's exporter wrote.
        weights: the integer weights by name.
        optimize_for: "size" or "speed".

    Returns:
        The codes, by their tensor, that the model pads before it quantizes them.
    """
    cast_constants(proto)
    padded = merge_padding(proto)
    flatten_stacks(proto)
    turn_matrices(proto, weights)
    pool_globally(proto)
    free_products(proto)
    choose_codes(proto)
    if optimize_for == "speed":
        saturate_codes(proto)
    look_up_codes(proto, weights, optimize_for)
    return padded


def cast_constants(proto: onnx.ModelProto) -> None:
    """Store scales and zero points in the type in which they are read: the exporter casts small ones alone."""
    stored = {kept.name: kept for kept in proto.graph.initializer}
    kept_nodes = []
    for node in proto.graph.node:
        if node.op_type == "Cast" and node.input[0] in stored:
            kind = onnx.helper.tensor_dtype_to_np_dtype(settings_of(node)["to"])
            values = numpy_helper.to_array(stored[node.input[0]]).astype(kind)
            proto.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
        else:
            kept_nodes.append(node)
    del proto.graph.node[:]
    proto.graph.node.extend(kept_nodes)
    drop_unread(proto)


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
        if node.op_type != "QuantizeLinear":
            continue
        scale, zero_point = (stored[name] for name in node.input[1:])
        if scale.size > 1:
            continue
        limits = np.iinfo(zero_point.dtype)  # beyond which quantizing saturates by itself
        lowest, highest = limits.min, limits.max
        while (clip := makers.get(node.input[0])) is not None and clip.op_type == "Clip":
            if len(clip.input) != 3 or not set(clip.input[1:]) <= set(stored):
                break
            ends = [(stored[name] / scale).round() + zero_point.astype(np.int32) for name in clip.input[1:]]
            lowest, highest = min(max(lowest, int(ends[0])), highest), max(min(highest, int(ends[1])), lowest)
            node.input[0] = clip.input[0]
        if (lowest, highest) == (limits.min, limits.max):
            continue
        given = node.output[0]
        node.output[0] = f"{given}_unclipped"
        names = [f"{given}_lowest", f"{given}_highest"]
        for end, name in zip((lowest, highest), names, strict=True):
            proto.graph.initializer.append(numpy_helper.from_array(np.array(end, zero_point.dtype), name))
        proto.graph.node.insert(place + 1, onnx.helper.make_node("Clip", [node.output[0], *names], [given]))
    drop_unread(proto)


def merge_padding(proto: onnx.ModelProto) -> dict[str, Padded]:
    """Have convolutions pad what they read with zeros, which every quantizer keeps, in place of a Pad before it."""
    stored = {kept.name: numpy_helper.to_array(kept) for kept in proto.graph.initializer}
    readers, padded = readers_of(proto), dict[str, Padded]()
    given = {output.name for output in proto.graph.output}
    for node in list(proto.graph.node):
        chain = _quantized_behind(node.output[0], readers)
        constants = [name for name in node.input[1:] if name]
        if node.op_type != "Pad" or not chain or len(constants) > 2 or node.output[0] in given:
            continue
        if not all(_keeps_zero(each, stored) for each in chain):
            continue
        convolutions = readers.get(chain[-1].output[0], [])
        widths = stored.get(constants[0])
        value = stored.get(constants[1]) if len(constants) > 1 else np.zeros(())
        plain = settings_of(node).get("mode", b"constant") == b"constant" and value is not None and not value.any()
        if widths is None or not plain or any(widths[[0, 1]]) or widths.min() < 0 or not convolutions:
            continue
        before, behind = widths.reshape(2, -1)
        if any(behind[:2]) or not all(_pads_itself(each, chain[-1].output[0]) for each in convolutions):
            continue
        for each in convolutions:
            own = settings_of(each).get("pads", [0] * (len(widths) - 4))
            kept = [attribute for attribute in each.attribute if attribute.name != "pads"]
            del each.attribute[:]
            each.attribute.extend(kept)
            more = [*before[2:], *behind[2:]]
            each.attribute.append(
                onnx.helper.make_attribute("pads", [int(a + b) for a, b in zip(own, more, strict=True)])
            )
        (quantize,) = [each for each in chain if each.op_type == "QuantizeLinear"]
        code = int(stored[quantize.input[2]].flatten()[0])
        padded[quantize.output[0]] = Padded(tuple((int(a), int(b)) for a, b in zip(before, behind, strict=True)), code)
        chain[0].input[0] = node.input[0]
        proto.graph.node.remove(node)
    drop_unread(proto)
    return padded


def _keeps_zero(node: onnx.NodeProto, stored: Mapping[str, np.ndarray]) -> bool:
    """Whether what saturates gives zero for zero; what quantizes does."""
    if node.op_type != "Clip":
        return True
    ends = [stored.get(name) for name in node.input[1:]]
    return len(ends) == 2 and all(end is not None for end in ends) and bool(ends[0] <= 0 <= ends[1])  # type: ignore[operator]


def _pads_itself(node: onnx.NodeProto, given: str) -> bool:
    settings = settings_of(node)
    return node.op_type == "Conv" and node.input[0] == given and settings.get("auto_pad", b"NOTSET") == b"NOTSET"


def pool_globally(proto: onnx.ModelProto) -> None:
    """Write means over all pixels as GlobalAveragePool: ReduceMean, as torch's exporter writes it, has no integers."""
    stored = {kept.name: kept for kept in proto.graph.initializer}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in _values(proto)}
    for place, node in reversed(list(enumerate(proto.graph.node))):
        if node.op_type != "ReduceMean" or len(node.input) != 2 or node.input[1] not in stored:
            continue
        rank, settings = ranks.get(node.input[0], 0), settings_of(node)
        axes = {int(axis) % max(rank, 1) for axis in numpy_helper.to_array(stored[node.input[1]]).flatten()}
        if rank < 3 or axes != set(range(2, rank)):
            continue
        node.op_type, given = "GlobalAveragePool", node.output[0]
        del node.input[1:], node.attribute[:]
        if not settings.get("keepdims", 1):
            # Not Flatten, before which ONNX Runtime does not quantize.
            node.output[0], shape = f"{given}_pooled", f"{given}_shape"
            proto.graph.initializer.append(numpy_helper.from_array(np.array([0, -1]), shape))
            proto.graph.node.insert(place + 1, onnx.helper.make_node("Reshape", [node.output[0], shape], [given]))
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
            plain = all(settings_of(node).get(name, 1.0) == 1.0 for name in ("alpha", "beta"))
            if len(node.input) < 3 or node.input[2] not in stored or is_quantized(node.output[0], readers) or not plain:
                continue
            given, (bias,) = node.output[0], node.input[2:]
            node.output[0] = f"{given}_product"
            del node.input[2:]
            product = node.output[0]
            subtract = onnx.helper.make_node("Sub", [product, _negative(proto, stored, bias)], [given])
            proto.graph.node.insert(place + 1, subtract)
            continue
        follow = readers.get(node.output[0], [])
        if len(follow) != 1 or follow[0].op_type != "Add" or is_quantized(follow[0].output[0], readers):
            continue
        (add,) = follow
        biases = [name for name in add.input if name in stored]
        if len(biases) == 1:
            add.op_type = "Sub"
            add.input[:] = [node.output[0], _negative(proto, stored, biases[0])]
    drop_unread(proto)


def is_quantized(tensor: str, readers: Mapping[str, list[onnx.NodeProto]]) -> bool:
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


def look_up_codes(proto: onnx.ModelProto, weights: Mapping[str, IntegerWeight], optimize_for: str) -> None:
    """Look rows of tables up as integers, and make floats of these alone: otherwise the whole table is, at each run.

    Tables of 4 bits, which no runtime looks up while they are packed, and those with groups stay as they are.
    """
    stored = {kept.name: kept for kept in proto.graph.initializer}
    readers = readers_of(proto)
    for name, weight in weights.items():
        made = readers.get(name + CODES, ())
        if len(made) != 1 or weight.group_size is not None or (weight.narrow and optimize_for == "size"):
            continue
        lookups = readers.get(made[0].output[0], ())
        along_rows = weight.axis in (0, None) and all(
            node.op_type == "Gather" and not settings_of(node).get("axis", 0) for node in lookups
        )
        if not lookups or not along_rows:
            continue
        scale, zero_point = (numpy_helper.to_array(stored[each]) for each in made[0].input[1:])
        one = scale.size == 1
        shape = () if one else (-1, 1)
        rows = [numpy_helper.from_array(scale.reshape(shape), name + ROWS_SCALE)]
        if zero_point.any():
            rows.append(numpy_helper.from_array(zero_point.astype(np.float32).reshape(shape), name + ROWS_ZERO_POINT))
        proto.graph.initializer.extend(rows)
        for lookup in lookups:
            _look_up(proto, lookup, name, [row.name for row in rows], one)
        proto.graph.node.remove(made[0])
    drop_unread(proto)


def _look_up(proto: onnx.ModelProto, lookup: onnx.NodeProto, name: str, rows: list[str], one: bool) -> None:
    """Look codes up, and their row's scale and zero point unless there is only one, and compute floats."""
    given, index = lookup.output[0], lookup.input[1]
    added = [onnx.helper.make_node("Gather", [name + CODES, index], [f"{given}_codes"])]
    kind = onnx.TensorProto.FLOAT
    added.append(onnx.helper.make_node("Cast", [f"{given}_codes"], [f"{given}_float"], to=kind))
    values = f"{given}_float"
    for row, operation in reversed(list(zip(rows, ("Mul", "Sub"), strict=False))):
        of_row = row
        if not one:
            of_row = f"{given}{row.removeprefix(name)}"
            added.append(onnx.helper.make_node("Gather", [row, index], [of_row]))
        result = given if operation == "Mul" else f"{given}_centred"
        added.append(onnx.helper.make_node(operation, [values, of_row], [result]))
        values = result
    place = list(proto.graph.node).index(lookup)
    del proto.graph.node[place]
    for node in reversed(added):
        proto.graph.node.insert(place, node)


_CHOOSING = ("MaxPool", "Resize")


def choose_codes(proto: onnx.ModelProto) -> None:
    """Quantize before what only chooses among values, too, where its result is quantized: it gives the same codes.

    ONNX Runtime then computes what is before in integers, also where others read it with the same scale.
    """
    stored = {kept.name: kept for kept in proto.graph.initializer}
    for place, node in reversed(list(enumerate(proto.graph.node))):
        if node.op_type not in _CHOOSING or settings_of(node).get("mode", b"nearest") != b"nearest":
            continue
        readers = readers_of(proto)
        behind = _quantized_behind(node.output[0], readers)
        if not behind or not all(name in stored for each in behind for name in each.input[1:]):
            continue
        same = [chain for chain in _chains(node.input[0], readers) if _are_alike(chain, behind, stored)]
        if same:
            node.input[0] = same[0][-1].output[0]
            _move_before(proto, same[0], place)
            continue
        made, given = [], node.input[0]
        for each in behind:
            copied = onnx.NodeProto()
            copied.CopyFrom(each)
            copied.ClearField("metadata_props")
            copied.name = copied.output[0] = f"{each.output[0]}_before"
            copied.input[0], given = given, copied.output[0]
            made.append(copied)
        node.input[0] = given
        for copied in reversed(made):
            proto.graph.node.insert(place, copied)


def _move_before(proto: onnx.ModelProto, chain: list[onnx.NodeProto], place: int) -> None:
    """Have the nodes of a chain stand before a place, as a node must that another one there reads."""
    for node in reversed(chain):
        position = list(proto.graph.node).index(node)
        if position > place:
            kept = onnx.NodeProto()
            kept.CopyFrom(node)
            del proto.graph.node[position]
            proto.graph.node.insert(place, kept)


def _quantized_behind(tensor: str, readers: Mapping[str, list[onnx.NodeProto]]) -> list[onnx.NodeProto]:
    """The nodes that quantize and dequantize a tensor, if that is all that reads it; empty otherwise."""
    chains = _chains(tensor, readers)
    return chains[0] if len(chains) == len(readers.get(tensor, ())) == 1 else []


def _chains(tensor: str, readers: Mapping[str, list[onnx.NodeProto]]) -> list[list[onnx.NodeProto]]:
    """The nodes that saturate a tensor, quantize and dequantize it, for each quantizer that reads it."""
    found = []
    for first in readers.get(tensor, ()):
        chain = [first]
        while chain[-1].op_type in ("Clip", "QuantizeLinear") and len(readers.get(chain[-1].output[0], ())) == 1:
            chain.append(readers[chain[-1].output[0]][0])
        kinds = [node.op_type for node in chain]
        if kinds.count("QuantizeLinear") == 1 and kinds[-1] == "DequantizeLinear":
            found.append(chain)
    return found


def _are_alike(
    chain: list[onnx.NodeProto], other: list[onnx.NodeProto], stored: Mapping[str, onnx.TensorProto]
) -> bool:
    """Whether two chains have the same constants."""
    constants = [[stored.get(name) for node in each for name in node.input[1:]] for each in (chain, other)]
    return len(constants[0]) == len(constants[1]) and all(
        a is not None
        and b is not None
        and a.data_type == b.data_type
        and np.array_equal(numpy_helper.to_array(a), numpy_helper.to_array(b))
        for a, b in zip(*constants, strict=True)
    )


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
