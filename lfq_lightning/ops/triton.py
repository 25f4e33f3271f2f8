"""The Triton kernels for CUDA: launched without waiting for the device, and one operation each to torch.compile."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton import cdiv
from triton.runtime.interpreter import InterpretedFunction

from lfq_lightning.ops import triton_kernels as kernels
from lfq_lightning.ops.layout import lay_out
from lfq_lightning.ops.triton_launch import Launch
from lfq_lightning.ops.triton_tiles import adding, backward_tiles, forward_tiles

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# TRITON_INTERPRET=1 when this module was imported: the kernels then run on the CPU, slowly.
INTERPRETED = isinstance(kernels.forward_runs_kernel, InterpretedFunction)

_NOTED = 512  # channels whose qparams one program writes


class _Plan:
    """All about tensors of one shape, strides, dtype, device and granularity that no call needs to find out again."""

    def __init__(
        self,
        shape: torch.Size,
        stride: tuple[int, ...],
        dtype: torch.dtype,
        device: int,
        axis: int | None,
        group_size: int | None,
        scales: int,
    ) -> None:
        # What torch's own elementwise operations on such a tensor would give.
        self.shape, self.device = shape, device
        self.stride = torch.empty_like(torch.empty_strided(shape, stride, device="meta")).stride()
        self.as_it_lies = self.reads(stride)
        layout = lay_out(shape, self.stride, axis, group_size, scales)
        self.in_runs = layout is not None
        if layout is None:
            return
        self.channels, self.empty, self.columns = layout.channels, layout.numel == 0, layout.width > 0
        self._tiles = backward_tiles(layout)
        self._adding = adding(self._tiles, layout.channels)
        self._backward: dict[tuple[str, bool, bool], tuple[Launch, Launch | None]] = {}
        tiles, noting = forward_tiles(layout, dtype.itemsize), cdiv(layout.channels, _NOTED)
        kernel = kernels.forward_columns_kernel if tiles.columns else kernels.forward_runs_kernel
        options = {**tiles.options, "NOTED": _NOTED}
        self.forward = Launch(kernel, noting + tiles.programs, (noting, *tiles.arguments), options, device)

    def reads(self, stride: tuple[int, ...]) -> bool:
        """Whether the kernels find elements with these strides in the order of the results; one alone has none."""
        return all(i == j or n == 1 for i, j, n in zip(stride, self.stride, self.shape, strict=True))

    def backward(self, saturation: str, need_scale: bool, need_zero_point: bool) -> tuple[Launch, Launch | None]:
        """The pass over the tensors, and that over its partial sums unless these are the gradients."""
        settings = saturation, need_scale, need_zero_point
        if settings not in self._backward:
            self._backward[settings] = self._launches(*settings)
        return self._backward[settings]

    @property
    def sums(self) -> int:
        """The partial sums of one gradient."""
        return self._tiles.sums

    def _launches(self, saturation: str, need_scale: bool, need_zero_point: bool) -> tuple[Launch, Launch | None]:
        tiles, last = self._tiles, self._adding
        flags = {"NEED_SCALE": need_scale, "NEED_ZERO_POINT": need_zero_point}
        options = {**tiles.options, **flags, "SATURATION": saturation}
        if tiles.columns:
            kernel = kernels.backward_columns_kernel
        else:
            kernel, options = kernels.backward_runs_kernel, {**options, "FINAL": last is None}
        over = Launch(kernel, tiles.programs, tiles.arguments, options, self.device)
        if last is None or not (need_scale or need_zero_point):
            return over, None
        options = {**flags, **last.options}
        return over, Launch(kernels.add_up_kernel, last.programs, last.arguments, options, self.device)


_plan = lru_cache(maxsize=4096)(_Plan)


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
    settings = axis, group_size, grad_factor, saturation, need_scale, need_zero_point
    if not torch.compiler.is_compiling():
        return _backward(dy, x, qparams, *settings)
    dx, d_scale, d_zero_point = _backward_op(dy, x, qparams, *settings)
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
    plan = _plan(x.shape, x.stride(), x.dtype, x.get_device(), axis, group_size, scale.numel())
    y = torch.empty_like(x)
    if not plan.in_runs:
        result, qparams = _forward(x.contiguous(), scale, zero_point, quant_min, quant_max, axis, group_size)
        return y.copy_(result), qparams
    if not plan.as_it_lies:
        x = torch.empty_like(y).copy_(x)
    # Made of a tensor: the default dtype and device may be others.
    qparams = scale.new_empty((3, plan.channels))
    if plan.channels:
        scale, zero_point = scale.resolve_neg().contiguous(), zero_point.resolve_neg().contiguous()
        plan.forward((x, y, scale, zero_point, qparams), float(quant_min), float(quant_max))
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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    channels = qparams.shape[1]
    settings = (grad_factor, saturation, need_scale, need_zero_point)
    if INTERPRETED and x.dtype is torch.bfloat16:
        dx, d_scale, d_zero_point = _backward(dy.float(), x.float(), qparams, axis, group_size, *settings)
        return dx.bfloat16(), d_scale, d_zero_point
    plan = _plan(x.shape, x.stride(), x.dtype, x.get_device(), axis, group_size, channels)
    dx = torch.empty_like(x)
    if not plan.in_runs:
        result, d_scale, d_zero_point = _backward(dy, x.contiguous(), qparams, axis, group_size, *settings)
        return dx.copy_(result), d_scale, d_zero_point
    if not plan.as_it_lies:
        x = torch.empty_like(dx).copy_(x)
    if dy.dtype is not x.dtype or dy.is_neg() or not (dy.stride() == plan.stride or plan.reads(dy.stride())):
        dy = torch.empty_like(dx).copy_(dy)
    d_scale = qparams.new_empty(channels) if need_scale else None
    d_zero_point = qparams.new_empty(channels) if need_zero_point else None
    if plan.empty:
        for gradient in (d_scale, d_zero_point):
            if gradient is not None:
                gradient.zero_()
        return dx, d_scale, d_zero_point
    # Kernels do not look at what is not needed, and any tensor stands for it.
    gradients = [qparams if d is None else d for d in (d_scale, d_zero_point)]
    over, last = plan.backward(saturation, need_scale, need_zero_point)
    numbers = () if plan.columns else (grad_factor,)
    if last is None:
        over((dy, x, dx, qparams, *gradients), *numbers)
    else:
        sums = [qparams if d is None else d.new_empty(plan.sums) for d in (d_scale, d_zero_point)]
        over((dy, x, dx, qparams, *sums), *numbers)
        last((*sums, qparams, *gradients), grad_factor)
    return dx, d_scale, d_zero_point


# ---- torch.compile: the operations are opaque, and launch the same kernels ------------------------------------------


def _backward_of_op(
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
    settings = axis, group_size, grad_factor, saturation, need_scale, need_zero_point
    dx, *gradients = _backward(dy, x, qparams, *settings)
    d_scale, d_zero_point = (qparams.new_empty(0) if d is None else d for d in gradients)
    return dx, d_scale, d_zero_point


_forward_op = torch.library.custom_op("lfq_lightning::fake_quantize", _forward, mutates_args=())
_backward_op = torch.library.custom_op("lfq_lightning::fake_quantize_backward", _backward_of_op, mutates_args=())


@_forward_op.register_fake
def _(x: Tensor, scale: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), scale.new_empty((3, scale.shape[0]))


@_backward_op.register_fake
def _(dy: Tensor, x: Tensor, qparams: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    d_scale, d_zero_point = (qparams.new_empty(qparams.shape[1] if need else 0) for need in settings[-2:])
    return torch.empty_like(x), d_scale, d_zero_point
