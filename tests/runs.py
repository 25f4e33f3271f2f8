"""Small real runs: a network, data in a fixed order, and a Trainer without noise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lfq_lightning as lfq

BATCHES = 8


class Net(L.LightningModule):
    """Two convolutions with BatchNorm and a classifier, 8x8 inputs, 10 classes."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, stride=2)
        self.head = nn.Linear(9 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(torch.relu(self.second(x)).flatten(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]


def images(count: int = 8 * BATCHES, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=generator)
    return TensorDataset(x, torch.randint(0, 10, (count,), generator=generator))


def loader(batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(images(), batch_size=batch_size)


class StatefulLoader:
    """The same batches, and it can be stopped and gone on with in the middle of an epoch."""

    def __init__(self) -> None:
        self.batches = list(loader())
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.position % len(self.batches), len(self.batches)):
            self.position = index + 1
            yield self.batches[index]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def trainer(directory: Path, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    """A quiet Trainer on the CPU, with three epochs and two batches of validation unless told."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpointing = {} if any(isinstance(c, ModelCheckpoint) for c in callbacks) else {"enable_checkpointing": False}
    short = {"max_epochs": 3, "limit_val_batches": 2}
    options = {"accelerator": "cpu", "devices": 1, **short, **quiet, **checkpointing, **options}
    return L.Trainer(default_root_dir=directory, callbacks=callbacks, **options)


def qat(**options: Any) -> lfq.QuantizationAwareTraining:
    """4 bits, one epoch to observe, one to estimate, then learning; recorded every third step."""
    settings = {"weight": 4, "activation": 4, "schedule": lfq.PhaseSchedule(0, 1, 2), "record_every_n_steps": 3}
    return lfq.QuantizationAwareTraining(**{**settings, **options})


def fit(directory: Path, model: L.LightningModule | None = None, **options: Any) -> tuple[Any, L.Trainer, Any]:
    """Fit from a fixed seed; the model, the Trainer and the callback."""
    L.seed_everything(3, verbose=False)
    model = Net() if model is None else model
    callback = options.pop("callback", None) or qat()
    more = options.pop("callbacks", [])
    data = options.pop("data", None) or loader()
    resume = options.pop("ckpt_path", None)
    made = trainer(directory, [callback, *more], **options)
    step = type(getattr(model, "_orig_mod", model)).validation_step
    validation = loader() if step is not L.LightningModule.validation_step else None
    made.fit(model, data, validation, ckpt_path=resume, weights_only=True if resume else None)
    return model, made, callback


def every_epoch(directory: Path) -> ModelCheckpoint:
    return ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1)
