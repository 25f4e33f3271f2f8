"""Crops of photographs that come with scikit-image and scikit-learn, some of them kept apart from training."""

from __future__ import annotations

from functools import cache

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

TRAINING = ("astronaut", "chelsea", "china", "rocket", "hubble_deep_field", "immunohistochemistry", "retina")
APART = ("camera", "coffee", "flower", "stereo_motorcycle")


@cache
def photograph(name: str) -> Tensor:
    """One photograph, shape (3, height, width), as EfficientNet-Lite takes it: (pixel - 127) / 128."""
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image(f"{name}.jpg")
    else:
        import skimage.data

        found = getattr(skimage.data, name)()
        pixels = found[0] if isinstance(found, tuple) else found  # a stereo pair comes with its disparity
    colours = np.stack([pixels] * 3, axis=-1) if pixels.ndim == 2 else pixels
    return (torch.as_tensor(colours.copy()).movedim(-1, 0).float() - 127) / 128


class Crops(Dataset[Tensor]):
    """So many square crops, each of a random photograph, place and scale; the same for the same seed.

    Args:
        names: of the photographs.
        count: how many crops there are.
        size: their height and width in pixels.
        seed: decides which.
    """

    def __init__(self, names: tuple[str, ...], count: int, size: int = 128, seed: int = 0) -> None:
        self.names, self.count, self.size, self.seed = names, count, size, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        draw = np.random.default_rng((self.seed, index))
        whole = photograph(self.names[draw.integers(len(self.names))])
        side = draw.integers(self.size, min(whole.shape[1:]) + 1)
        top, left = (draw.integers(length - side + 1) for length in whole.shape[1:])
        crop = whole[None, :, top : top + side, left : left + side]
        resized = nn.functional.interpolate(crop, self.size, mode="bilinear", antialias=True)[0]
        return resized.flip(-1) if draw.random() < 0.5 else resized


class Photographs(L.LightningDataModule):
    """Crops without labels: `steps` batches to train with, and 256 crops of other photographs."""

    def __init__(self, steps: int, batch_size: int = 16, size: int = 128, seed: int = 0) -> None:
        super().__init__()
        self.steps, self.batch_size, self.size, self.seed = steps, batch_size, size, seed

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Crops(TRAINING, self.steps * self.batch_size, self.size, self.seed), self.batch_size)

    def test_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Crops(APART, 256, self.size, seed=10**6), 64)
