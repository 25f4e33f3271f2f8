"""What a run tells its user while it goes on, without breaking the progress bar."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info


def tell(trainer: L.Trainer, message: str) -> None:
    """Say something once for all ranks: above the progress bar where one is drawn, else through Lightning's logger.

    A line that is logged while a bar is drawn lands on the bar, or has the bar glued to it.
    """
    bar = trainer.progress_bar_callback
    if bar is not None and trainer.is_global_zero and _draws(bar):
        bar.print(message)
    else:
        rank_zero_info(message)


def _draws(bar: Any) -> bool:
    if not getattr(bar, "is_enabled", True):
        return False
    if any(kind.__name__ == "TQDMProgressBar" for kind in type(bar).__mro__):  # which swallows what comes too early
        try:
            return not bar.train_progress_bar.disable
        except TypeError:  # there is none yet
            return False
    return True
