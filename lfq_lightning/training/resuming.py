"""What Lightning leaves out when a run is resumed."""

from __future__ import annotations

import zipfile
from pathlib import Path

import lightning as L


def open_epoch(trainer: L.Trainer) -> None:
    """Count the epoch that a batch belongs to as begun.

    Lightning 2.6.6 does not where a run resumes from a checkpoint of an epoch's last batch. What is saved during the
    next epoch then looks like the end of an epoch, and resuming from it would start that epoch again. With the epoch
    counted, checkpoints are those of the uninterrupted run.

    Args:
        trainer: in the middle of a training epoch.
    """
    progress = trainer.fit_loop.epoch_progress
    if progress.current.ready == trainer.current_epoch:  # none is begun
        progress.increment_ready()
        progress.increment_started()


def explain_torn_checkpoint(trainer: L.Trainer, error: BaseException) -> None:
    """Add to an error what it does not say: that the checkpoint which is resumed from is not whole.

    Lightning reads it before any hook that could look at it. Nothing of the model has changed then.
    """
    path = Path(trainer.ckpt_path) if trainer.ckpt_path else None
    if path is not None and path.is_file() and not zipfile.is_zipfile(path):
        error.add_note(
            f"A checkpoint must be a whole file. Found {path.stat().st_size} bytes in `{path}` that torch did not "
            "write or that break off: resume from an earlier checkpoint."
        )
