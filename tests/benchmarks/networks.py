"""The networks of the step benchmark: every projection is a plain Conv2d or Linear."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def resnet18(width: int = 64, classes: int = 10) -> nn.Module:
    """ResNet-18 (He et al. 2016) with the 3x3 stem that is usual for images of 32x32."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage in range(4):
        for block in range(2):
            outputs = width * 2**stage
            layers.append(BasicBlock(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm1(x)
        q, k, v = (p(z).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        attended = (
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(-2)
        )
        x = x + self.out(attended)
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def transformer(width: int = 256, depth: int = 4, features: int = 32, classes: int = 10) -> nn.Module:
    """A pre-norm encoder over sequences of feature vectors; it labels every position."""
    blocks = [TransformerBlock(width, heads=4) for _ in range(depth)]
    return nn.Sequential(nn.Linear(features, width), *blocks, nn.LayerNorm(width), nn.Linear(width, classes))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden, self.adds = inputs * expand, stride == 1 and inputs == outputs
        widen = [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()] if expand > 1 else []
        self.layers = nn.Sequential(
            *widen,
            *(nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()),
            *(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.adds else y


def inverted_residuals(classes: int = 10) -> nn.Module:
    """MobileNetV2 (Sandler et al. 2018), of width 1."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    inputs = 32
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expand, outputs, count, stride in stages:
        for number in range(count):
            layers.append(InvertedResidual(inputs, outputs, 1 if number else stride, expand))
            inputs = outputs
    layers += [nn.Conv2d(inputs, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes))


def bert(depth: int = 2, classes: int = 10) -> nn.Module:
    """Two layers in the shape of BERT's base: 768 wide, and its vocabulary."""
    blocks = [TransformerBlock(768, heads=12) for _ in range(depth)]
    return nn.Sequential(nn.Embedding(30522, 768), *blocks, nn.LayerNorm(768), nn.Linear(768, classes))


class UNet(nn.Module):
    """Four levels of two convolutions (Ronneberger et al. 2015), the highest 16 wide; it labels every pixel."""

    def __init__(self, width: int = 16, levels: int = 4, classes: int = 2) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels)]
        self.down = nn.ModuleList(self.block(i, o) for i, o in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(self.block(i + 2 * i, i) for i in reversed(widths[:-1]))
        self.pool, self.larger, self.head = nn.MaxPool2d(2), nn.Upsample(scale_factor=2), nn.Conv2d(width, classes, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Module:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for block in self.down:
            x = block(self.pool(x) if kept else x)
            kept.append(x)
        for block, skip in zip(self.up, reversed(kept[:-1]), strict=True):
            x = block(torch.cat([skip, self.larger(x)], 1))
        return self.head(x)


class ViT(nn.Module):
    """Four blocks of ViT-tiny (Touvron et al. 2021), 192 wide, on patches of 16 x 16."""

    def __init__(self, width: int = 192, depth: int = 4, size: int = 96, classes: int = 10) -> None:
        super().__init__()
        self.patches, self.blocks = nn.Conv2d(3, width, 16, 16), nn.ModuleList()
        self.positions = nn.Parameter(torch.randn(1, (size // 16) ** 2, width) * 0.02)
        self.blocks.extend(TransformerBlock(width, heads=3) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def make(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with one batch of inputs and labels."""
    torch.manual_seed(0)
    if name == "resnet18":
        return resnet18(), torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    if name.startswith("inverted residuals"):
        count = 2 if name.endswith("2 images") else 32
        return inverted_residuals(), torch.randn(count, 3, 64, 64), torch.randint(10, (count,))
    if name.startswith("bert"):
        size = (1, 16) if name.endswith("16 tokens") else (8, 128)
        return bert(), torch.randint(30522, size), torch.randint(10, size)
    return transformer(), torch.randn(16, 128, 32), torch.randint(10, (16, 128))
