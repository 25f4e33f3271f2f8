"""A copy of a quantized model that holds integer weights and computes with quantize and dequantize operations."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from lfq_lightning.export.exportable import check_exportable, own_copy
from lfq_lightning.ops import spread
from lfq_lightning.placement.layers import QUANTIZABLE
from lfq_lightning.placement.meeting import meeting_modules
from lfq_lightning.placement.points import points
from lfq_lightning.placement.quantized_layer import (
    QuantizedLayer,
    float_type,
    quantized_layers,
    replace_placed,
)
from lfq_lightning.private import quantized_decomposed
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.quantizer.tokens import token_qparams

_decomposed = quantized_decomposed()


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
        signs: by which the quantizer's own integers were multiplied: -1, 0 or 1 for each output channel.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: LearnableFakeQuantize, weight: Tensor) -> None:
        super().__init__()
        self.range = quantizer.code_range
        self.axis, self.group_size = quantizer.axis, quantizer.group_size
        self.fixed_scale = quantizer.scale_domain == "power_of_two"
        self.dtype = torch.uint8 if self.range[0] >= 0 else torch.int8
        scale, zero_point = quantizer.used_qparams()
        s, z = (spread(p, weight.shape, self.axis, self.group_size) for p in (scale, zero_point))
        codes = torch.clamp((weight.float() / s).round() + z, *self.range)
        if self.group_size is not None:
            shape = (weight.shape[0], -1, *[1] * (weight.ndim - 2))
            scale, zero_point = scale.view(shape), zero_point.view(shape)
        self.only = float(scale.flatten()[0]), int(zero_point.flatten()[0])  # numbers, where there is one of each
        self.signs = torch.ones((), dtype=torch.float32, device="cpu")
        self.register_buffer("codes", codes.to(self.dtype))
        self.register_buffer("scale", scale.clone())
        # PyTorch's operator subtracts in the wider of the two types: bytes would wrap around. Ours for groups does not.
        self.register_buffer("zero_point", zero_point.long() if self.group_size is None else zero_point.to(self.dtype))

    def forward(self, weight: Tensor, learn: bool = True) -> Tensor:
        """The weight that the codes stand for."""
        if self.group_size is not None:
            scale, zero_point = self.scale, self.zero_point
            if self.codes.ndim > 2:
                kernel = [-1, -1, *self.codes.shape[2:]]
                scale, zero_point = scale.expand(kernel).contiguous(), zero_point.expand(kernel).contiguous()
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

    @property
    def centred(self) -> Tensor:
        """Codes less their zero points: int32, of the weight's shape."""
        return self.codes.int() - self.wide(self.zero_point).int()

    @property
    def narrow(self) -> bool:
        """Whether every code fits 4 bits."""
        low, high = (0, 15) if self.dtype is torch.uint8 else (-8, 7)
        return low <= self.range[0] and self.range[1] <= high

    def scaled(self, factor: Tensor, axis: int, wide: bool = False, mirrored: bool = True) -> IntegerWeight | None:
        """This weight times a factor for each index of `axis`, the output channels; nothing is rounded again.

        The factor's magnitude goes into the scales and its sign into the integers; zero makes the integers the zero
        point.

        Args:
            factor: of shape (channels,).
            axis: the dimension of the output channels.
            wide: whether a negated code that has no room in its range may have one of a byte.
            mirrored: whether all codes are else mirrored within the range, and the zero point with them.

        Returns:
            None where scales run along another dimension or must stay powers of two, or a code has no room.
        """
        if self.fixed_scale:
            return None
        if self.axis not in (None, axis) or (self.group_size is not None and axis != 0):
            return None
        made = copy.deepcopy(self)
        factors = factor.view([-1 if d == axis else 1 for d in range(self.codes.ndim)])
        if self.group_size is None:
            made.axis = axis
            made.scale, made.zero_point = self.scale.expand(len(factor)), self.zero_point.expand(len(factor))
            flat = factor
        else:
            flat = factors
        made.scale = made.scale * torch.where(flat == 0, 1.0, flat.abs())
        codes, total = self.codes.int(), sum(self.range)
        z = made.wide(made.zero_point).int()
        negated = 2 * z - codes
        turns = negated[(factors < 0).expand_as(negated)]
        lowest, highest = (int(end) for end in turns.aminmax()) if turns.numel() else self.range
        fits = self.range[0] <= lowest and highest <= self.range[1]
        if not fits and wide and torch.iinfo(self.dtype).min <= lowest and highest <= torch.iinfo(self.dtype).max:
            made.range, fits = (min(lowest, self.range[0]), max(highest, self.range[1])), True
        if not fits and not mirrored:
            return None
        turned = negated if fits else total - codes
        codes = torch.where(factors < 0, turned, torch.where(factors == 0, z.expand_as(codes), codes))
        if not fits:
            made.zero_point = torch.where(flat < 0, total - made.zero_point, made.zero_point)
        made.codes, made.signs = codes.to(self.dtype), self.signs * factors.sign()
        return made

    def silenced(self, channels: Tensor, axis: int) -> IntegerWeight | None:
        """This weight with zeros in some output channels, and a scale of 1 there; None as in `scaled`."""
        made = self.scaled(torch.where(channels, 0.0, 1.0), axis)
        if made is not None and bool(channels.any()):
            view = channels if made.group_size is None else channels.view(-1, *[1] * (made.scale.ndim - 1))
            made.scale = torch.where(view, 1.0, made.scale)
        return made

    def wide(self, qparam: Tensor) -> Tensor:
        """A scale or zero point that broadcasts against the codes."""
        if self.group_size is not None:
            return qparam[:, torch.arange(self.codes.shape[1]) // self.group_size]
        shape = [1] * self.codes.ndim
        if self.axis is not None:
            shape[self.axis] = -1
        return qparam.view(shape)


class IntegerInput(nn.Module):
    """Stands for an input quantizer, or one of the user's: quantize and dequantize operations.

    A clip goes before them where codes are fewer than 256.
    """

    scale: Tensor
    zero_point: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, quantizer: LearnableFakeQuantize, signed: bool = False) -> None:
        super().__init__()
        scale, zero_point = quantizer.used_qparams()
        shift = 128 if signed and quantizer.code_range[0] >= 0 else 0
        ends, self.axis = quantizer.code_range, quantizer.axis
        self.range = ends[0] - shift, ends[1] - shift
        self.dtype = torch.uint8 if self.range[0] >= 0 else torch.int8
        self.only = float(scale[0]), int(zero_point[0]) - shift  # numbers, where there is one of each
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", zero_point.long() - shift)
        low, high = (scale * (end - zero_point) for end in ends)
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


