"""A byte-level transformer on the source of the standard library: float, then 4-bit weights in groups.

python examples/language_model.py [STEPS]
"""

from __future__ import annotations

import math
import sys
import sysconfig
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader, RandomSampler

import lfq_lightning as lfq

CONTEXT, WIDTH, HEADS, DEPTH = 64, 96, 4, 2


def windows(files: list[Path]) -> Any:
    """Every window of CONTEXT + 1 bytes of some files: a tensor is a dataset of its rows."""
    text = torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))), dtype=torch.uint8)
    return text.long().unfold(0, CONTEXT + 1, 1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class LanguageModel(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.blocks(self.bytes(text) + self.places.weight[: text.shape[1]]))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("bits_per_byte", self.training_step(batch, batch_idx) / math.log(2))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def source_code(steps: int) -> tuple[DataLoader[Tensor], DataLoader[Tensor]]:
    """So many batches of the standard library's source to train with, and some of every tenth file to test."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    train = windows([file for i, file in enumerate(files) if i % 10])
    batches = DataLoader(train, batch_size=32, sampler=RandomSampler(train, num_samples=32 * steps))
    return batches, DataLoader(windows(files[::10]), batch_size=64, sampler=range(0, 64 * CONTEXT * 16, CONTEXT))


def main(steps: int = 300) -> None:
    L.seed_everything(0)
    batches, test = source_code(steps)
    model = LanguageModel()
    weight = lfq.QuantSpec(bits=4, granularity="per_group", group_size=32)
    qat = lfq.QuantizationAwareTraining(weight=weight, activation=8)
    fits: dict[str, list[L.Callback]] = {"float": [], "4 bits in groups of 32, inputs in 8": [qat]}
    for name, callbacks in fits.items():
        trainer = L.Trainer(max_epochs=1, callbacks=callbacks, accelerator="cpu", enable_progress_bar=False)
        trainer.fit(model, batches)
        [result] = trainer.test(model, test, verbose=False)
        print(f"{name}: {result['bits_per_byte']:.3f} bits per byte")
    lfq.summarize(model, next(iter(test))[:, :-1])  # prints its table


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
