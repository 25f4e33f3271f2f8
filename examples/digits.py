"""scikit-learn's handwritten digits, 1797 images of 8x8 pixels, as a LightningDataModule, and a classifier of them."""

from __future__ import annotations

import warnings

import lightning as L
import torch
from networks import ConvolutionalNetwork
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

warnings.filterwarnings("ignore", ".*does not have many workers")  # the digits are in memory
warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")  # Lightning's own, with torch 2.13


class Digits(L.LightningDataModule):
    """60 % of the images for training, 10 % for validation, 30 % for the test: one split, whatever the seed.

    Args:
        batch_size: Images in a training batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ImportError('The digits come with scikit-learn: pip install -e ".[examples]"') from error
        pixels, labels = load_digits(return_X_y=True)
        rest, test, rest_labels, test_labels = train_test_split(
            pixels, labels, test_size=0.3, stratify=labels, random_state=0
        )
        train, val, train_labels, val_labels = train_test_split(
            rest, rest_labels, test_size=1 / 7, stratify=rest_labels, random_state=0
        )
        self.train = as_images(train, train_labels)
        self.val = as_images(val, val_labels)
        self.test = as_images(test, test_labels)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, batch_size=256)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, batch_size=256)


def as_images(pixels: object, labels: object) -> TensorDataset:
    """Rows of 64 gray values in 0..16 become images of shape (1, 8, 8) in 0..1."""
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return TensorDataset(images, torch.as_tensor(labels))


class DigitsClassifier(L.LightningModule):
    """A small residual network, as one would write it without quantization in mind.

    Args:
        width: Channels of the first block; the second has twice as many.
        learning_rate: Of AdamW.
    """

    def __init__(self, width: int = 16, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.network = ConvolutionalNetwork("residual", channels=1, classes=10, widths=[width, 2 * width], depth=1)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("val/accuracy", self.accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("test/accuracy", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)
