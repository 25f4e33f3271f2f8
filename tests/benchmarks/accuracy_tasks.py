"""What the accuracy benchmark trains: images, series and text, each with a network and a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lightning as L
import torch
from networks import ConvolutionalNetwork
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks import accuracy_data as data_of
from tests.benchmarks.accuracy_data import BYTES, CONTEXT, Data
from tests.benchmarks.networks import TransformerBlock


@dataclass(frozen=True)
class Task:
    """A network, its data for a seed, and the budget of each of its two fits."""

    network: Callable[[], nn.Module]
    data: Callable[[int], Data]
    unit: str  # of the score
    score: Callable[[Tensor, Tensor], float]  # of the mean loss and of the share of right answers
    higher_is_better: bool
    epochs: int
    batch_size: int
    learning_rate: float


class LanguageModel(nn.Module):
    """A causal transformer over bytes, 2 layers of width 64."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, width)
        self.positions = nn.Parameter(torch.randn(CONTEXT, width) * 0.02)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads=4, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.bytes(x) + self.positions)))


class Series(nn.Module):
    """Convolutions over time, each halving it, the mean over what is left, and a classifier."""

    def __init__(self, channels: int, classes: int, widths: tuple[int, ...] = (32, 64, 64)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((channels, *widths), widths, strict=False):
            layers += [nn.Conv1d(before, width, 5, 2, 2, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(-1))


class Recurrent(nn.Module):
    """An LSTM over the steps of a series, the mean of its states, and a classifier; a layer before it is the first."""

    def __init__(self, channels: int, classes: int, width: int = 64) -> None:
        super().__init__()
        self.inputs, self.lstm = nn.Linear(channels, width), nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(torch.relu(self.inputs(x.transpose(1, 2))))[0].mean(1))


def percent(loss: Tensor, right: Tensor) -> float:
    return 100 * float(right)


def bits_per_byte(loss: Tensor, right: Tensor) -> float:
    return float(loss) / math.log(2)


def _images(
    block: str,
    widths: list[int],
    learning_rate: float,
    depth: int = 1,
    data: Callable[[int], Data] = data_of.digits,
    epochs: int = 20,
) -> Task:
    def network() -> nn.Module:
        return ConvolutionalNetwork(block, channels=1, classes=10, widths=widths, depth=depth)  # type: ignore[arg-type]

    return Task(network, data, "%", percent, True, epochs, 64, learning_rate)


TASKS = {
    "residual": _images("residual", [16, 32], 3e-3),
    "separable": _images("separable", [32, 64], 3e-3, depth=2),
    "separable_fast": _images("separable", [32, 64], 1.2e-2, depth=2),
    "shallow_separable": _images("separable", [32, 64], 3e-3),
    "transformer": Task(LanguageModel, data_of.source_code, "bits per byte", bits_per_byte, False, 3, 64, 3e-3),
    # None of these chose a default but `lr_factor`; see the README for how rates were chosen.
    "transformer_long": Task(LanguageModel, data_of.source_code, "bits per byte", bits_per_byte, False, 8, 64, 1e-2),
    "mnist_residual": _images("residual", [16, 32], 1e-2, data=data_of.mnist, epochs=8),
    "mnist_separable": _images("separable", [16, 32], 1e-2, depth=2, data=data_of.mnist, epochs=8),
    "mnist_1d": Task(partial(Series, 1, 10), data_of.mnist_1d, "%", percent, True, 20, 64, 1e-2),
    "vowels_convolutions": Task(partial(Series, 12, 9), data_of.vowels, "%", percent, True, 40, 16, 1e-2),
    "vowels_lstm": Task(partial(Recurrent, 12, 9), data_of.vowels, "%", percent, True, 40, 16, 3e-2),
}


class Training(L.LightningModule):
    """AdamW without weight decay and a cosine learning rate; qparams of others in a group of their own."""

    def __init__(self, network: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.network, self.learning_rate = network, learning_rate

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, labels = batch
        return nn.functional.cross_entropy(self(x).flatten(0, -2), labels.flatten())

    def configure_optimizers(self) -> dict[str, object]:
        named = list(self.named_parameters())
        foreign = [p for name, p in named if "_quantizer." in name]
        groups = [{"params": [p for name, p in named if "_quantizer." not in name]}]
        groups += [{"params": foreign, "lr": 1e-3}] if foreign else []
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(task: Task, network: nn.Module, data: Data, seed: int, callbacks: list[L.Callback]) -> None:
    """One budget of training, its batches the same for the same seed."""
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(*data.train), task.batch_size, shuffle=True, generator=order, drop_last=True)
    trainer = L.Trainer(
        max_epochs=task.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=Path("/tmp") if not callbacks else None,
    )
    trainer.fit(Training(network, task.learning_rate), loader)


@torch.no_grad()
def score(task: Task, network: nn.Module, examples: tuple[Tensor, Tensor]) -> float:
    """The score on these inputs and labels."""
    network.eval()
    loss, right, count = torch.zeros(()), torch.zeros(()), 0
    for x, labels in zip(*(part.split(512) for part in examples), strict=True):
        scores = network(x).flatten(0, -2)
        loss += nn.functional.cross_entropy(scores, labels.flatten(), reduction="sum")
        right += (scores.argmax(-1) == labels.flatten()).sum()
        count += labels.numel()
    return task.score(loss / count, right / count)
