"""The exported numbers suffice to run a network in integers alone: int32 sums, multipliers, biases and shifts."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.export.fold import fold_batch_norm
from lfq_lightning.export.integers import IntegerInput, IntegerWeight, integer_copy
from lfq_lightning.placement.quantized_layer import QuantizedLayer


def quantized(x: Tensor, quantizer: IntegerInput) -> Tensor:
    """The codes of a float tensor, as QuantizeLinear gives them."""
    codes = (x / quantizer.scale).round() + quantizer.zero_point
    return codes.clamp(*quantizer.range).to(torch.int32)


def accumulated(layer: nn.Module, codes: Tensor, zero_point: Tensor) -> Tensor:
    """Sums of products of integers; int32 holds every one of them."""
    weight: IntegerWeight = layer.weight_quantizer
    centred = weight.codes.to(torch.int64) - weight.zero_point.view(-1, *[1] * (weight.codes.ndim - 1))
    x = codes.to(torch.int64) - zero_point
    if isinstance(layer, nn.Conv2d):
        # Products and sums of these integers are exact in float64.
        sums = nn.functional.conv2d(x.double(), centred.double(), None, layer.stride, layer.padding)
    else:
        sums = nn.functional.linear(x.double(), centred.double())
    assert sums.abs().max() < 2**31
    return sums.long()


def requantized(sums: Tensor, layer: nn.Module, following: IntegerInput) -> Tensor:
    """The next layer's codes by an integer multiplier, bias and shift for each channel, and ReLU."""
    factor = layer.input_quantizer.scale.double() * layer.weight_quantizer.scale.double() / following.scale.double()
    _, exponent = torch.frexp(factor)
    shift = (30 - exponent).long()
    multiplier = (factor * 2.0**shift).round().long()
    bias = (layer.bias.double() / following.scale.double() * 2.0**shift).round().long()
    shape = (-1, *[1] * (sums.ndim - 2))
    half = torch.ones_like(shift) << (shift - 1)
    codes = (sums * multiplier.view(shape) + (bias + half).view(shape)) >> shift.view(shape)
    codes = codes.clamp(min=0) + following.zero_point
    return codes.clamp(*following.range).to(torch.int32)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2)
        self.head = nn.Linear(72, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return self.head(x.flatten(1))


@pytest.mark.parametrize(("weight", "activation"), [(8, 8), (4, 8), (4, 4), (2, 4)])
def test_a_network_runs_in_integers_alone(weight: int, activation: int) -> None:
    model, x = Network(), torch.randn(200, 1, 8, 8)
    with torch.no_grad():
        model.norm1.weight.normal_()
        model.norm1.running_mean.normal_()
    lfq.attach(model, weight, activation)
    lfq.calibrate(model, [x])
    model.eval()
    integers = integer_copy(model)
    assert fold_batch_norm(integers, (x,)) == ["norm1"]
    seen: list[Tensor] = []
    layers = [integers.conv1, integers.conv2, integers.head]
    for layer in layers[1:]:
        assert isinstance(layer, QuantizedLayer)
        layer.input_quantizer.register_forward_hook(lambda q, args, y: seen.append(quantized(args[0], q)))
    expected = integers(x)

    codes = quantized(x, integers.conv1.input_quantizer)
    for layer, following in pairwise(layers):
        sums = accumulated(layer, codes, layer.input_quantizer.zero_point)
        codes = requantized(sums, layer, following.input_quantizer)
        codes = codes.flatten(1) if following is integers.head else codes
        # Float sums round, so a value on the edge between two codes may fall to the other side.
        apart = (codes - seen.pop(0)).abs()
        assert (apart > 0).float().mean() < 1e-3
    sums = accumulated(integers.head, codes, integers.head.input_quantizer.zero_point)
    unit = integers.head.input_quantizer.scale * integers.head.weight_quantizer.scale
    outputs = sums * unit + integers.head.bias
    assert outputs.argmax(1).eq(expected.argmax(1)).float().mean() >= 0.995
