"""What a report says about each layer's weight: its size, and its distribution before and after quantization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lfq_lightning.ops import spread
from lfq_lightning.placement.points import Point, points, weights
from lfq_lightning.records.summary import packed_bytes

_MOST_BINS = 121
_MOST_CODES = 256


@dataclass(frozen=True)
class WeightFindings:
    """One quantized weight.

    Args:
        layer: dotted name, of tied weights the first.
        bits: of a code.
        shape: of the weight.
        float_bytes: in float32.
        packed_bytes: as integer codes with their scales.
        centres: middles of the bins of both histograms, in units of the weight.
        before: weights in each bin.
        after: fake-quantized weights in each bin.
        codes: integer codes, or the first of several where there are more than 256.
        used: weights of each code.
    """

    layer: str
    bits: int
    shape: tuple[int, ...]
    float_bytes: int
    packed_bytes: int
    centres: list[float]
    before: list[int]
    after: list[int]
    codes: list[int]
    used: list[int]


@torch.no_grad()
def describe_weights(model: nn.Module) -> list[WeightFindings]:
    """Every quantized weight of a model, tied ones once."""
    return [_describe(point) for point in weights(points(model))]


def _describe(point: Point) -> WeightFindings:
    quantizer, weight = point.quantizer, point.whole_parameter().float()
    quantized = quantizer.quantized(weight)
    scale, zero_point = (
        spread(p, weight.shape, quantizer.axis, quantizer.group_size) for p in quantizer.used_qparams()
    )
    low, high = quantizer.code_range
    codes = (quantized / scale + zero_point).round()
    finite = weight[weight.isfinite()]
    largest = float(max(finite.abs().max(), quantized[quantized.isfinite()].abs().max())) if finite.numel() else 1.0
    # Odd, and symmetric around zero: a grid's zero lies in the middle of one.
    bins = min(_MOST_BINS, 2 * (math.isqrt(weight.numel()) // 2) + 1)
    edges = np.linspace(-largest or -1.0, largest or 1.0, bins + 1)
    step = -(-(high - low + 1) // _MOST_CODES)
    code_edges = np.arange(low, high + step + 1, step) - 0.5
    return WeightFindings(
        point.site,
        quantizer.bitwidth,
        tuple(weight.shape),
        4 * weight.numel(),
        packed_bytes(weight, quantizer),
        ((edges[1:] + edges[:-1]) / 2).tolist(),
        _counts(weight, edges),
        _counts(quantized, edges),
        (code_edges[:-1] + 0.5).astype(int).tolist(),
        _counts(codes, code_edges),
    )


def _counts(values: Tensor, edges: npt.NDArray[np.floating[Any]]) -> list[int]:
    flat = values.flatten().cpu().numpy()
    counts: list[int] = np.histogram(flat[np.isfinite(flat)], edges)[0].tolist()
    return counts


def bytes_in_float(model: nn.Module) -> int:
    """Bytes of every parameter and buffer that is neither a quantized weight nor a quantizer's."""
    found = points(model)
    quantized = {id(point.parameter) for point in weights(found)}
    inside = {id(t) for p in found.values() for t in (*p.quantizer.parameters(), *p.quantizer.buffers())}
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for i, t in tensors.items() if i not in quantized and i not in inside)
