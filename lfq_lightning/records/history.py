"""Keeps whole scales and zero points of every epoch in one `.npz`, which NumPy reads."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lfq_lightning.records.trajectory import keep_aside

FILE_NAME = "qparams.npz"
MOST_BYTES = 64 * 2**20

_MOMENT = ("step", "epoch", "phase")

Array = npt.NDArray[Any]


class History:
    """Adds an epoch at a time to ``<directory>/qparams.npz``, and never stops a training because it cannot.

    The file holds ``step``, ``epoch`` and ``phase`` of shape (epochs,), and under the keys of the state dict, such as
    ``conv1.weight_quantizer.scale``, float32 arrays of shape (epochs, channels). A ZIP archive cannot be appended to
    without a moment in which a crash loses all of it, so each epoch writes the file anew and renames it into place.
    That stays cheap because the file is bounded: beyond 64 MiB, every second one of the earlier epochs is let go.

    A file that is already there and is not continued belongs to another run: it is kept aside as ``qparams.npz.bak``.
    If writing fails, one warning names the path and the error, and nothing more is kept. In a distributed run, make
    one on rank zero.

    Args:
        directory: Where the file lies; created with the first epoch.
        continue_from: File of the run that is being resumed, in this directory or another; its epochs up to `step` are
            carried over. If it cannot be read, a warning says why and the file starts afresh.
        step: Step of the checkpoint that is being resumed.

    Example:
        >>> import tempfile
        >>> history = History(tempfile.mkdtemp())
        >>> history.append(100, 0, "learn", {"fc.weight_quantizer.scale": np.ones(4, np.float32)})
        >>> read_qparams(history.path)["fc.weight_quantizer.scale"].shape
        (1, 4)
    """

    def __init__(self, directory: Path | str, continue_from: Path | str | None = None, step: int = 0) -> None:
        # Absolute, because a training script may change its working directory after this.
        self.path = Path(directory).absolute() / FILE_NAME
        self._keeping = True
        self._epochs: list[dict[str, Array]] = []
        try:
            source = None if continue_from is None else Path(continue_from).absolute()
            if source is not None and source.is_file():
                self._carry_over(source, step)
            else:
                keep_aside(self.path)
        except Exception as error:  # whatever it is, training goes on
            self._stop(error)

    def append(self, step: int, epoch: int, phase: str, vectors: Mapping[str, Array]) -> None:
        """Write one more epoch, or, where that fails, warn once and keep nothing more.

        Args:
            step: optimizer steps taken; an epoch that was written at the same step is replaced.
            epoch: the epoch that ended.
            phase: the phase that was in force.
            vectors: by key in the state dict, an array of shape (channels,); the same keys and shapes each time.
        """
        if not self._keeping or not vectors:
            return
        moment = {"step": np.asarray(step, np.int64), "epoch": np.asarray(epoch, np.int64), "phase": np.asarray(phase)}
        added: dict[str, Array] = {**moment, **vectors}
        try:
            if self._epochs and _shapes(self._epochs[-1]) != _shapes(added):
                self._start_afresh("it describes other quantizers")
            if self._epochs and self._epochs[-1]["step"] == step:
                self._epochs.pop()
            self._epochs.append(added)
            while len(self._epochs) > 2 and len(self._epochs) * _bytes(added) > MOST_BYTES:
                self._epochs = [*self._epochs[:-1:2], added]
            self._write()
        except Exception as error:  # whatever it is, training goes on
            self._stop(error)

    def _write(self) -> None:
        if not self._epochs:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(FILE_NAME + ".tmp")
        try:
            with open(temporary, "wb") as file:  # given a name, NumPy would add a suffix to it
                arrays = {key: np.stack([epoch[key] for epoch in self._epochs]) for key in self._epochs[0]}
                np.savez(file, allow_pickle=False, **arrays)
            os.replace(temporary, self.path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def _carry_over(self, source: Path, step: int) -> None:
        try:
            found = read_qparams(source)
        except ValueError as error:
            self._start_afresh(str(error))
            return
        kept = [i for i, at in enumerate(found["step"]) if at <= step]
        self._epochs = [{key: values[i] for key, values in found.items()} for i in kept]
        if source.resolve() != self.path.resolve() or not kept:
            keep_aside(self.path)
        self._write()

    def _start_afresh(self, reason: str) -> None:
        aside = keep_aside(self.path)
        self._epochs = []
        kept = f", and the file that was there is kept as `{aside}`" if aside else ""
        warnings.warn(
            f"The scales of the resumed run cannot be continued ({reason}). They start afresh in `{self.path}`{kept}.",
            stacklevel=4,
        )

    def _stop(self, error: Exception) -> None:
        self._keeping = False
        warnings.warn(
            f"Scales and zero points cannot be written to `{self.path}` ({error}). Training goes on, and no more of "
            "them is kept: free the disk or choose a writable directory before the next run.",
            stacklevel=3,
        )


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


def _shapes(epoch: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {key: values.shape for key, values in epoch.items()}


def _bytes(epoch: Mapping[str, Array]) -> int:
    return sum(values.nbytes for values in epoch.values())
