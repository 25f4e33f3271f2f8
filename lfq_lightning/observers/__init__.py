"""What a tensor's range is, by the observer's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lfq_lightning.observers.base import Observer, Statistics
from lfq_lightning.observers.checking import check_observer
from lfq_lightning.observers.histogram import PercentileObserver
from lfq_lightning.observers.moments import LSQObserver, ThreeSigmaObserver
from lfq_lightning.observers.mse import MSEObserver
from lfq_lightning.observers.ranges import MinMaxObserver, MovingAverageObserver
from lfq_lightning.observers.together import Together, calculate_all, reset_all, update_all


def lsq_plus(quant_min: int = 0, quant_max: int = 255, symmetric: bool = False, *args: Any, **kwargs: Any) -> Observer:
    """LSQ+'s: three sigma for a symmetric quantizer, the least mean-square error for an affine one."""
    made = ThreeSigmaObserver if symmetric else MSEObserver
    return made(quant_min, quant_max, symmetric, *args, **kwargs)


OBSERVERS: dict[str, Callable[..., Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
    "lsq": LSQObserver,
    "lsq+": lsq_plus,
}

__all__ = [
    "OBSERVERS",
    "LSQObserver",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "Observer",
    "PercentileObserver",
    "Statistics",
    "ThreeSigmaObserver",
    "Together",
    "calculate_all",
    "check_observer",
    "reset_all",
    "update_all",
]
