"""Fake quantization one element at a time in plain Python: the definition that every backend must meet.

Scalars are `numpy.float32`, so each operation rounds once, to float32. The seed's equations stand at the end.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

F = np.float32
EPS = np.finfo(F).eps


class Terms(NamedTuple):
    """One element's share of the three gradients, before the gradient factor."""

    x: np.float32
    scale: np.float32
    zero_point: np.float32


class Gradients(NamedTuple):
    """The gradient of x; float64 sums of the other float32 terms, and of their magnitudes."""

    x: Tensor
    scale: Tensor
    scale_magnitude: Tensor
    zero_point: Tensor
    zero_point_magnitude: Tensor


def clamp(value: np.float32, low: float, high: float) -> np.float32:
    return F(low) if value < low else F(high) if value > high else value


def effective(
    scale: np.float32, zero_point: np.float32, quant_min: int, quant_max: int
) -> tuple[np.float32, np.float32]:
    """The scale, above zero, and the zero point, an integer of the range."""
    return max(F(scale), EPS), np.rint(clamp(F(zero_point), quant_min, quant_max))


@np.errstate(all="ignore")
def fake_quantize(
    x: np.float32, scale: np.float32, zero_point: np.float32, quant_min: int, quant_max: int
) -> np.float32:
    s, z = effective(scale, zero_point, quant_min, quant_max)
    q = clamp(np.rint(x / s) + z, quant_min, quant_max)
    return (q - z) * s


@np.errstate(all="ignore")
def gradient_terms(
    x: np.float32,
    g: np.float32,
    scale: np.float32,
    zero_point: np.float32,
    quant_min: int,
    quant_max: int,
    saturation: str,
) -> Terms:
    if not np.isfinite(x):
        return Terms(F(0), F(0), F(0))
    s, z = effective(scale, zero_point, quant_min, quant_max)
    u = x / s
    r = np.rint(u)
    c = clamp(r + z, quant_min, quant_max) - z
    low, high = quant_min - z, quant_max - z
    if saturation == "lsq":
        passes = learns = bool(low < u < high)
    elif saturation == "exclusive":
        passes = learns = bool(low <= r <= high)
    else:
        passes, learns = bool(low <= r <= high), bool(low < r < high)
    return Terms(g if passes else F(0), g * (c - u if learns else c), F(0) if learns else g * -s)


def scale_index(index: tuple[int, ...], shape: tuple[int, ...], axis: int | None, group_size: int | None) -> int:
    """Which scale the element at this index uses."""
    if group_size is not None:
        return index[0] * math.ceil(shape[1] / group_size) + index[1] // group_size
    return 0 if axis is None else index[axis]


def forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """`fake_quantize` of every element, contiguous, in the dtype of x."""
    values, s, z = x.detach().float().numpy(), scale.detach().numpy(), zero_point.detach().numpy()
    y = np.empty(values.shape, F)
    for index in np.ndindex(values.shape):
        at = scale_index(index, values.shape, axis, group_size)
        y[index] = fake_quantize(values[index], s[at], z[at], quant_min, quant_max)
    return torch.from_numpy(y).to(x.dtype)


def backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
    saturation: str = "lsq",
) -> Gradients:
    """`gradient_terms` of every element, summed where a scale is shared."""
    values, g = x.detach().float().numpy(), dy.float().numpy()
    s, z = scale.detach().numpy(), zero_point.detach().numpy()
    dx = np.empty(values.shape, F)
    sums = np.zeros((4, len(s)))
    for index in np.ndindex(values.shape):
        at = scale_index(index, values.shape, axis, group_size)
        terms = gradient_terms(values[index], g[index], s[at], z[at], quant_min, quant_max, saturation)
        dx[index] = terms.x
        sums[:, at] += terms.scale, abs(terms.scale), terms.zero_point, abs(terms.zero_point)
    return Gradients(torch.from_numpy(dx).to(x.dtype), *torch.from_numpy(sums))


# ---- the seed: PyTorch's reference functions of 2020, at integer zero points ----------------------------------------


def seed_fake_quantize(x: float, scale: float, zero_point: int, quant_min: int, quant_max: int) -> float:
    """`torch.fake_quantize_per_tensor_affine`, in float64."""
    code = min(max(round(x / scale + zero_point), quant_min), quant_max)
    return (code - zero_point) * scale


def seed_gradient_terms(x: float, g: float, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Terms:
    """`_calculate_X_grad`, `_calculate_scale_grad` and `_calculate_zero_point_grad`, in float64."""
    code = round(x / scale + zero_point)
    dx = g if quant_min <= code <= quant_max else 0.0
    code = min(max(code, quant_min), quant_max)
    if code == quant_min:
        d_scale = quant_min - zero_point
    elif code == quant_max:
        d_scale = quant_max - zero_point
    else:
        d_scale = (seed_fake_quantize(x, scale, zero_point, quant_min, quant_max) - x) / scale
    d_zero_point = -scale if code in (quant_min, quant_max) else 0.0
    return Terms(dx, d_scale * g, d_zero_point * g)
