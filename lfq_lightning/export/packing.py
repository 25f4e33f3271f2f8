"""Integer weights in an ONNX file, two codes to a byte where they fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lfq_lightning.export.integers import IntegerWeight

if TYPE_CHECKING:
    import onnx


def pack(proto: onnx.ModelProto, weights: Mapping[str, IntegerWeight], opset: int) -> None:
    """Store the codes of weights of at most 4 bits two to a byte, each weight with zero points of its own.

    ONNX Runtime's `session.x64quantprecision` fails on zero points that several weights share.
    """
    import onnx
    from onnx import numpy_helper

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


def _nibbles(values: np.ndarray) -> bytes:
    """Two values a byte, the first in the low half, as ONNX packs them."""
    halves = np.append(values.flatten(), np.zeros(values.size % 2, values.dtype)).view(np.uint8) & 0xF
    return (halves[::2] | halves[1::2] << 4).tobytes()
