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
from lfq_lightning.export.onnx_passes import (
    CODES,
    ROWS_SCALE,
    ROWS_ZERO_POINT,
    TURNED,
    drop_unread,
    is_quantized,
    readers_of,
    settings_of,
)
from lfq_lightning.placement.points import activations, points, weights
from lfq_lightning.private import MODULES_OF_NODE, plain_name, whole_name


def codes_by_quantizer(proto: onnx.ModelProto, model: nn.Module) -> dict[str, list[str]]:
    """The codes that QuantizeLinear nodes give, by the quantizer that they are of, in order of use.

    Args:
        proto: the exported file, with the exporter's notes on where each node is from.
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


def pack(proto: onnx.ModelProto, weights: Mapping[str, IntegerWeight], everywhere: bool) -> None:
    """Store the codes of weights of at most 4 bits two to a byte, each weight with zero points of its own.

    ONNX Runtime's `session.x64quantprecision` fails on zero points that several weights share.

    Args:
        proto: the file.
        weights: by name.
        everywhere: False leaves a byte for each code of matrices that meet integers, and of convolutions.
    """
    kinds = onnx.TensorProto
    narrow = {name + end: weight.narrow for name, weight in weights.items() for end in (CODES, TURNED)}
    if not everywhere:
        narrow |= {name + CODES: False for name in weights}
    stored = {initializer.name: initializer for initializer in proto.graph.initializer}
    readers = readers_of(proto)
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in narrow:
            continue
        pack = narrow[node.input[0]]
        for position, name in enumerate([node.input[0], *node.input[2:]]):
            values, own = numpy_helper.to_array(stored[name]), name
            if position and len({reader.input[0] for reader in readers[name]}) > 1:
                own = node.input[2] = f"{_weight_of(node)}.zero_point"
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
    drop_unread(proto)


def made_floats_at_each_run(proto: onnx.ModelProto) -> list[str]:
    """The weights, by name, that ONNX Runtime has no integer kernels for as they are read."""
    kinds = {kept.name: kept.data_type for kept in proto.graph.initializer}
    readers, makers = readers_of(proto), {name: node for node in proto.graph.node for name in node.output}
    found = []
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear" or not node.input[0].endswith(CODES):
            continue
        packed = kinds[node.input[0]] in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
        if packed or not all(_in_integers(reader, readers, makers) for reader in _products(node, readers)):
            found.append(_weight_of(node))
    return found


def _products(node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]]) -> list[onnx.NodeProto]:
    """What reads the floats that a node makes, behind transposes."""
    found = []
    for reader in readers.get(node.output[0], ()):
        found += _products(reader, readers) if reader.op_type == "Transpose" else [reader]
    return found


def _in_integers(
    node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]], makers: Mapping[str, onnx.NodeProto]
) -> bool:
    given = makers.get(node.input[0])
    if given is None or given.op_type != "DequantizeLinear":
        return False
    return node.op_type in ("Gemm", "MatMul") or (node.op_type == "Conv" and is_quantized(node.output[0], readers))


def _nibbles(values: np.ndarray) -> bytes:
    """Two values a byte, the first in the low half, as ONNX packs them."""
    halves = np.append(values.flatten(), np.zeros(values.size % 2, values.dtype)).view(np.uint8) & 0xF
    return (halves[::2] | halves[1::2] << 4).tobytes()


def stored_weights(proto: onnx.ModelProto) -> dict[str, Callable[[], np.ndarray]]:
    """How the integer weights in a file are read, less their zero points, by the quantizer that they are of."""
    stored = {i.name: i for i in proto.graph.initializer}
    found: dict[str, Callable[[], np.ndarray]] = {}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            found[_weight_of(node)] = partial(_centred, node, stored[node.input[0]], stored[node.input[2]])
        elif node.op_type == "Gather" and node.input[0].endswith(CODES):
            zero_points = stored.get(_weight_of(node) + ROWS_ZERO_POINT)
            found[_weight_of(node)] = partial(_centred_rows, stored[node.input[0]], zero_points)
    return found


def _centred_rows(codes: onnx.TensorProto, zero_points: onnx.TensorProto | None) -> np.ndarray:
    values = numpy_helper.to_array(codes).astype(np.int32)
    return values if zero_points is None else values - numpy_helper.to_array(zero_points).astype(np.int32)


def _centred(node: onnx.NodeProto, codes: onnx.TensorProto, zero_points: onnx.TensorProto) -> np.ndarray:
    values, zero_point = (numpy_helper.to_array(kept).astype(np.int32) for kept in (codes, zero_points))
    settings = settings_of(node)
    axis, block = settings.get("axis", 1), settings.get("block_size", 0)
    if block:
        zero_point = np.repeat(zero_point, block, axis).take(range(values.shape[axis]), axis)
    elif zero_point.size > 1:
        zero_point = zero_point.reshape([-1 if d == axis % values.ndim else 1 for d in range(values.ndim)])
    return (values - zero_point).T if node.input[0].endswith(TURNED) else values - zero_point


def _weight_of(node: onnx.NodeProto) -> str:
    """The name of the quantizer whose codes a node reads."""
    codes: str = node.input[0]
    return codes.removesuffix(TURNED).removesuffix(CODES)


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
    codes |= {kept.name for kept in proto.graph.initializer if kept.name.endswith(CODES)}
    qparams |= {kept.name for kept in proto.graph.initializer if kept.name.endswith((ROWS_SCALE, ROWS_ZERO_POINT))}
    size = proto.ByteSize() - sum(node.ByteSize() for node in nodes)
    for kept in proto.graph.initializer:
        if kept.name in codes:
            size += 4 * math.prod(kept.dims) - len(kept.raw_data)
        elif kept.name in qparams:
            size -= kept.ByteSize()
    return size
