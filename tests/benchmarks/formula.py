"""The learnable fake quantization of 2020 as plain PyTorch operations, written from its equations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class PythonFormula(torch.autograd.Function):
    """Xq = round(X / s + z) with z = trunc(clamp(zero_point + 0.5)), and straight-through gradients from Xq.

    dL/ds sums dY times (qmin - z), (qmax - z) or (Xfq - X) / s, and dL/dz sums -s dY where X saturates.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
    ) -> Tensor:
        shape = [1] * x.ndim
        if axis is not None:
            shape[axis] = x.shape[axis]
        s = scale.reshape(shape)
        z = (zero_point + 0.5).clamp(quant_min, quant_max).trunc().reshape(shape)
        codes = torch.round(x / s + z)
        y = (codes.clamp(quant_min, quant_max) - z) * s
        ctx.save_for_backward(x, y, codes, s, z)
        ctx.settings = quant_min, quant_max, axis
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, y, codes, s, z = ctx.saved_tensors
        quant_min, quant_max, axis = ctx.settings
        below, above = (codes <= quant_min).float(), (codes >= quant_max).float()
        inside = 1.0 - below - above
        dx = dy * (codes >= quant_min).float() * (codes <= quant_max).float()
        d_scale = dy * (below * (quant_min - z) + above * (quant_max - z) + inside * (y - x) / s)
        d_zero_point = dy * (below + above) * -s
        rest = [d for d in range(x.ndim) if d != axis]
        return dx, d_scale.sum(rest).reshape(-1), d_zero_point.sum(rest).reshape(-1), None, None, None
