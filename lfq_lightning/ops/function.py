"""The fake-quantize operation, whichever implementation computes it."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from lfq_lightning.ops.autograd import quantize, readable, refuse
from lfq_lightning.ops.layout import check_scales

Saturation = Literal["lsq", "exclusive", "inclusive"]

LARGEST_CODE = 2**16


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    group_size: int | None = None,
    grad_factor: float = 1.0,
    saturation: Saturation = "lsq",
) -> Tensor:
    """Round `x` to the integer grid of (`scale`, `zero_point`) and back, with gradients for all three.

    With s = max(scale, eps) and z = round(clamp(zero_point, quant_min, quant_max)), in float32:

        y = (clamp(round(x / s) + z, quant_min, quant_max) - z) * s

    which is ONNX's QuantizeLinear followed by DequantizeLinear. Rounding is half to even. Gradients are
    straight-through: LSQ (Esser et al. 2020, equations 3 and 5) for the scale, LSQ+ (Bhalgat et al. 2020) for the zero
    point. A NaN stays NaN, an infinity saturates, and neither contributes to any gradient.

    Args:
        x: any floating tensor, any shape and strides.
        scale: float32, positive, in units of x per integer step. Shape (1,), or (C,) with `axis`, or
            (O * ceil(I / group_size),) with `group_size`.
        zero_point: float32, of the shape of `scale`, in integer steps.
        quant_min: the smallest integer code.
        quant_max: the largest integer code. The range may exclude 0.
        axis: the dimension of x with one scale per index; None for one scale in all.
        group_size: for a weight of shape (O, I, ...), how many neighbouring inputs share one scale.
        grad_factor: multiplies the gradients of scale and zero point; LSQ's is 1 / sqrt(N * Q), with N the elements
            that share one scale, the batch not counted, and Q = max(|quant_min|, |quant_max|).
        saturation: which elements count as saturated in the gradients. "lsq": those with round-free x / s outside the
            range; "exclusive": those whose rounded value is outside (PyTorch's kernels); "inclusive": for scale and
            zero point also those that lie on the range's ends.

    Returns:
        A tensor of the shape, dtype and strides of x.

    Raises:
        TypeError: if a tensor has the wrong dtype.
        ValueError: if a shape, device, range, axis or option is wrong.

    Example:
        >>> import torch, lfq_lightning as lfq
        >>> x = torch.tensor([-1.0, -0.3, 0.26, 9.0])
        >>> lfq.fake_quantize(x, torch.tensor([0.5]), torch.tensor([0.0]), quant_min=-2, quant_max=1)
        tensor([-1.0000, -0.5000,  0.5000,  0.5000])
    """
    _check(x, scale, zero_point, quant_min, quant_max, axis, group_size, grad_factor, saturation)
    settings = (quant_min, quant_max, axis, group_size, float(grad_factor), saturation)
    return quantize(x, scale, zero_point, settings)


def check_range(quant_min: int, quant_max: int) -> None:
    """Raise unless the two are integers in order and within what float32 arithmetic holds exactly."""
    for name, value in (("quant_min", quant_min), ("quant_max", quant_max)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"`{name}` must be an int. Found {value!r} of type {type(value).__name__}.")
    if quant_min >= quant_max:
        raise ValueError(
            f"`quant_min` must be less than `quant_max`. Found {quant_min} and {quant_max}: exchange them, or give at "
            "least two codes."
        )
    if quant_min < -LARGEST_CODE or quant_max > LARGEST_CODE:
        raise ValueError(
            f"`quant_min` and `quant_max` must be between {-LARGEST_CODE} and {LARGEST_CODE}. Found {quant_min} and "
            f"{quant_max}: use at most 16 bits."
        )


def _check(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    group_size: int | None,
    grad_factor: float,
    saturation: str,
) -> None:
    check_range(quant_min, quant_max)
    for name, tensor in (("x", x), ("scale", scale), ("zero_point", zero_point)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}` must be a tensor. Found {tensor!r} of type {type(tensor).__name__}.")
    for name, number in (("axis", axis), ("group_size", group_size)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int)):
            raise TypeError(f"`{name}` must be an int or None. Found {number!r} of type {type(number).__name__}.")
    if isinstance(grad_factor, bool) or not isinstance(grad_factor, (int, float)):
        raise TypeError(f"`grad_factor` must be a number. Found {grad_factor!r} of type {type(grad_factor).__name__}.")
    if not x.is_floating_point():
        raise TypeError(f"`x` must be a floating tensor. Found {x.dtype}: convert it first, or leave it unquantized.")
    for name, p in (("scale", scale), ("zero_point", zero_point)):
        if p.ndim != 1:
            raise ValueError(
                f"`{name}` must have one dimension. Found shape {tuple(p.shape)}: use shape (1,) for one value."
            )
    if not readable(x, scale, zero_point):
        refuse(x, scale, zero_point)
    if axis is not None and group_size is not None:
        raise ValueError(f"Give `axis` or `group_size`, not both. Found axis={axis}, group_size={group_size}.")
    if group_size is not None and group_size < 1:
        raise ValueError(f"`group_size` must be at least 1. Found {group_size}.")
    check_scales(tuple(x.shape), axis, group_size, scale.numel())
    if saturation not in get_args(Saturation):
        raise ValueError(f"`saturation` must be one of {', '.join(get_args(Saturation))}. Found {saturation!r}.")
