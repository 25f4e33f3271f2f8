"""Making good what Lightning forgets when a run is resumed between two epochs."""

from __future__ import annotations

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
