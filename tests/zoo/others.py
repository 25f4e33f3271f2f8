"""Graphs, adapters, torch's own layers, Lightning's demos, and networks as people write them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo.case import Case, Sample
from tests.zoo.language import WORDS, tokens

# ---- graphs ---------------------------------------------------------------------------------------------------------


class GraphNetwork(nn.Module):
    """Two layers of PyTorch Geometric, as its introduction has them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        from torch_geometric import nn as layers

        layer: Any = getattr(layers, kind)
        self.first, self.second = layer(8, 16), layer(16, 5)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.second(F.relu(self.first(x, edge_index)), edge_index)
        return out


def _graph() -> Sample:
    return {"x": torch.randn(10, 8), "edge_index": torch.randint(10, (2, 30))}


# ---- adapters -------------------------------------------------------------------------------------------------------


def _lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False)
    )
    made: nn.Module = get_peft_model(base, LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True))
    return made


# ---- torch's and Lightning's own ------------------------------------------------------------------------------------


class Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 32)
        self.transformer = nn.Transformer(32, 4, 2, 2, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        hidden = self.transformer(self.words(source), self.words(target), tgt_mask=mask, tgt_is_causal=True)
        out: Tensor = self.head(hidden)
        return out


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 16)
        self.recurrent = getattr(nn, kind)(16, 24, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(48, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        out: Tensor = self.head(self.recurrent(self.words(words))[0])
        return out


def _lightning_transformer() -> nn.Module:
    from lightning.pytorch.demos import Transformer

    return Transformer(vocab_size=WORDS, ninp=32, nhead=4, nhid=32, nlayers=2, dropout=0.0)


def _lightning_boring() -> nn.Module:
    from lightning.pytorch.demos.boring_classes import BoringModel

    return BoringModel()


# ---- as people write them -------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """Down, up, and what was before going down concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self._two(3, 8), self._two(8, 16)
        self.middle = self._two(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.after2, self.after1, self.head = self._two(32, 16), self._two(16, 8), nn.Conv2d(8, 2, 1)

    @staticmethod
    def _two(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
            *(nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)),
        )

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.middle(F.max_pool2d(second, 2))
        x = self.after2(torch.cat([second, self.up2(x)], dim=1))
        out: Tensor = self.head(self.after1(torch.cat([first, self.up1(x)], dim=1)))
        return out


class Detector(nn.Module):
    """A pyramid of features, heads that every level shares, and a layer of constants that decodes distances."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.SiLU())
            for i, o in ((3, 8), (8, 16), (16, 24))
        )
        self.lateral = nn.ModuleList(nn.Conv2d(c, 16, 1) for c in (16, 24))
        self.classes, self.boxes = nn.Conv2d(16, 5, 3, padding=1), nn.Conv2d(16, 4 * 8, 3, padding=1)
        self.decode = nn.Conv2d(8, 1, 1, bias=False).requires_grad_(False)
        self.decode.weight.data[:] = torch.arange(8.0).view(1, 8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        high = self.lateral[1](features[2])
        low = self.lateral[0](features[1]) + F.interpolate(high, scale_factor=2)
        found = []
        for level in (low, high):
            boxes = self.boxes(level).flatten(2)
            boxes = boxes.view(-1, 4, 8, boxes.shape[-1]).transpose(2, 1).softmax(1)
            found.append(torch.cat([self.decode(boxes).squeeze(1), self.classes(level).flatten(2).sigmoid()], 1))
        return torch.cat(found, -1)


class Adversaries(nn.Module):
    """A generator and a discriminator with spectral norms."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            *(nn.ConvTranspose2d(16, 16, 4), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh()),
        )
        normed = parametrizations.spectral_norm
        self.discriminator = nn.Sequential(
            *(normed(nn.Conv2d(3, 16, 4, 2, 1)), nn.LeakyReLU(0.2), nn.Flatten(), normed(nn.Linear(256, 1)))
        )

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.discriminator(self.generator(z))
        return out


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(
            nn.Conv1d(2, 8, 5), nn.ReLU(), nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(32, 8)
        )
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return ((self.tower(a) - self.tower(b)).abs() * self.scale).sum(1)


class Experts(nn.Module):
    """Tokens go to one expert each, by index."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = (chosen == number).unsqueeze(-1)
            out = out + torch.where(mask, expert(x), 0.0)
        made: Tensor = self.head(out * weights.unsqueeze(-1))
        return made


class Vocoder(nn.Module):
    """The block of a vocoder: transposed and dilated convolutions, all under weight_norm."""

    def __init__(self) -> None:
        super().__init__()
        normed = parametrizations.weight_norm
        self.before = normed(nn.Conv1d(8, 16, 7, padding=3))
        self.up = normed(nn.ConvTranspose1d(16, 8, 4, 2, 1))
        self.dilated = nn.ModuleList(normed(nn.Conv1d(8, 8, 3, dilation=d, padding=d)) for d in (1, 3))
        self.after = normed(nn.Conv1d(8, 1, 7, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(F.leaky_relu(self.before(x), 0.1))
        for layer in self.dilated:
            x = x + layer(F.leaky_relu(x, 0.1))
        return torch.tanh(self.after(F.leaky_relu(x)))


class Diffusion(nn.Module):
    """Noise levels as sinusoids, added to the features of a picture by an own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 8))
        self.stem, self.body, self.head = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 8), (8, 3)))
        self.norm = nn.GroupNorm(2, 8)
        self.mix = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        steps = torch.exp(torch.arange(8) * -1.0)
        angles = t * steps
        shift = self.time(torch.cat([angles.sin(), angles.cos()], -1)) @ self.mix
        hidden = F.silu(self.norm(self.stem(x)))
        out: Tensor = self.head(F.silu(self.body(hidden + shift[:, :, None, None])))
        return out


CASES = [
    Case("PyG GCN", lambda: GraphNetwork("GCNConv"), _graph, batched=True),
    Case(
        "PyG GAT",
        lambda: GraphNetwork("GATConv"),
        _graph,
        batched=True,
        share=0.8,
        why="attention's vectors are multiplied element by element",
    ),
    Case("peft LoRA on GPT-2", _lora, lambda: {"input_ids": tokens()}),
    Case("torch Transformer", Seq2Seq, lambda: {"source": tokens(), "target": tokens(8)}),
    Case("torch LSTM", lambda: Recurrent("LSTM"), lambda: {"words": tokens()}),
    Case("torch GRU", lambda: Recurrent("GRU"), lambda: {"words": tokens()}),
    Case("Lightning's Transformer", _lightning_transformer, lambda: {"inputs": tokens(), "target": tokens()}),
    Case("Lightning's BoringModel", _lightning_boring, lambda: {"x": torch.randn(32)}),
    Case("U-Net", UNet, lambda: {"x": torch.randn(3, 16, 16)}),
    Case("detector with two levels", Detector, lambda: {"x": torch.randn(3, 32, 32)}),
    Case("GAN", Adversaries, lambda: {"z": torch.randn(16, 1, 1)}),
    Case("siamese towers", Siamese, lambda: {"a": torch.randn(2, 24), "b": torch.randn(2, 24)}),
    Case("mixture of experts", Experts, lambda: {"x": torch.randn(6, 8)}),
    Case("vocoder", Vocoder, lambda: {"x": torch.randn(8, 12)}),
    Case("diffusion", Diffusion, lambda: {"x": torch.randn(3, 16, 16), "t": torch.rand(1)}),
]
