"""Observers whose range is that of the values seen."""

from __future__ import annotations

from typing import Any

import torch

from lfq_lightning.checking import check_number
from lfq_lightning.observers.base import Observer, Statistics
from lfq_lightning.observers.by_batch import ByBatchObserver


class MinMaxObserver(Observer):
    """The smallest and largest value of all that was seen, outliers included."""


class MovingAverageObserver(ByBatchObserver):
    """An exponential moving average of the batches' ranges, begun with the first batch; outliers' batches do not count.

    Jacob et al. 2018 (arXiv 1712.05877), section 3.1.

    Args:
        averaging_constant: weight of the newest batch.
    """

    def __init__(self, *args: Any, averaging_constant: float = 0.01, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_number("averaging_constant", averaging_constant)
        if not 0.0 < averaging_constant <= 1.0:
            raise ValueError(f"`averaging_constant` must be in (0, 1]. Found {averaging_constant}.")
        self.averaging_constant = averaging_constant

    def update(self, statistics: Statistics) -> None:
        if self.whole:
            super().update(statistics)
            return
        ends = torch.stack((self.minimum, self.maximum), dim=1)
        new = torch.stack((-statistics.extremes[0], statistics.extremes[1]), dim=1)
        known, seen = ends.isfinite().all(1), new.isfinite().all(1)
        weight = torch.where(known, self.averaging_constant, ends.new_ones(())) * seen
        before = torch.cat([torch.where(known[:, None], ends, 0.0), known.float()[:, None]], dim=1)
        values = torch.cat([torch.where(seen[:, None], new, 0.0), torch.ones_like(before[:, :1])], dim=1)
        total = self._add(statistics, values * weight[:, None], before, 1 - weight)
        average = torch.where(seen[:, None], total[:, :2] / total[:, 2:], ends)
        self.minimum.copy_(average[:, 0])
        self.maximum.copy_(average[:, 1])
