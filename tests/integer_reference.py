"""Runs an exported ONNX graph of Conv, Gemm and Relu in integers alone, from its input's codes to its last layer.

Products are summed in int32. The step to the next layer's codes multiplies by a 31-bit integer and shifts (Jacob et al.
2018, arXiv 1712.05877, section 2.2), with the bias as an integer of the same fixed point.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper


@dataclass(frozen=True)
class Codes:
    """Integers of a tensor, of which each step is worth `scale`."""

    q: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray

    @property
    def centred(self) -> np.ndarray:
        return self.q.astype(np.int32) - self.zero_point.astype(np.int32)


@dataclass(frozen=True)
class Sums:
    """A layer's int32 sums; each element's step, its bias, and the ends that a Relu or a Clip sets."""

    total: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    low: float = -np.inf
    high: float = np.inf

    def to_codes(self, scale: float, zero_point: int, kind: np.dtype) -> np.ndarray:
        """The next layer's codes."""
        factor = self.scale.astype(np.float64) / scale  # these constants would be made at compile time
        shift = 30 - np.floor(np.log2(factor)).astype(np.int64)
        multiplier = np.round(np.ldexp(factor, shift)).astype(np.int64)
        bias = np.round(np.ldexp(self.bias.astype(np.float64) / scale, shift)).astype(np.int64)
        low, high = (self.end(end, scale, zero_point, kind) for end in (self.low, self.high))
        one = np.int64(1)
        rounded = (self.total.astype(np.int64) * multiplier + bias + (one << (shift - 1))) >> shift
        return np.clip(rounded + zero_point, low, high).astype(kind)

    def end(self, value: float, scale: float, zero_point: int, kind: np.dtype) -> int:
        limits = np.iinfo(kind)
        return int(np.clip(np.round(value / scale) + zero_point, limits.min, limits.max))

    @property
    def values(self) -> np.ndarray:
        """What the last layer gives, in float."""
        return np.clip(self.total * self.scale.astype(np.float64) + self.bias, self.low, self.high)


def run_in_integers(path: Path, x: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The codes of each QuantizeLinear by the name of its result, and the output."""
    graph = onnx.load(path).graph
    values: dict[str, Any] = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    values[graph.input[0].name] = x
    codes = {}
    for node in graph.node:
        given = [values[name] for name in node.input]
        first = given[0]
        settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        result: Any
        if node.op_type == "QuantizeLinear":
            scale, zero_point = float(given[1]), int(given[2])
            if isinstance(first, Sums):
                result = first.to_codes(scale, zero_point, given[2].dtype)
            else:  # the input of the network, where float ends
                limits = np.iinfo(given[2].dtype)
                rounded = np.round(first / given[1]).astype(np.int64) + zero_point
                result = np.clip(rounded, limits.min, limits.max).astype(given[2].dtype)
            codes[node.output[0]] = result
        elif node.op_type == "DequantizeLinear":
            result = Codes(*given)
        elif node.op_type in ("Conv", "Gemm"):
            result = _layer(node.op_type, settings, *given)
        elif node.op_type == "Sub":  # a bias of its own
            result = replace(first, bias=first.bias - given[1])
        elif node.op_type == "Relu":
            result = replace(first, low=max(first.low, 0.0))
        elif node.op_type == "Clip" and isinstance(first, Sums):
            result = replace(first, low=max(first.low, float(given[1])), high=min(first.high, float(given[2])))
        elif node.op_type == "Clip":
            result = np.clip(first, given[1], given[2])
        elif node.op_type == "Reshape":
            shape = (first.total.shape[0], -1)
            result = replace(
                first,
                total=first.total.reshape(shape),
                scale=first.scale.reshape(shape),
                bias=first.bias.reshape(shape),
            )
        else:
            raise NotImplementedError(node.op_type)
        values[node.output[0]] = result
    return codes, values[graph.output[0].name].values


def _layer(kind: str, settings: dict[str, Any], x: Codes, weight: Codes, bias: np.ndarray | None = None) -> Sums:
    channels = (-1, *[1] * (weight.q.ndim - 1))
    w = weight.q.astype(np.int32) - weight.zero_point.astype(np.int32).reshape(channels)
    if kind == "Gemm":
        assert settings["transB"] == 1
        total = _summed("ni,oi->no", x.centred, w)
    else:
        total = _convolved(x.centred, w, settings)
    outer = (1, -1, *[1] * (total.ndim - 2))
    scale = np.broadcast_to((x.scale * weight.scale).reshape(outer), total.shape)
    bias = np.zeros(1, np.float32) if bias is None else bias.reshape(outer)
    return Sums(total, scale, np.broadcast_to(bias, total.shape))


def _convolved(x: np.ndarray, w: np.ndarray, settings: dict[str, Any]) -> np.ndarray:
    top, left, bottom, right = settings["pads"]
    step, groups = settings["strides"], settings["group"]
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, w.shape[2:], axis=(2, 3))[:, :, :: step[0], :: step[1]]
    parts = zip(np.split(windows, groups, axis=1), np.split(w, groups), strict=True)
    return np.concatenate([_summed("nihwkl,oikl->nohw", part, weight) for part, weight in parts], axis=1)


def _summed(products: str, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The sums in int32, which are checked not to overflow."""
    total: np.ndarray = np.einsum(products, x, w, dtype=np.int32)
    assert (total == np.einsum(products, x, w, dtype=np.int64)).all()
    return total
