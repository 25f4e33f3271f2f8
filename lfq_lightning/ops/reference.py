"""Fake quantization in plain torch: the documentation of the mathematics, and what torch.compile traces on CPU."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from lfq_lightning.ops.layout import check_scales

EPS = torch.finfo(torch.float32).eps


def effective(scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """S and z, shape (2, scales): scales above zero and integer zero points within the range."""
    return torch.stack(_used(scale, zero_point, quant_min, quant_max))


def _used(scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    return scale.clamp(min=EPS), zero_point.clamp(quant_min, quant_max).round()


def forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    group_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Y = (clamp(round(x / s) + z, quant_min, quant_max) - z) * s, rounding half to even, and what backward needs.

    The second result is s, quant_min - z and quant_max - z, shape (3, scales), whatever the backend.
    """
    check_scales(x.shape, axis, group_size, scale.numel())
    used = effective(scale, zero_point, quant_min, quant_max)
    s, z = (spread(p, x.shape, axis, group_size) for p in used)
    q = torch.clamp((x.float() / s).round() + z, quant_min, quant_max)
    y = (q - z) * s
    # No conversion that returns y itself: Dynamo of torch 2.11 would count it twice, and give the gradient to neither.
    y = y if y.dtype == x.dtype else y.to(x.dtype)
    return y, torch.stack((used[0], quant_min - used[1], quant_max - used[1]))


def backward(
    dy: Tensor,
    x: Tensor,
    qparams: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    group_size: int | None,
    grad_factor: float,
    saturation: str,
    need_scale: bool,
    need_zero_point: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, scale and zero point; a non-finite x contributes zero to all three.

    LSQ (Esser et al. 2020), equations 3 and 5, with LSQ+ (Bhalgat et al. 2020), section 3.1, for the zero point.
    """
    s, low, high = (spread(p, x.shape, axis, group_size) for p in qparams)
    value, g = x.float(), dy.float()
    u = value / s
    r = u.round()
    finite = value.isfinite()
    if saturation == "lsq":
        passes = learns = (low < u) & (u < high)
    elif saturation == "exclusive":
        passes = learns = (low <= r) & (r <= high)
    else:
        passes, learns = (low <= r) & (r <= high), (low < r) & (r < high)
    dx = torch.where(passes & finite, dy, 0.0).to(x.dtype)  # as it came: float64 holds what float32 does not
    d_scale = d_zero_point = None
    if need_scale:
        c = torch.clamp(r, low, high)
        terms = torch.where(finite, g * torch.where(learns, c - u, c), 0.0)
        d_scale = _share_sums(terms, axis, group_size, qparams.shape[1]) * grad_factor
    if need_zero_point:
        terms = torch.where(finite & ~learns, -g * s, 0.0)
        d_zero_point = _share_sums(terms, axis, group_size, qparams.shape[1]) * grad_factor
    return dx, d_scale, d_zero_point


def spread(p: Tensor, shape: torch.Size, axis: int | None, group_size: int | None) -> Tensor:
    """The qparam of each element, as a view that broadcasts against x where there is one."""
    if group_size is not None:
        groups = math.ceil(shape[1] / group_size)
        each = p.view(shape[0], groups).repeat_interleave(group_size, dim=1)[:, : shape[1]]
        return each.reshape(shape[0], shape[1], *[1] * (len(shape) - 2))
    if axis is None:
        return p.view([1] * len(shape))
    return p.view([-1 if d == axis % len(shape) else 1 for d in range(len(shape))])


def _share_sums(terms: Tensor, axis: int | None, group_size: int | None, scales: int) -> Tensor:
    """The sum of the terms that share one scale, shape (scales,)."""
    compiling = torch.compiler.is_compiling()  # a length that depends on data is then not known
    if not compiling and terms.numel() == 0:
        return terms.new_zeros(scales)
    if group_size is not None:
        rows, inputs = terms.shape[:2]
        groups = math.ceil(inputs / group_size)
        flat = terms.reshape(rows, inputs, -1)
        flat = torch.nn.functional.pad(flat, (0, 0, 0, groups * group_size - inputs))
        flat = flat.reshape(rows * groups, -1)
    elif axis is None:
        flat = terms.reshape(1, -1)
    else:
        flat = terms.movedim(axis, 0).reshape(terms.shape[axis], -1)
    return flat.sum(1) if compiling else _pairwise_sum(flat)


def _pairwise_sum(flat: Tensor) -> Tensor:
    """Sums of the rows by halves: elementwise additions alone, so no number of threads changes their order."""
    while (length := flat.shape[1]) > 1:
        half = (length + 1) // 2
        folded = flat[:, :half].clone()
        folded[:, : length - half] += flat[:, half:]
        flat = folded
    return flat[:, 0]


def measure(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    group_size: int | None,
) -> Tensor:
    """What a record keeps of a quantizer's input, made without waiting for the device.

    The share of the elements that are clamped to the range of codes; 1 if any is not finite, else 0; and from the third
    entry on x / s of an even choice of the elements, a thousand or two, or all where there are fewer.
    """
    s, z = (spread(p, x.shape, axis, group_size) for p in _used(scale, zero_point, quant_min, quant_max))
    if not x.numel():
        return torch.stack((s.new_full((), torch.nan), s.new_zeros(())))
    u = x.float() / s
    every = _stride(x.numel())
    chosen = u.as_strided((-(-x.numel() // every),), (every,)).clone()  # as they lie in memory, which has no holes
    r = u.round_()
    clamped = torch.count_nonzero((r < quant_min - z) | (r > quant_max - z)).float()
    return torch.cat(((clamped / x.numel())[None], not_finite(x)[None], chosen))


@lru_cache(maxsize=4096)
def _stride(numel: int) -> int:
    """One without a divisor in common with any dimension, lest it choose a few channels alone."""
    every = max(1, numel // 1024)
    while math.gcd(every, numel) > 1:
        every -= 1
    return every


def not_finite(x: Tensor) -> Tensor:
    """1 if any element is not finite, else 0, in one pass and without waiting for the device; x is not empty."""
    low, high = x.aminmax()  # a NaN anywhere makes both NaN
    return (low * 0 != high * 0).float()  # which is 0 for each that is finite, and NaN for others
