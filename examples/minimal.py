"""The smallest job: one callback makes the fit of a LightningModule end in 4 bits. One file, no configuration.

python examples/minimal.py [EPOCHS]
"""

from __future__ import annotations

import sys

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.functional.classification import multiclass_accuracy

import lfq_lightning as lfq


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_accuracy", multiclass_accuracy(self(batch[0]), batch[1], 10, average="micro"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(max_epochs: int = 20) -> None:
    L.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    train, test = random_split(TensorDataset(images, torch.as_tensor(labels)), [0.7, 0.3])
    test_loader = DataLoader(test, batch_size=len(test))

    qat = lfq.QuantizationAwareTraining(weight=4, activation=4)
    trainer = L.Trainer(max_epochs=max_epochs, callbacks=[qat], accelerator="cpu", enable_progress_bar=False)
    model = Classifier()
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True))
    trainer.test(model, test_loader)
    lfq.summarize(model, next(iter(test_loader)))  # prints its table
    print(lfq.plot_trajectories(str(trainer.log_dir)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
