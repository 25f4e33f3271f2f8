"""The Triton kernels for CUDA: launched without waiting for the device, and one operation each to torch.compile."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv
from triton.runtime.interpreter import InterpretedFunction

from lfq_lightning.ops import triton_kernels as kernels
from lfq_lightning.ops.layout import lay_out
from lfq_lightning.ops.triton_tiles import Adding, Tiles, adding, backward_tiles, forward_tiles

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# TRITON_INTERPRET=1 when this module was imported: the kernels then run on the CPU, slowly.
INTERPRETED = isinstance(kernels.forward_runs_kernel, InterpretedFunction)

_NOTED = 512  # channels whose qparams one program writes


class _Cut(NamedTuple):
    channels: int
    numel: int
    noting: int  # programs
    forward: Tiles
    backward: Tiles
    adding: Adding | None


@lru_cache(maxsize=4096)
def _cut(
    shape: torch.Size, stride: tuple[int, ...], axis: int | None, group_size: int | None, scales: int, itemsize: int
) -> _Cut | None:
    layout = lay_out(shape, stride, axis, group_size, scales)
    if layout is None:
        return None
    backward, channels = backward_tiles(layout), layout.channels
    tiles = forward_tiles(layout, itemsize), backward, adding(backward, channels)
    return _Cut(channels, layout.numel, cdiv(channels, _NOTED), *tiles)


def serves(x: Tensor) -> bool:
    """Whether the kernels read this tensor: plain, strided, of one of four dtypes, where they can run."""
    if x.dtype not in DTYPES or not (x.is_cuda or INTERPRETED):
        return False
    return torch.compiler.is_compiling() or (
        x.layout is torch.strided and type(x) in (Tensor, torch.nn.Parameter) and not x.is_neg()
    )


def forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    group_size: int | None,
) -> tuple[Tensor, Tensor]:
    """See `reference.forward`; the second result is s, low and high, shape (3, scales)."""
    launch = _forward_op if torch.compiler.is_compiling() else _forward
    return launch(x, scale, zero_point, quant_min, quant_max, axis, group_size)


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
    """See `reference.backward`."""
    launch = _backward_op if torch.compiler.is_compiling() else _backward
    dx, d_scale, d_zero_point = launch(
        dy, x, qparams, axis, group_size, grad_factor, saturation, need_scale, need_zero_point
    )
    return dx, d_scale if need_scale else None, d_zero_point if need_zero_point else None


def _forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    group_size: int | None,
) -> tuple[Tensor, Tensor]:
    if INTERPRETED and x.dtype is torch.bfloat16:  # the interpreter does not round to it, nor read its subnormals
        y, qparams = _forward(x.float(), scale, zero_point, quant_min, quant_max, axis, group_size)
        return y.bfloat16(), qparams
    y = torch.empty_like(x)
    cut = _cut(y.shape, y.stride(), axis, group_size, scale.numel(), y.itemsize)
    if cut is None:
        result, qparams = _forward(x.contiguous(), scale, zero_point, quant_min, quant_max, axis, group_size)
        return y.copy_(result), qparams
    if not _lie_alike(x, y):
        x = torch.empty_like(y).copy_(x)
    # Made of a tensor: the default dtype and device may be others.
    qparams = scale.new_empty((3, cut.channels))
    if cut.noting + cut.forward.programs:
        kernel = kernels.forward_columns_kernel if cut.forward.columns else kernels.forward_runs_kernel
        with torch.cuda.device_of(x):
            kernel[(cut.noting + cut.forward.programs,)](
                x,
                y,
                scale.resolve_neg().contiguous(),
                zero_point.resolve_neg().contiguous(),
                qparams,
                float(quant_min),
                float(quant_max),
                cut.noting,
                *cut.forward.arguments,
                NOTED=_NOTED,
                enable_fp_fusion=False,
                **cut.forward.options,
            )
    return y, qparams


def _backward(
    dy: Tensor,
    x: Tensor,
    qparams: Tensor,
    axis: int | None,
    group_size: int | None,
    grad_factor: float,
    saturation: str,
    need_scale: bool,
    need_zero_point: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = qparams.shape[1]
    settings = (grad_factor, saturation, need_scale, need_zero_point)
    if INTERPRETED and x.dtype is torch.bfloat16:
        dx, d_scale, d_zero_point = _backward(dy.float(), x.float(), qparams, axis, group_size, *settings)
        return dx.bfloat16(), d_scale, d_zero_point
    dx = torch.empty_like(x)
    cut = _cut(dx.shape, dx.stride(), axis, group_size, channels, dx.itemsize)
    if cut is None:
        result, d_scale, d_zero_point = _backward(dy, x.contiguous(), qparams, axis, group_size, *settings)
        return dx.copy_(result), d_scale, d_zero_point
    if not _lie_alike(x, dx):
        x = torch.empty_like(dx).copy_(x)
    if dy.dtype is not x.dtype or dy.is_neg() or not _lie_alike(dy, dx):
        dy = torch.empty_like(dx).copy_(dy)
    needs = (need_scale, need_zero_point)
    d_scale, d_zero_point = (qparams.new_empty(channels if need else 0) for need in needs)
    if cut.numel == 0:
        return dx, d_scale.zero_(), d_zero_point.zero_()
    with torch.cuda.device_of(x):
        _launch_backward(cut, (dy, x, dx, qparams), (d_scale, d_zero_point), grad_factor, saturation, needs)
    return dx, d_scale, d_zero_point


def _launch_backward(
    cut: _Cut,
    tensors: tuple[Tensor, ...],
    gradients: tuple[Tensor, Tensor],
    grad_factor: float,
    saturation: str,
    needs: tuple[bool, bool],
) -> None:
    """One pass over the tensors, and one over the partial sums unless these are the gradients."""
    tiles, last = cut.backward, cut.adding
    flags = {"NEED_SCALE": needs[0], "NEED_ZERO_POINT": needs[1], "enable_fp_fusion": False}
    options = {**tiles.options, **flags, "SATURATION": saturation}
    grid, sums = (tiles.programs,), gradients
    if last is not None:
        d_scale, d_zero_point = gradients
        sums = d_scale.new_empty(tiles.sums * needs[0]), d_zero_point.new_empty(tiles.sums * needs[1])
    if tiles.columns:
        kernels.backward_columns_kernel[grid](*tensors, *sums, *tiles.arguments, **options)
    else:
        kernels.backward_runs_kernel[grid](
            *tensors, *sums, grad_factor, *tiles.arguments, FINAL=last is None, **options
        )
    if last is not None and any(needs):
        kernels.add_up_kernel[(last.programs,)](
            *sums, tensors[-1], *gradients, *last.arguments, grad_factor, **flags, **last.options
        )


def _lie_alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order; dimensions of 1 have none."""
    return all(i == j or n == 1 for i, j, n in zip(a.stride(), b.stride(), a.shape, strict=True))


# ---- torch.compile: the operations are opaque, and launch the same kernels ------------------------------------------

_forward_op = torch.library.custom_op("lfq_lightning::fake_quantize", _forward, mutates_args=())
_backward_op = torch.library.custom_op("lfq_lightning::fake_quantize_backward", _backward, mutates_args=())


@_forward_op.register_fake
def _(x: Tensor, scale: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), scale.new_empty((3, scale.shape[0]))


@_backward_op.register_fake
def _(dy: Tensor, x: Tensor, qparams: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    d_scale, d_zero_point = (qparams.new_empty(qparams.shape[1] if need else 0) for need in settings[-2:])
    return torch.empty_like(x), d_scale, d_zero_point
