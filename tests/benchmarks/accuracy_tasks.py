"""What the accuracy benchmark trains: digits with two networks, and a byte-level language model."""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import lightning as L
import torch
from networks import ConvolutionalNetwork
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks.networks import TransformerBlock

BYTES = 256
CONTEXT = 64


@dataclass(frozen=True)
class Data:
    """Training and test inputs and labels."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


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


def digits(seed: int) -> Data:
    """1,797 images of 8x8 pixels, half of them for training."""
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels, labels, test_size=0.5, stratify=labels, random_state=seed)
    train, test = (torch.as_tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for part in parts[:2])
    return Data((train, torch.as_tensor(parts[2])), (test, torch.as_tensor(parts[3])))


@cache
def source_text(files: int = 60, most: int = 8192) -> Tensor:
    """The first bytes of modules of Python's standard library, in order of name."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes()[:most] for path in sorted(folder.glob("*.py"))[:files])
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def source_code(seed: int) -> Data:
    """Windows of 64 bytes, each labelled with the byte that follows; the last tenth of the text is for the test."""
    text = source_text()
    windows = text[: len(text) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    cut = len(windows) * 9 // 10
    train, test = windows[:cut], windows[cut:]
    return Data((train[:, :-1], train[:, 1:]), (test[:, :-1], test[:, 1:]))


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


def percent(loss: Tensor, right: Tensor) -> float:
    return 100 * float(right)


def bits_per_byte(loss: Tensor, right: Tensor) -> float:
    return float(loss) / math.log(2)


def _images(block: str, widths: list[int], learning_rate: float, depth: int = 1) -> Task:
    def network() -> nn.Module:
        return ConvolutionalNetwork(block, channels=1, classes=10, widths=widths, depth=depth)  # type: ignore[arg-type]

    return Task(network, digits, "%", percent, True, 20, 64, learning_rate)


TASKS = {
    "residual": _images("residual", [16, 32], 3e-3),
    "separable": _images("separable", [32, 64], 3e-3, depth=2),
    "separable_fast": _images("separable", [32, 64], 1.2e-2, depth=2),
    "shallow_separable": _images("separable", [32, 64], 3e-3),
    "transformer": Task(LanguageModel, source_code, "bits per byte", bits_per_byte, False, 3, 64, 3e-3),
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
def score(task: Task, network: nn.Module, data: Data) -> float:
    """The score on the test data."""
    network.eval()
    loss, right, count = torch.zeros(()), torch.zeros(()), 0
    for x, labels in zip(*(part.split(512) for part in data.test), strict=True):
        scores = network(x).flatten(0, -2)
        loss += nn.functional.cross_entropy(scores, labels.flatten(), reduction="sum")
        right += (scores.argmax(-1) == labels.flatten()).sum()
        count += labels.numel()
    return task.score(loss / count, right / count)
