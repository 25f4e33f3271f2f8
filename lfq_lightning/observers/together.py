"""Many observers at once: a network has thousands of few numbers each, and one operation serves them all."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from lfq_lightning.observers.base import Observer, Statistics
from lfq_lightning.observers.histogram import HistogramObserver, PercentileObserver
from lfq_lightning.observers.moments import LSQObserver, ThreeSigmaObserver
from lfq_lightning.observers.mse import MSEObserver
from lfq_lightning.observers.ranges import MinMaxObserver, MovingAverageObserver
from lfq_lightning.private import add_each_, copy_each_, maximum_each_, minimum_each_, subtract_each_, zero_each_

# The kinds that compute each channel by itself, and what two of a kind must have in common for their state to be
# updated together, and for their qparams to be calculated: where a search takes all of the time, nothing is won.
Settings = Callable[[Mapping[str, Any]], Hashable]
_UPDATED: dict[type[Observer], Settings] = {
    kind: itemgetter("whole")
    for kind in (Observer, MinMaxObserver, LSQObserver, ThreeSigmaObserver, PercentileObserver, MSEObserver)
}
_UPDATED[MovingAverageObserver] = itemgetter("whole", "averaging_constant")
_CALCULATED: dict[type[Observer], Settings] = {
    kind: itemgetter("quant_min", "quant_max", "symmetric", "power_of_two")
    for kind in (Observer, MinMaxObserver, MovingAverageObserver, LSQObserver, ThreeSigmaObserver)
}
# Channels at once: some keep a few KiB for each, which is copied here and back.
_CHANNELS = 1024


def reset_all(observers: Sequence[Observer]) -> None:
    """`reset` of each."""
    plain = [observer for observer in observers if type(observer).reset is Observer.reset]
    if plain:
        lows, highs = _each(plain, "minimum"), _each(plain, "maximum")
        zero_each_(lows + highs)
        add_each_(lows, torch.inf)
        subtract_each_(highs, torch.inf)
    for observer in observers:
        if type(observer).reset is not Observer.reset:
            observer.reset()


class Together:
    """Observers that take in one batch after the other, with what no batch needs to find out again.

    Args:
        observers: stay what and where they are.
    """

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._groups = list(_parted(observers, _UPDATED))

    def update(self, statistics: Mapping[Observer, Statistics]) -> None:
        """`update` of each that saw a batch with its statistics, bit for bit."""
        for group in self._groups:
            seen = [observer for observer in group if observer in statistics]
            parts = [statistics[observer] for observer in seen]
            if len(seen) > 1 and type(seen[0]).update is Observer.update:
                _widen(seen, parts)
            elif len(seen) > 1 and all(vars(one)["passing"].keys() == seen[0].passing.keys() for one in seen):
                _update(seen, parts)
            else:
                for observer, part in zip(seen, parts, strict=True):
                    observer.update(part)


def update_all(statistics: Mapping[Observer, Statistics]) -> None:
    """`update` of each with its statistics, bit for bit."""
    Together(list(statistics)).update(statistics)


def _widen(group: list[Observer], parts: list[Statistics]) -> None:
    """`Observer.update` of each."""
    extremes, sizes = torch.cat([part.extremes for part in parts], dim=1), [part.extremes.shape[1] for part in parts]
    lows, highs = _each(group, "minimum"), _each(group, "maximum")
    low, high = -extremes[0], extremes[1]
    if low.device.type == "cpu":  # looking costs nothing there, and ranges that have settled need no work
        wider = (low < torch.cat(lows)) | (high > torch.cat(highs))
        ends = list(accumulate(sizes))
        chosen = sorted({bisect_right(ends, channel) for channel in wider.nonzero().flatten().tolist()})
        if 4 * len(chosen) < len(group):
            for index in chosen:
                group[index].update(parts[index])
            return
    minimum_each_(lows, low.split(sizes))
    maximum_each_(highs, high.split(sizes))


def _update(group: list[Observer], parts: list[Statistics]) -> None:
    """`update` of each, by one observer with the channels of all."""
    whole, extremes = _whole(group), torch.cat([part.extremes for part in parts], dim=1)
    if isinstance(whole, HistogramObserver):  # histograms are too large to be copied here and back
        for observer, part in zip(group, parts, strict=True):
            observer.add_histogram(part.sums)
        whole.update_range(Statistics(extremes, extremes[:0]))
    else:
        whole.update(Statistics(extremes, torch.cat([part.sums for part in parts])))
    _hand_back(whole, group)


def calculate_all(observers: Sequence[Observer]) -> list[tuple[Tensor, Tensor]]:
    """`calculate_qparams` of each, bit for bit."""
    found: dict[Observer, tuple[Tensor, Tensor]] = {}
    for group in _parted(observers, _CALCULATED):
        if len(group) == 1 or any(vars(one)["passing"].keys() != group[0].passing.keys() for one in group):
            found.update((observer, observer.calculate_qparams()) for observer in group)
            continue
        sizes = _sizes(group)
        scales, zero_points = (qparams.split(sizes) for qparams in _whole(group).calculate_qparams())
        found.update(zip(group, zip(scales, zero_points, strict=True), strict=True))
    return [found[observer] for observer in observers]


def _parted(observers: Sequence[Observer], by: Mapping[type[Observer], Settings]) -> Iterator[list[Observer]]:
    """Groups of those that are alike, none with too many channels, and each of the others alone."""
    groups: dict[Hashable, list[Observer]] = {}
    for observer in observers:
        kind, own = type(observer), vars(observer)
        if kind in by:
            minimum = own["_buffers"]["minimum"]
            key = kind, by[kind](own), minimum.device, minimum.dtype
            groups.setdefault(key, []).append(observer)
        else:
            yield [observer]
    for group in groups.values():
        first = channels = 0
        for index, size in enumerate(_sizes(group)):
            if channels and channels + size > _CHANNELS:
                yield group[first:index]
                first, channels = index, 0
            channels += size
        yield group[first:]


def _each(group: list[Observer], buffer: str) -> list[Tensor]:
    # The way through nn.Module takes twenty times as long, and there are thousands.
    return [vars(observer)["_buffers"][buffer] for observer in group]


def _sizes(group: list[Observer]) -> list[int]:
    return [minimum.numel() for minimum in _each(group, "minimum")]


def _whole(group: list[Observer]) -> Observer:
    """One observer with the channels of all."""
    whole = copy.copy(group[0])
    for held in ("_buffers", "passing"):
        each = [vars(observer)[held] for observer in group]
        vars(whole)[held] = {name: torch.cat([one[name] for one in each]) for name in each[0] if name != "histogram"}
    return whole


def _hand_back(whole: Observer, group: list[Observer]) -> None:
    """Give each observer its channels' part of the state."""
    sizes = _sizes(group)
    for held in ("_buffers", "passing"):
        for name, together in vars(whole)[held].items():
            parts = together.split(sizes)
            if name in vars(group[0])[held]:
                copy_each_([vars(observer)[held][name] for observer in group], parts)
            else:
                for observer, part in zip(group, parts, strict=True):
                    vars(observer)[held][name] = part.clone()
