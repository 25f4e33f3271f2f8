"""Observers whose range is that of the values seen."""

from __future__ import annotations

from typing import Any

import torch

from lfq_lightning.checking import check_number
from lfq_lightning.observers.base import Observer, Statistics


class MinMaxObserver(Observer):
    """The smallest and largest value of all that was seen."""


class MovingAverageObserver(Observer):
    """An exponential moving average of the batches' ranges, begun with the first batch.

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
        for state, new in ((self.minimum, -statistics.extremes[0]), (self.maximum, statistics.extremes[1])):
            moved = state + self.averaging_constant * (new - state)
            moved = torch.where(state.isfinite(), moved, new)
            state.copy_(torch.where(new.isfinite(), moved, state))
