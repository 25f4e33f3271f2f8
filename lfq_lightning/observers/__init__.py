"""What a tensor's range is, by the observer's name."""

from lfq_lightning.observers.ranges import OBSERVERS, MinMaxObserver, MovingAverageObserver, Observer, check_observer

__all__ = ["OBSERVERS", "MinMaxObserver", "MovingAverageObserver", "Observer", "check_observer"]
