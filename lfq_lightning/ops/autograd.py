"""The fake-quantize operation as autograd, torch.func and torch.compile see it."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lfq_lightning.ops.backends import select
from lfq_lightning.ops.batching import batched, fold, folded_axis, unfold
from lfq_lightning.private import is_legacy_batched, is_wrapped, transforms_active

# quant_min, quant_max, axis, group_size, grad_factor and saturation: one argument costs autograd less than six.
Settings = tuple[int, int, int | None, int | None, float, str]

_ONCE = (
    "fake_quantize can be differentiated once: a straight-through estimator has no second derivative. Found a backward "
    'pass through its gradients (a gradient penalty?): compute that term with the quantizers in phase "off".'
)
_FORWARD_MODE = (
    "fake_quantize has gradients in reverse mode alone, where a straight-through estimator is defined by its backward "
    "pass. Found forward-mode differentiation (torch.func.jvp or jacfwd, dual tensors): use torch.func.grad, vjp or "
    'jacrev, or quantizers in phase "off".'
)

_BATCHED = (
    "fake_quantize takes several gradients at once by torch.func. Found `is_grads_batched=True` or `vectorize=True`, "
    "which batch in another way: use torch.func.jacrev, or torch.func.vmap over torch.func.vjp."
)


class FakeQuantize(torch.autograd.Function):
    """(y, qparams): y = (clamp(round(x / s) + z, quant_min, quant_max) - z) * s, and the few numbers used for it.

    Backward keeps x and these numbers, so changing scale and zero point between the two is harmless. With a
    `grad_factor` of 0 the qparams get no gradient, and stay in the graph.
    """

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero_point: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
        if not readable(x, scale, zero_point):
            refuse(x, scale, zero_point)
        y, qparams = select(x).forward(x, scale, zero_point, *settings[:4])
        return y, qparams

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        # The qparams stay in the graph, so that whoever differentiates a gradient by them is told, and not given zero.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], output[1])
        ctx.settings = inputs[3]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, twice: Tensor | None) -> tuple[Tensor | None, ...]:
        x, qparams = ctx.saved_tensors
        settings, needs = ctx.settings, ctx.needs_input_grad
        learn = settings[4] != 0.0
        upstream = torch.zeros_like(x) if dy is None else dy
        given = (upstream, x, qparams, settings, learn and needs[1], learn and needs[2])
        if torch.compiler.is_compiling():
            return *_gradients(*given), None
        if twice is not None:
            raise RuntimeError(_ONCE)
        if torch.is_grad_enabled() or transforms_active() or is_wrapped(qparams):
            return *_Gradients.apply(*given), None
        try:
            return *_gradients(*given), None
        except RuntimeError as error:
            if is_legacy_batched(upstream):
                raise RuntimeError(_BATCHED) from error
            raise

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        x, scale, zero_point = (batched(*pair, info.batch_size) for pair in zip(inputs[:3], in_dims, strict=False))
        quant_min, quant_max, axis, group_size, *rest = inputs[3]
        settings = (quant_min, quant_max, folded_axis(group_size), group_size, *rest)
        folded = fold(x, axis, group_size), scale.flatten(), zero_point.flatten()
        y, qparams = FakeQuantize.apply(*folded, settings)
        return (unfold(y, info.batch_size, axis, group_size), qparams.unflatten(1, scale.shape)), (0, 1)

    @staticmethod
    def symbolic(*_: Any) -> None:
        """Refuse what would be written as a constant: torch's older exporter asks this, and sees no kernel's inside."""
        raise RuntimeError(
            "torch.onnx.export with dynamo=False cannot see into fake quantization. Found a quantizer: use "
            "`lfq_lightning.export_onnx`, which writes QuantizeLinear and integer weights."
        )


class _Transformed(FakeQuantize):
    """What forward-mode differentiation finds; Dynamo takes no Function with a `jvp`."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise RuntimeError(_FORWARD_MODE)


