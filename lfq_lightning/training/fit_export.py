"""The export of one fit: what is looked at before it trains, the batch that is kept, and the file when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from lfq_lightning.export.parity import Parity
from lfq_lightning.training.exporting import check_batch, check_fit, export_fit
from lfq_lightning.training.run_length import is_dev_run


class FitExport:
    """Exports a fit's model to a file, or does nothing without one.

    Args:
        path: the file to write; a relative path is taken from the Trainer's log directory.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = path
        self._last_batch: Any = None

    def begin(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Refuse a fit whose model could not be exported."""
        if self.path is not None:
            check_fit(trainer, model, self.path)
            self._last_batch = None

    def see(self, model: L.LightningModule, batch: Any) -> None:
        """Refuse, at the first batch, a model that cannot be traced; keep the batch."""
        if self.path is not None:
            if self._last_batch is None:
                check_batch(model, batch)
            self._last_batch = batch

    def end(self, trainer: L.Trainer, model: L.LightningModule) -> Parity | None:
        """Write the file on rank zero; every rank calls this."""
        if self.path is None or is_dev_run(trainer):
            return None
        return export_fit(trainer, model, self.path, self._last_batch)
