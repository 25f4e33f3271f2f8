"""What a tensor's range is, by the observer's name."""

from lfq_lightning.observers.base import Observer, Statistics
from lfq_lightning.observers.checking import check_observer
from lfq_lightning.observers.histogram import PercentileObserver
from lfq_lightning.observers.moments import LSQObserver
from lfq_lightning.observers.mse import LSQPlusObserver, MSEObserver
from lfq_lightning.observers.ranges import MinMaxObserver, MovingAverageObserver

OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
    "lsq": LSQObserver,
    "lsq+": LSQPlusObserver,
}

__all__ = [
    "OBSERVERS",
    "LSQObserver",
    "LSQPlusObserver",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "Observer",
    "PercentileObserver",
    "Statistics",
    "check_observer",
]
