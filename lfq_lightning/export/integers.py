"""A copy of a quantized model that holds integer weights and computes with quantize and dequantize operations."""

from __future__ import annotations

import copy
from typing import cast

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor, nn

from lfq_lightning.export.exportable import check_estimated, check_exportable
from lfq_lightning.ops import spread
from lfq_lightning.placement.host import INPUT, WEIGHT, QuantizedLayer, hosts, whole_weight
from lfq_lightning.quantizer import LearnableFakeQuantize

_decomposed = torch.ops.quantized_decomposed


@torch.library.custom_op("lfq_lightning::dequantize_groups", mutates_args=())
def dequantize_groups(codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> Tensor:
    """(codes - zero_point) * scale, with `scale` and `zero_point` of shape (O, groups, ...) for codes (O, I, ...)."""
    index = torch.arange(codes.shape[1], device=codes.device) // group_size
    return (codes.float() - zero_point[:, index].float()) * scale[:, index]


@dequantize_groups.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


class IntegerWeight(nn.Module):
    """Stands for a weight quantizer: integer codes, whatever float weight it is given.

    Attributes:
        codes: int8 or uint8, of the weight's shape.
        scale, zero_point: of shape (1,), (channels,) or (O, groups, 1, ...).
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: LearnableFakeQuantize, weight: Tensor) -> None:
        super().__init__()
        self.range = quantizer.code_range
        self.bits = quantizer.bitwidth
        self.axis, self.group_size = quantizer.axis, quantizer.group_size
        self.dtype = torch.uint8 if self.range[0] >= 0 else torch.int8
        scale, zero_point = quantizer.used_qparams()
        s, z = (spread(p, weight.shape, self.axis, self.group_size) for p in (scale, zero_point))
        codes = torch.clamp((weight.float() / s).round() + z, *self.range)
        if self.group_size is not None:
            shape = (weight.shape[0], -1, *[1] * (weight.ndim - 2))
            scale, zero_point = scale.view(shape), zero_point.view(shape)
        self.only = float(scale.flatten()[0]), int(zero_point.flatten()[0])  # numbers, where there is one of each
        self.register_buffer("codes", codes.to(self.dtype))
        self.register_buffer("scale", scale.clone())
        # PyTorch's operator subtracts in the wider of the two types: bytes would wrap around.
        self.register_buffer("zero_point", zero_point.long())

    def forward(self, weight: Tensor, learn: bool = True) -> Tensor:
        """The weight that the codes stand for."""
        if self.group_size is not None:
            kernel = [-1, -1, *self.codes.shape[2:]]
            scale, zero_point = self.scale.expand(kernel).contiguous(), self.zero_point.expand(kernel).to(self.dtype)
            return dequantize_groups(self.codes, scale, zero_point, self.group_size)
        full = (0, 255) if self.dtype is torch.uint8 else (-128, 127)
        axis = self.axis
        if axis is None:
            return cast(Tensor, _decomposed.dequantize_per_tensor(self.codes, *self.only, *full, self.dtype))
        return cast(
            Tensor,
            _decomposed.dequantize_per_channel(self.codes, self.scale, self.zero_point, axis, *full, self.dtype),
        )

    def in_graph(self, x: Tensor) -> Tensor:
        """Nothing more."""
        return x

    def scaled(self, factor: Tensor, axis: int) -> bool:
        """Multiply by a factor for each index of `axis`, the output channels, without rounding anything again.

        The factor's magnitude goes into the scales and its sign into the integers; zero makes the integers the zero
        point. A negated code that has no room is mirrored within the range, and the zero point with it.

        Returns:
            False, and nothing is changed, where scales run along another dimension.
        """
        if self.axis not in (None, axis) or (self.group_size is not None and axis != 0):
            return False
        per_channel = [1] * self.codes.ndim
        per_channel[axis] = -1
        wide = factor.view(per_channel)
        if self.group_size is None:
            self.scale = self.scale.expand(len(factor)) * torch.where(factor == 0, 1.0, factor.abs())
            zero_point, self.axis = self.zero_point.expand(len(factor)).int(), axis
            flat_factor, z = factor, zero_point.view(per_channel)
        else:
            self.scale = self.scale * torch.where(wide == 0, 1.0, wide.abs())
            zero_point = self.zero_point.int()
            flat_factor = wide
            index = torch.arange(self.codes.shape[1]) // self.group_size
            z = zero_point[:, index]
        codes, total = self.codes.int(), sum(self.range)
        negated = 2 * z - codes
        fits = bool(((negated >= self.range[0]) & (negated <= self.range[1]) | (wide >= 0)).all())
        turned = negated if fits else total - codes
        codes = torch.where(wide < 0, turned, torch.where(wide == 0, z.expand_as(codes), codes))
        if not fits:
            zero_point = torch.where(flat_factor < 0, total - zero_point, zero_point)
        self.codes, self.zero_point = codes.to(self.dtype), zero_point.long()
        return True


class IntegerInput(nn.Module):
    """Stands for an input quantizer: quantize and dequantize operations, with a clip where codes are fewer than 256."""

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, quantizer: LearnableFakeQuantize) -> None:
        super().__init__()
        self.range, self.axis = quantizer.code_range, quantizer.axis
        self.dtype = torch.uint8 if self.range[0] >= 0 else torch.int8
        scale, zero_point = quantizer.used_qparams()
        self.only = float(scale[0]), int(zero_point[0])  # numbers, where there is one of each
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", zero_point.long())
        low, high = (scale * (end - zero_point) for end in self.range)
        self.ends = float(low[0]), float(high[0])
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, x: Tensor, learn: bool = True) -> Tensor:
        """X on the grid of the codes."""
        full = (0, 255) if self.dtype is torch.uint8 else (-128, 127)
        if self.axis is None:
            if self.range != full:
                x = x.clamp(*self.ends)
            arguments = (*self.only, *full, self.dtype)
            codes = _decomposed.quantize_per_tensor(x, *arguments)
            return cast(Tensor, _decomposed.dequantize_per_tensor(codes, *arguments))
        if self.range != full:
            shape = [1] * x.ndim
            shape[self.axis] = -1
            x = torch.minimum(torch.maximum(x, self.low.view(shape)), self.high.view(shape))
        channels = (self.scale, self.zero_point, self.axis, *full, self.dtype)
        codes = _decomposed.quantize_per_channel(x, *channels)
        return cast(Tensor, _decomposed.dequantize_per_channel(codes, *channels))

    def in_graph(self, x: Tensor) -> Tensor:
        """Nothing more."""
        return x


def integer_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose quantizers are `IntegerWeight` and `IntegerInput`; the model is not changed.

    Raises:
        ValueError: if the model cannot be exported, with the names of what stands in the way.
    """
    check_estimated(model)
    check_exportable(model)
    made = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in hosts(made).values():
        integer_layer(layer)
    return made


def integer_layer(layer: QuantizedLayer) -> None:
    """Replace a layer's quantizers in place."""
    layer.saved = None
    weight, activation = layer.weight_quantizer, layer.input_quantizer
    if weight is not None:
        layer._modules[WEIGHT] = IntegerWeight(weight, whole_weight(layer))
    if activation is not None:
        layer._modules[INPUT] = IntegerInput(activation)