# What `apply` does where no transform of torch.func is running; its look at the signature costs more than a kernel.
_call = super(torch.autograd.Function, FakeQuantize).apply


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, settings: Settings) -> Tensor:
    """`fake_quantize` for whoever has checked the settings.

    Raises:
        TypeError, ValueError: if scale and zero point are not float32, of one shape and on the device of x.
    """
    if torch.compiler.is_compiling():
        y, _ = FakeQuantize.apply(x, scale, zero_point, settings)
    elif transforms_active() or forward_ad._current_level >= 0:
        y, _ = _Transformed.apply(x, scale, zero_point, settings)
    else:
        y, _ = _call(x, scale, zero_point, settings)
    return y


def _gradients(
    dy: Tensor, x: Tensor, qparams: Tensor, settings: Settings, need_scale: bool, need_zero_point: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    # Hooks on saved tensors and torch.func may bring them back otherwise than kernels, which see an address, read them.
    if not (qparams.dtype is torch.float32 and qparams.is_cpu is x.is_cpu and qparams.is_contiguous()):
        qparams = qparams.to(x.device, torch.float32).contiguous()
    return select(x).backward(dy, x, qparams, *settings, need_scale, need_zero_point)


class _Gradients(torch.autograd.Function):
    """The backward pass as torch.func and `create_graph` see it: an operation that has no gradient."""

    @staticmethod
    def forward(
        dy: Tensor, x: Tensor, qparams: Tensor, settings: Settings, need_scale: bool, need_zero_point: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return _gradients(dy, x, qparams, settings, need_scale, need_zero_point)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(_ONCE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise RuntimeError(_FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        dy, x, qparams = (batched(*pair, info.batch_size) for pair in zip(inputs[:3], in_dims, strict=False))
        quant_min, quant_max, axis, group_size, *rest = inputs[3]
        settings = (quant_min, quant_max, folded_axis(group_size), group_size, *rest)
        folded = fold(dy, axis, group_size), fold(x, axis, group_size), qparams.movedim(0, 1).flatten(1)
        dx, *sums = _Gradients.apply(*folded, settings, *inputs[4:])
        sums = [None if each is None else each.unflatten(0, (info.batch_size, -1)) for each in sums]
        return (unfold(dx, info.batch_size, axis, group_size), *sums), (0, *(None if s is None else 0 for s in sums))


class Unchanged(torch.autograd.Function):
    """y = x with the qparams in the graph, so that DDP finds every parameter used in every phase."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, None, None


_call_unchanged = super(torch.autograd.Function, Unchanged).apply


def in_graph_of(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """x, which backward knows to depend on scale and zero point, with gradients of zero."""
    if torch.compiler.is_compiling():
        return Unchanged.apply(x, scale, zero_point)
    if transforms_active() or forward_ad._current_level >= 0:  # torch.func asks for no parameter to be used
        return x
    return _call_unchanged(x, scale, zero_point)


def readable(x: Tensor, scale: Tensor, zero_point: Tensor) -> bool:
    """Whether kernels may read these qparams through raw pointers; every call asks, so it asks for what costs least."""
    if not (scale.dtype is zero_point.dtype is torch.float32 and scale.numel() == zero_point.numel()):
        return False
    return scale.is_cpu and zero_point.is_cpu if x.is_cpu else scale.device == zero_point.device == x.device


def refuse(x: Tensor, scale: Tensor, zero_point: Tensor) -> NoReturn:
    """Say what kernels could not read.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if a device or a shape is wrong.
    """
    for name, p in (("scale", scale), ("zero_point", zero_point)):
        if p.dtype is not torch.float32:
            raise TypeError(f"`{name}` must be float32, whatever the dtype of x. Found {p.dtype}: use `.float()`.")
        if p.device != x.device:
            raise ValueError(f"`{name}` must be on the device of x, {x.device}. Found {p.device}: move it there.")
    raise ValueError(
        f"`scale` and `zero_point` must have the same shape. Found {tuple(scale.shape)} and {tuple(zero_point.shape)}."
    )