class TokenInput(nn.Module):
    """Stands for an input quantizer whose scales tokens bring, with operations that choose them."""

    def __init__(self, quantizer: LearnableFakeQuantize) -> None:
        super().__init__()
        low, high = quantizer.code_range
        self.symmetric = quantizer.symmetric
        self.known = not self.symmetric and (low, high) == (0, 255)  # what back ends look for, with codes as int8
        self.range = (-128, 127) if self.known else (low, high)
        self.dtype = torch.uint8 if self.range[0] >= 0 else torch.int8

    def forward(self, x: Tensor, learn: bool = True) -> Tensor:
        """X on the grid of each token's codes."""
        if self.known:
            scale, zero_point = _decomposed.choose_qparams_per_token_asymmetric(x, self.dtype)
        else:
            found = token_qparams(x.reshape(-1, x.shape[-1]), *self.range, self.symmetric)
            scale, zero_point = (qparam.view(*x.shape[:-1], 1) for qparam in found)
        codes = _decomposed.quantize_per_token(x, scale, zero_point, *self.range, self.dtype)
        return cast(
            Tensor, _decomposed.dequantize_per_token(codes, scale, zero_point, *self.range, self.dtype, torch.float32)
        )

    def in_graph(self, x: Tensor) -> Tensor:
        """Nothing more."""
        return x


def _integer_input(quantizer: LearnableFakeQuantize, signed: bool) -> nn.Module:
    return TokenInput(quantizer) if quantizer.per_token else IntegerInput(quantizer, signed)


def integer_copy(model: nn.Module, signed: bool = False) -> nn.Module:
    """A copy in eval mode whose quantizers are `IntegerWeight` and `IntegerInput`; the model is not changed.

    Args:
        model: with quantizers whose qparams are set.
        signed: store unsigned codes of inputs 128 lower, as int8.

    Raises:
        ValueError: if the model cannot be exported, with the names of what stands in the way.
    """
    made = own_copy(model)
    to_integers(made, signed)
    return made


def to_integers(model: nn.Module, signed: bool = False) -> None:
    """Put `IntegerWeight` and `IntegerInput` in place of the quantizers of a copy that is to be exported.

    Raises:
        ValueError: if quantizers have settings that integer formats do not hold.
    """
    check_exportable(model)
    for layer in quantized_layers(model).values():
        layer.saved = None
    made: dict[nn.Module, nn.Module] = {}  # whoever shares a quantizer shares its integers
    for point in points(model).values():
        if point.has_parameter:
            made[point.quantizer] = IntegerWeight(point.quantizer, point.whole_parameter())
        elif point.owner is not None:
            made[point.quantizer] = _integer_input(point.quantizer, signed and point.role != "weight")
    for module in model.modules():
        module._modules.update({name: made[child] for name, child in module._modules.items() if child in made})
    replace_placed(model, lambda _, quantizer: _integer_input(quantizer, signed))


class Bias(nn.Module):
    """A layer's forward hook that adds its bias, as a subtraction.

    ONNX Runtime rounds a bias inside a layer, or in an addition behind it, to multiples of input scale times weight
    scale. Weights of 4 bits make these coarse: of a 2-bit network, every eighth answer was another.
    """

    negative: Tensor

    def __init__(self, bias: Tensor, dimensions_after: int) -> None:
        super().__init__()
        self.register_buffer("negative", -bias.detach().view(-1, *[1] * dimensions_after))

    def forward(self, module: Any, args: Any, output: Tensor) -> Tensor:
        """The layer's output with its bias."""
        return output - self.negative


def own_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers whose weight and bias no other module's code reads, so that they may change together."""
    read = {reads.owner for module in meeting_modules(model).values() for reads in module.met_reads}
    return {name: layer for name, layer in quantized_layers(model).items() if layer not in read}


def keep_biases_exact(model: nn.Module) -> None:
    """Take the biases of layers with narrow weights and quantized inputs out of the layers, in place."""
    for layer in own_layers(model).values():
        weight, bias = layer.weight_quantizer, getattr(layer, "bias", None)
        plain = float_type(layer) in QUANTIZABLE and isinstance(layer.input_quantizer, IntegerInput)
        if plain and isinstance(weight, IntegerWeight) and weight.narrow and isinstance(bias, Tensor):
            add = Bias(bias, 0 if isinstance(layer, nn.Linear) else weight.codes.ndim - 2)
            layer.register_parameter("bias", None)
            layer.add_module("exact_bias", add)
            layer.register_forward_hook(add, prepend=True)
