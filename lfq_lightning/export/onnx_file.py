"""Quantizers in an ONNX file: whose codes a node gives, integer weights packed and read again, and the file's size."""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import numpy_helper
from torch import nn

from lfq_lightning.export.integers import IntegerWeight
from lfq_lightning.placement.points import activations, points, weights
from lfq_lightning.private import MODULES_OF_NODE, plain_name, whole_name


def codes_by_quantizer(proto: onnx.ModelProto, model: nn.Module) -> dict[str, list[str]]:
    """The results of QuantizeLinear nodes by the quantizer that they are of, in order of use, as the exporter notes.

    Args:
        proto: the exported file, with the notes.
        model: what was exported, of which one quantizer may have several names.
    """
    first = {id(point.quantizer): name for name, point in points(model).items()}
    every = model.named_modules(remove_duplicate=False)
    names = {plain_name(name): first[id(module)] for name, module in every if id(module) in first}
    found: dict[str, list[str]] = {}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            notes = {note.key: note.value for note in node.metadata_props}
            scopes = [whole_name(scope) for scope in ast.literal_eval(notes[MODULES_OF_NODE])]
            name = next(names[scope] for scope in reversed(scopes) if scope in names)
            found.setdefault(name, []).append(node.output[0])
    return found


def pack(proto: onnx.ModelProto, weights: Mapping[str, IntegerWeight], opset: int) -> None:
    """Store the codes of weights of at most 4 bits two to a byte, each weight with zero points of its own.

    ONNX Runtime's `session.x64quantprecision` fails on zero points that several weights share.
    """
    kinds = onnx.TensorProto
    narrow = {f"{name}.codes": weight.narrow and opset >= 21 for name, weight in weights.items()}
    stored = {initializer.name: initializer for initializer in proto.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in narrow:
            continue
        pack = narrow[node.input[0]]
        for position, name in enumerate([node.input[0], *node.input[2:]]):
            values, own = numpy_helper.to_array(stored[name]), name
            if position and len({reader.input[0] for reader in readers[name]}) > 1:
                own = node.input[2] = f"{node.input[0].removesuffix('.codes')}.zero_point"
                if own in stored:
                    continue
            if pack and values.dtype in (np.int8, np.uint8):
                kind = kinds.UINT4 if values.dtype == np.uint8 else kinds.INT4
                kept = onnx.helper.make_tensor(own, kind, values.shape, _nibbles(values), raw=True)
            elif own != name:
                kept = numpy_helper.from_array(values, own)
            else:
                continue
            if own == name:
                stored[name].CopyFrom(kept)
            else:
                proto.graph.initializer.append(kept)
                stored[own] = kept
    used = {name for node in proto.graph.node for name in node.input} | {output.name for output in proto.graph.output}
    kept_ones = [initializer for initializer in proto.graph.initializer if initializer.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept_ones)


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


def _nibbles(values: np.ndarray) -> bytes:
    """Two values a byte, the first in the low half, as ONNX packs them."""
    halves = np.append(values.flatten(), np.zeros(values.size % 2, values.dtype)).view(np.uint8) & 0xF
    return (halves[::2] | halves[1::2] << 4).tobytes()


def stored_weights(proto: onnx.ModelProto) -> dict[str, Callable[[], np.ndarray]]:
    """How the integer weights in a file are read, less their zero points, by the quantizer that they are of."""
    stored = {i.name: i for i in proto.graph.initializer}
    return {
        node.input[0].removesuffix(".codes"): partial(_centred, node, stored[node.input[0]], stored[node.input[2]])
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored
    }


def _centred(node: onnx.NodeProto, codes: onnx.TensorProto, zero_points: onnx.TensorProto) -> np.ndarray:
    values, zero_point = (numpy_helper.to_array(kept).astype(np.int32) for kept in (codes, zero_points))
    settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    axis, block = settings.get("axis", 1), settings.get("block_size", 0)
    if block:
        zero_point = np.repeat(zero_point, block, axis).take(range(values.shape[axis]), axis)
    elif zero_point.size > 1:
        zero_point = zero_point.reshape([-1 if d == axis % values.ndim else 1 for d in range(values.ndim)])
    return values - zero_point


MOST_BYTES = 2**31 - 2**20  # a protobuf message holds less than 2 GB; the graph has a megabyte beside its tensors


def save(proto: onnx.ModelProto, path: Path, external_data: bool | None) -> None:
    """Write beside the file and rename, so that an error leaves no half of one.

    Args:
        proto: the model; its tensors move out of it where they are kept in a file of their own.
        path: the file; the one of tensors has ".data" behind its name.
        external_data: whether there is one; None decides by size.
    """
    data = path.with_name(f"{path.name}.data")
    apart = sum(len(kept.raw_data) for kept in proto.graph.initializer) > MOST_BYTES
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        beside = Path(folder, path.name)
        if apart if external_data is None else external_data:
            onnx.save(proto, beside, save_as_external_data=True, location=data.name, size_threshold=1024)
        else:
            onnx.save(proto, beside)
        if (beside.parent / data.name).exists():
            os.replace(beside.parent / data.name, data)
        else:
            data.unlink(missing_ok=True)  # of a file that this one takes the place of
        os.replace(beside, path)


def file_bytes(path: Path) -> int:
    """The bytes of a file and of those beside it in which it keeps tensors."""
    kept = onnx.load(path, load_external_data=False).graph.initializer
    beside = {entry.value for tensor in kept for entry in tensor.external_data if entry.key == "location"}
    return path.stat().st_size + sum((path.parent / name).stat().st_size for name in beside)


def describe(proto: onnx.ModelProto, model: nn.Module) -> None:
    """Note in a file what wrote it, and how many bits it has.

    Args:
        proto: the file.
        model: what was exported.
    """
    proto.producer_name, proto.producer_version = "lfq_lightning", version("lfq_lightning")
    found = points(model)
    notes = {
        f"lfq_lightning.{kind}_bits": ", ".join(
            str(bits) for bits in sorted({p.quantizer.spec.bits for p in placed if p.quantizer.spec is not None})
        )
        for kind, placed in (("weight", weights(found)), ("activation", activations(found)))
    }
    onnx.helper.set_model_props(proto, notes)


def float_bytes(proto: onnx.ModelProto) -> int:
    """The bytes of the same file in float: without what quantizes, and with a float for each integer of a weight."""
    quantize = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    dequantize = [node for node in proto.graph.node if node.op_type == "DequantizeLinear"]
    clipped, codes = {node.input[0] for node in quantize}, {node.input[0] for node in dequantize}
    clips = [node for node in proto.graph.node if node.op_type == "Clip" and node.output[0] in clipped]
    nodes = quantize + dequantize + clips
    qparams = {name for node in nodes for name in node.input[1:]}
    size = proto.ByteSize() - sum(node.ByteSize() for node in nodes)
    for kept in proto.graph.initializer:
        if kept.name in codes:
            size += 4 * math.prod(kept.dims) - len(kept.raw_data)
        elif kept.name in qparams:
            size -= kept.ByteSize()
    return size
