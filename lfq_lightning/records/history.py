"""Whole scales and zero points of every epoch in one ``qparams.npz``, which NumPy reads.

The file holds ``step``, ``epoch`` and ``phase`` of shape (epochs,), and under the keys of the state dict, such as
``conv1.weight_quantizer.scale``, float32 arrays of shape (epochs, channels).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FILE_NAME = "qparams.npz"
MOST_BYTES = 64 * 2**20

_MOMENT = ("step", "epoch", "phase")

Array = npt.NDArray[Any]
Epoch = dict[str, Array]  # by key, without the dimension of epochs


def as_epoch(step: int, epoch: int, phase: str, vectors: Mapping[str, Array]) -> Epoch:
    """One epoch's entry: its moment and its scales and zero points."""
    moment = {"step": np.asarray(step, np.int64), "epoch": np.asarray(epoch, np.int64), "phase": np.asarray(phase)}
    return {**moment, **vectors}


def with_epoch(epochs: list[Epoch], added: Epoch) -> list[Epoch]:
    """One more epoch, in place of one at the same step; beyond 64 MiB every second of the earlier ones is let go."""
    if epochs and epochs[-1]["step"] == added["step"]:
        epochs = epochs[:-1]
    epochs = [*epochs, added]
    while len(epochs) > 2 and len(epochs) * sum(values.nbytes for values in added.values()) > MOST_BYTES:
        epochs = [*epochs[:-1:2], added]
    return epochs


def as_archive(epochs: list[Epoch]) -> bytes:
    """The whole file; nothing without an epoch."""
    file = io.BytesIO()
    if epochs:
        np.savez(file, allow_pickle=False, **{key: np.stack([epoch[key] for epoch in epochs]) for key in epochs[0]})
    return file.getvalue()


def epochs_up_to(path: Path, step: int) -> list[Epoch]:
    """A file's epochs up to a step; see `read_qparams`."""
    found = read_qparams(path)
    kept = [i for i, at in enumerate(found["step"]) if at <= step]
    return [{key: values[i] for key, values in found.items()} for i in kept]


def shapes(epoch: Epoch) -> dict[str, tuple[int, ...]]:
    """What must be equal in all epochs of a file."""
    return {key: values.shape for key, values in epoch.items()}


def read_qparams(path: Path | str) -> dict[str, Array]:
    """Read a ``qparams.npz``.

    Args:
        path: the file.

    Returns:
        ``step``, ``epoch`` and ``phase`` of shape (epochs,), and scales and zero points of shape (epochs, channels)
        under their keys in the state dict.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file.
    """
    try:
        with open(path, "rb") as file:  # given a name, NumPy leaves a torn archive open
            found = dict(np.load(file, allow_pickle=False))
    except FileNotFoundError:
        raise
    except Exception as error:  # of NumPy, zipfile and zlib, of many types, down to want of memory for a torn shape
        raise ValueError(f"`{path}` must be a `{FILE_NAME}` that a run has written. Found another ({error}).") from None
    if not _is_history(found):
        raise ValueError(f"`{path}` must hold step, epoch and phase. Found {', '.join(list(found)[:5]) or 'nothing'}.")
    return found


def _is_history(found: Mapping[str, Array]) -> bool:
    """Whether every array has an entry for each epoch, and the right kind of entries."""
    kinds = {"step": "i", "epoch": "i", "phase": "U"}
    return all(key in found and found[key].ndim == 1 for key in _MOMENT) and all(
        values.dtype.kind == kinds.get(key, "f") and values.shape[:1] == found["step"].shape
        for key, values in found.items()
    )
