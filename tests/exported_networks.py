"""Networks that were trained on the digits, quantized and trained again: what export is tested and measured on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from networks import ConvolutionalNetwork
from sklearn.datasets import load_digits
from torch import Tensor, nn

import lfq_lightning as lfq


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16 * 25, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class Encoder(nn.Module):
    """An embedding and a transformer encoder; the tokens are the rows of a black and white image."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.position = nn.Parameter(torch.randn(8, 32) / 10)
        self.encoder = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens) + self.position).mean(1))


def convolutional(block: Any) -> nn.Module:
    """With BatchNorms of which one factor in four begins negative, and one stays zero."""
    network = ConvolutionalNetwork(block, channels=1, classes=10, widths=[16, 32], depth=1)
    with torch.no_grad():
        for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight[::4] = -0.7
            norm.weight[1] = 0
            norm.weight.register_hook(lambda gradient: gradient * (torch.arange(len(gradient)) != 1))
    return network


def as_tokens(x: Tensor) -> Tensor:
    return ((x[:, 0] > 0.4).long() * 2 ** torch.arange(8)).sum(-1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "lenet": (LeNet, lambda x: nn.functional.interpolate(x, size=28)),
    "residual": (lambda: convolutional("residual"), lambda x: x),
    "separable": (lambda: convolutional("separable"), lambda x: x),
    "mlp": (mlp, lambda x: x),
    "encoder": (Encoder, as_tokens),
}


def settings(bits: tuple[int, int | None], symmetric: bool) -> tuple[lfq.QuantSpec, lfq.QuantSpec | None]:
    """Specifications of weights per channel, or in groups of 8 where inputs stay float, and of inputs per tensor."""
    weight, activation = bits
    if activation is None:
        return lfq.QuantSpec(bits=weight, symmetric=symmetric, granularity="per_group", group_size=8), None
    per_channel = lfq.QuantSpec(bits=weight, symmetric=symmetric, granularity="per_channel")
    return per_channel, lfq.QuantSpec(bits=activation, symmetric=symmetric)


BITS: dict[str, tuple[int, int | None]] = {
    "w8a8": (8, 8),
    "w4a8": (4, 8),
    "w4a4": (4, 4),
    "w2a4": (2, 4),
    "w4 groups": (4, None),
}
SETTINGS = {
    f"{name} {scheme}": settings(bits, scheme == "symmetric")
    for name, bits in BITS.items()
    for scheme in ("symmetric", "affine")
}


@cache
def digits() -> tuple[Tensor, Tensor]:
    """1797 images in 0..1 and their labels."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.as_tensor(labels)


def inputs(network: str, count: int) -> Tensor:
    """The first images, as the network takes them."""
    return NETWORKS[network][1](digits()[0][:count])


def train(model: nn.Module, x: Tensor, epochs: int, rate: float) -> None:
    """Adam with cross-entropy over the digits."""
    labels = digits()[1]
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), labels[index]).backward()
            optimizer.step()
            lfq.project_(model)


@cache
def _in_float(network: str) -> nn.Module:
    torch.manual_seed(0)
    model = NETWORKS[network][0]()
    train(model, inputs(network, 1797), 20 if network in ("separable", "encoder") else 6, 3e-3)
    return model


def trained(network: str, weight: Any, activation: Any, epochs: int = 1) -> nn.Module:
    """A network trained in float and then with quantizers, in eval mode."""
    model = copy.deepcopy(_in_float(network))
    torch.manual_seed(1)
    x = inputs(network, 1797)
    lfq.attach(model, weight, activation)
    lfq.calibrate(model, [x[:256]])
    lfq.set_phase(model, "learn")
    model.train()
    train(model, x, epochs, 1e-3)
    return model.eval()


def accuracy(model: nn.Module, network: str) -> float:
    """The share of all digits that a model names; nearly all of them were trained on."""
    with torch.no_grad():
        return float((model(inputs(network, 1797)).argmax(1) == digits()[1]).float().mean())
