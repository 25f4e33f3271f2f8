"""Powers of two near a scale, exact on every device: they are read off the bits of float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lfq_lightning.ops.reference import EPS
from lfq_lightning.private import transforms_active

_EXPONENT = 0x7F800000
_MANTISSA = 0x007FFFFF
_ABOVE_SQRT_2 = 0x3504F4  # mantissa of the least float32 above the square root of two
_LARGEST = 2.0**126


def power_of_two_above(scale: Tensor) -> Tensor:
    """2^ceil(log2 s), where Jain et al. 2020 (TQT, arXiv 1903.08066) starts: the least that is not below the scale.

    Args:
        scale: positive float32; what is smaller than float32's epsilon counts as that.

    Returns:
        A tensor of the same shape.

    Example:
        >>> import torch
        >>> power_of_two_above(torch.tensor([0.25, 0.26, 3.0]))
        tensor([0.2500, 0.5000, 4.0000])
    """
    return _exponent_of(scale, _MANTISSA)


def power_of_two_below(x: Tensor) -> Tensor:
    """2^floor(log2 x): the greatest that is not above x.

    Args:
        x: positive float32; what is smaller than the least normal number counts as that.

    Returns:
        A tensor of the same shape.

    Example:
        >>> import torch
        >>> power_of_two_below(torch.tensor([0.25, 0.26, 3.0]))
        tensor([0.2500, 0.2500, 2.0000])
    """
    bits = x.clamp(min=torch.finfo(torch.float32).tiny).view(torch.int32)
    return (bits & _EXPONENT).view(torch.float32)


def nearest_power_of_two(scale: Tensor) -> Tensor:
    """2^round(log2 s), with the gradient that rounding passes straight through: that of log2 s.

    Jain et al. 2020 (TQT, arXiv 1903.08066), equations 7 and 8: with p = 2^round(log2 s),

        dL/d(log2 s) = dL/dp * p * ln 2, and so dL/ds = dL/dp * p / s

    Args:
        scale: positive float32; what is smaller than float32's epsilon counts as that.

    Returns:
        A tensor of the same shape.

    Example:
        >>> import torch
        >>> nearest_power_of_two(torch.tensor([0.25, 0.35, 0.36, 3.0]))
        tensor([0.2500, 0.2500, 0.5000, 4.0000])
    """
    # Without `apply`, whose look at the signature costs more than the rest, where nothing but the call itself is left.
    if torch.compiler.is_compiling() or transforms_active():
        return _Nearest.apply(scale)
    return _call(scale)


class _Nearest(torch.autograd.Function):
    @staticmethod
    def forward(scale: Tensor) -> Tensor:
        return _exponent_of(scale, _MANTISSA + 1 - _ABOVE_SQRT_2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output / inputs[0].clamp(min=EPS))
        ctx.set_materialize_grads(False)  # where a quantizer does not learn there is no gradient, and not zero

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Tensor | None:
        (ratio,) = ctx.saved_tensors
        return None if gradient is None else gradient * ratio

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], scale: Tensor) -> tuple[Tensor, int | None]:
        return nearest_power_of_two(scale), in_dims[0]


_call = super(torch.autograd.Function, _Nearest).apply


def _exponent_of(scale: Tensor, carry: int) -> Tensor:
    """The power of two of a float32's exponent, once `carry` was added to its bits."""
    bits = scale.clamp(EPS, _LARGEST).view(torch.int32)
    return ((bits + carry) & _EXPONENT).view(torch.float32)
