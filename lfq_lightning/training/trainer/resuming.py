"""What Lightning leaves out when a run is resumed."""

from __future__ import annotations

import traceback

import lightning as L

from lfq_lightning.reading import untrusted

_CONNECTOR = "lightning.pytorch.trainer.connectors.checkpoint_connector"


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
    """Add to an error what it does not say: that the checkpoint which is resumed from could not be read.

    Lightning reads it before any hook that could look at it. Nothing of the model has changed then.
    """
    path = trainer.ckpt_path
    if not path or not _while_reading(error):
        return
    objects = untrusted(path)
    if objects:
        error.add_note(
            f"A checkpoint must be trusted before its objects are made. Found {', '.join(sorted(objects)[:5])} in "
            f"`{path}`: pass `weights_only=False` to the Trainer if you know where the file comes from."
        )
    elif not isinstance(error, FileNotFoundError):
        error.add_note(
            f"A checkpoint must be a whole file. Found one in `{path}` that torch did not write, or that broke off or "
            "was damaged: resume from an earlier checkpoint."
        )


def _while_reading(error: BaseException) -> bool:
    """Whether an error comes from torch's reader, called by Lightning's."""
    modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
    return {"torch.serialization", _CONNECTOR} <= modules
