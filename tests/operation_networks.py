"""Small networks whose weights are read by operations, each in another way: what is quantized by the flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import lfq_lightning as lfq


class ReadByParent(nn.Module):
    """A layer that is never called: the module that has it reads its weight, as Swin, BEiT and EVA-02 do."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, self.qkv.bias)


class BiasApart(nn.Module):
    """Weight and bias of a layer are read one by one, as Mamba does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.step = nn.Linear(6, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.step.weight @ self.first(x).t() + self.step.bias[:, None])


class NormAfterTwo(nn.Module):
    """A layer's weight is read by a function too, so that no norm may be folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.norm.running_mean = torch.linspace(-1, 1, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x)) + F.linear(x, self.layer.weight)


class TiedDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encode(x)), self.encode.weight.t())


class Sliced(nn.Module):
    """Halves of one parameter, each for another input."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.both[:4]) + F.linear(torch.sin(x), self.both[4:])


class InputsFirst(nn.Module):
    """A weight of (inputs, outputs), as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))
        self.bias = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Graph(nn.Module):
    """A graph convolution: neighbours are added by a matrix that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.register_buffer("adjacency", torch.eye(3) + torch.eye(3).roll(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.adjacency @ (x @ self.weight)


class Experts(nn.Module):
    """The experts' weights in one tensor, and every token goes through each."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.up = nn.Parameter(torch.randn(3, 6, 4))
        self.down = nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(torch.bmm(x.expand(3, -1, -1), self.up))
        return torch.einsum("end,ne->nd", torch.bmm(hidden, self.down), self.gate(x).softmax(-1))


class GroupedExperts(nn.Module):
    """Tokens in order of their expert, and one product for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return F.grouped_mm(x, self.up.transpose(1, 2), offs=torch.tensor([3, 4], dtype=torch.int32))


class Positions(nn.Embedding):
    """A table with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x + F.embedding(torch.arange(x.shape[1]) + 1, self.weight)


class DrawsNoise(nn.Module):
    """Begins with noise of its own, as a generator may; what it is given says how much."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(len(x), 4, generator=torch.Generator().manual_seed(0))
        return self.second(torch.relu(self.first(noise))) * x


class ScaledTable(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class SharedTable(nn.Module):
    """One table under three names, each time in another module: two subclasses and a head, as in BART."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict(
            {"shared": ScaledTable(12, 6), "encoder": nn.ModuleDict({"words": ScaledTable(12, 6)})}
        )
        self.head = nn.Linear(6, 12, bias=False)
        self.inner["encoder"]["words"].weight = self.head.weight = self.inner["shared"].weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.inner["encoder"]["words"](words) + self.inner["shared"](words))


class ByEinsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nd,dhe->nhe", x, self.weight)


class OwnConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 2, 3, 3))
        self.back = nn.Parameter(torch.randn(4, 2, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(torch.relu(F.conv2d(x, self.kernel)), self.back)


class StandardizedConv2d(nn.Conv2d):
    """A subclass whose own forward computes another weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class OfTwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, torch.cos(x))


class Attention(nn.Module):
    def __init__(self, cross: bool = False, need_weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.cross, self.need_weights = cross, need_weights

    def forward(self, x: Tensor) -> Tensor:
        other = torch.sin(x[:, 1:, : self.attention.kdim]) if self.cross else x
        attended, weights = self.attention(x, other, other, need_weights=self.need_weights)
        return attended if weights is None else attended + weights.sum(-1, keepdim=True).square()


class Heads(nn.Module):
    """Attention as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x).split(8, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class First(nn.Module):
    """What a recurrent layer gives, without its state."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x: Tensor) -> Tensor:
        return self.recurrent(x)[0]


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(8, 4, bidirectional=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]), batch_first=True)
        return self.recurrent(packed)[0].data


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(8, 4), nn.GRUCell(8, 4), nn.RNNCell(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.lstm(step, state)
        hidden, _ = state
        return self.rnn(x[:, 0], self.gru(x[:, 1], hidden))


class Case(NamedTuple):
    """A network and what it is run on."""

    make: Callable[[], nn.Module]
    inputs: Sequence[Tensor]


def _of(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(layer())


_drawn = torch.Generator().manual_seed(0)
_rows, _tokens, _image = (torch.randn(size, generator=_drawn) for size in ((3, 6), (2, 5, 8), (2, 2, 6, 6)))

WEIGHTS: dict[str, Case] = {
    "read by its parent": Case(ReadByParent, [_rows]),
    "bias apart": Case(BiasApart, [_rows]),
    "norm after two": Case(NormAfterTwo, [_rows]),
    "tied with a transpose": Case(TiedDecoder, [_rows]),
    "slices": Case(Sliced, [_rows]),
    "inputs first": Case(InputsFirst, [_rows]),
    "graph": Case(Graph, [_rows]),
    "experts": Case(Experts, [_rows]),
    "noise": Case(DrawsNoise, [_rows]),
    "shared table": Case(SharedTable, [torch.randint(12, (2, 5))]),
    "positions": Case(_of(lambda: Positions(9, 8)), [_tokens]),
    "einsum": Case(ByEinsum, [_rows]),
    "own convolution": Case(OwnConvolution, [_image]),
    "bilinear": Case(OfTwoInputs, [_rows]),
    "embedding bag": Case(_of(lambda: nn.EmbeddingBag(9, 4)), [torch.randint(9, (3, 5))]),
    "self-attention": Case(Attention, [_tokens]),
    "self-attention, with weights": Case(lambda: Attention(need_weights=True), [_tokens]),
    "cross-attention": Case(lambda: Attention(cross=True), [_tokens]),
    "attention of other widths": Case(lambda: Attention(cross=True, kdim=6, vdim=6), [_tokens]),
    "attention with biases": Case(lambda: Attention(add_bias_kv=True, add_zero_attn=True), [_tokens]),
    "transformer": Case(lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), [_tokens]),
    "lstm": Case(lambda: First(nn.LSTM(8, 4, num_layers=2, bidirectional=True, batch_first=True)), [_tokens]),
    "lstm with projections": Case(lambda: First(nn.LSTM(8, 4, proj_size=3)), [_tokens]),
    "gru": Case(lambda: First(nn.GRU(8, 4)), [_tokens]),
    "rnn": Case(lambda: First(nn.RNN(8, 4, nonlinearity="relu")), [_tokens]),
    "packed sequences": Case(Packed, [_tokens]),
    "cells": Case(Cells, [_tokens]),
}

if hasattr(F, "grouped_mm"):
    WEIGHTS["grouped experts"] = Case(GroupedExperts, [_tokens.flatten(0, 1)[:4].repeat(1, 2)])

# The weight is made in forward, from other parameters.
MADE: dict[str, Case] = {
    "standardized": Case(_of(lambda: StandardizedConv2d(2, 4, 3)), [_image]),
    "weight norm": Case(_of(lambda: parametrizations.weight_norm(nn.Linear(6, 4))), [_rows]),
    "weight norm of old": Case(_of(lambda: nn.utils.weight_norm(nn.Linear(6, 4))), [_rows]),
    "spectral norm": Case(_of(lambda: parametrizations.spectral_norm(nn.Linear(6, 4))), [_rows]),
    "spectral norm of old": Case(_of(lambda: nn.utils.spectral_norm(nn.Linear(6, 4))), [_rows]),
    "pruned": Case(_of(lambda: prune.random_unstructured(nn.Linear(6, 4), "weight", 0.3)), [_rows]),
}


class Residual(nn.Module):
    """What a network does between its layers, each in another way of writing it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.body(x)
        y = y + x
        y += x
        y = torch.add(y, x)
        y = y.sub(x) * torch.sigmoid(x)
        small = F.max_pool2d(y, 2) + F.avg_pool2d(y, 2)
        y = torch.cat([y, F.interpolate(small, scale_factor=2).tanh()], dim=1)
        y = torch.stack([y, torch.cos(y)]).mean(0)
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


class Products(nn.Module):
    """Products of two activations, each in another way of writing it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        square = x.t() @ x
        square = torch.matmul(square, square) / 9
        square = torch.mm(square, square) / 9
        three = torch.bmm(square.expand(2, 6, 6), square.expand(2, 6, 6)) / 99
        return torch.einsum("bij,jk->ik", three, square)


ACTIVATIONS: dict[str, Case] = {
    "residual": Case(Residual, [_image]),
    "products": Case(Products, [_rows]),
    "attention": Case(Heads, [_tokens]),
    "attention in one layer": Case(Attention, [_tokens]),
    "attention with weights": Case(lambda: Attention(need_weights=True), [_tokens]),
}


def attached(case: Case, phase: Any = "learn", seed: int = 0, **settings: Any) -> nn.Module:
    """A network with quantizers that have seen its inputs, in a phase."""
    torch.manual_seed(seed)
    model = case.make()
    lfq.attach(model, example=tuple(case.inputs), **settings)
    lfq.calibrate(model, [tuple(case.inputs)])
    lfq.set_phase(model, phase)
    return model
