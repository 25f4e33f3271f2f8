"""What quantizers saw in a batch, gathered, merged over uses and ranks, and taken in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lfq_lightning.observers import Observer, Statistics, Together, calculate_all, reset_all, update_all
from lfq_lightning.placement.points import Point, Points, activations, weights
from lfq_lightning.private import copy_each_
from lfq_lightning.quantizer import LearnableFakeQuantize

Reduce = Callable[[Tensor, Literal["max", "sum"]], Tensor]


class Met(NamedTuple):
    """Which observing quantizers met values that are not finite: a positive flag for each name."""

    names: tuple[str, ...]
    flags: Tensor

    def not_finite(self) -> list[str]:
        """Their names (copies to the host)."""
        return [name for name, flag in zip(self.names, self.flags.tolist(), strict=True) if flag > 0]


def set_gathering(quantizers: Iterable[LearnableFakeQuantize], gathering: bool | None) -> None:
    """Whether quantizers gather statistics for a caller to merge (None: observe by themselves while training)."""
    for quantizer in quantizers:
        # Twice a batch for each of thousands: the way through nn.Module takes twenty times as long.
        quantizer.__dict__["gathering"] = gathering


@contextmanager
def gathering(quantizers: Iterable[LearnableFakeQuantize]) -> Iterator[None]:
    """Within it, quantizers gather the statistics of a batch in every mode, for `Gathered` to take in."""
    quantizers = list(quantizers)
    set_gathering(quantizers, True)
    try:
        yield
    finally:
        set_gathering(quantizers, None)


@contextmanager
def gathering_paused(quantizers: Iterable[LearnableFakeQuantize]) -> Iterator[None]:
    """Within it, quantizers that gather the statistics of a batch gather nothing."""
    paused = [quantizer for quantizer in quantizers if quantizer.gathering]
    set_gathering(paused, False)
    try:
        yield
    finally:
        set_gathering(paused, True)


class Gathered:
    """Quantizers whose statistics are merged after one batch and the next, and what no batch needs to find out again.

    Args:
        points: whose quantizers gather; these and their observers stay what and where they are.

    Attributes:
        quantizers: those to be told when to gather.
    """

    def __init__(self, points: Points) -> None:
        self.quantizers = [point.quantizer for point in activations(points)]
        # Of a weight that a user hands in, every batch and every rank has the same, so that nothing is to be merged.
        self._merged = [
            (point.name, point.quantizer, vars(point.quantizer), point.quantizer.observer)
            for point in activations(points)
            if point.role != "weight" and isinstance(point.quantizer.observer, Observer)
        ]
        self._together = Together([observer for *_, observer in self._merged])

    @torch.no_grad()
    def merge(self, reduce: Reduce | None = None) -> Met | None:
        """Take one batch's statistics into every observing quantizer, and set its qparams in phase "estimate".

        Args:
            reduce: the elementwise maximum ("max") or sum ("sum") of a flat tensor over all ranks; called once for each
                that an observer needs. Every rank takes part whatever it saw.

        Returns:
            Which of those that saw the batch met values that are not finite; None if none did.
        """
        names: list[str] = []
        statistics: dict[Observer, Statistics] = {}
        estimated: list[LearnableFakeQuantize] = []
        for name, quantizer, own, observer in self._merged:
            gathered = own["batch_statistics"]
            if own["static_enabled"] and (gathered is not None or reduce is not None):
                names.append(name)
                statistics[observer] = observer.nothing() if gathered is None else gathered
                own["batch_statistics"] = None
                if own["fake_quant_enabled"] and not own["learned"]:
                    estimated.append(quantizer)
        if not names:
            return None
        if reduce is not None:
            statistics = _over_ranks(statistics, reduce)
        self._together.update(statistics)
        _estimate_seen(estimated)
        return Met(tuple(names), _flags([part.extremes for part in statistics.values()]))


def _over_ranks(statistics: Mapping[Observer, Statistics], reduce: Reduce) -> dict[Observer, Statistics]:
    extremes = _merged([part.extremes for part in statistics.values()], "max", reduce)
    sums = _merged([part.sums for part in statistics.values()], "sum", reduce)
    return dict(zip(statistics, map(Statistics, extremes, sums), strict=True))


def _merged(parts: list[Tensor], operation: Literal["max", "sum"], reduce: Reduce) -> list[Tensor]:
    sizes = [part.numel() for part in parts]
    if not sum(sizes):
        return parts
    merged = reduce(torch.cat([part.flatten() for part in parts]), operation).split(sizes)
    return [flat.view_as(part) for flat, part in zip(merged, parts, strict=True)]


def _flags(extremes: list[Tensor]) -> Tensor:
    """Positive where an entry of the third row is."""
    device = extremes[0].device
    each = torch.cat([part if part.device == device else part.to(device) for part in extremes], dim=1)[2]
    if len(each) == len(extremes):
        return each
    sizes = torch.tensor([part.shape[1] for part in extremes], device="cpu").to(device, non_blocking=True)
    index = torch.arange(len(extremes), device=device).repeat_interleave(sizes, output_size=len(each))
    return each.new_zeros(len(extremes)).index_add_(0, index, each)


def _estimate_seen(quantizers: Iterable[LearnableFakeQuantize]) -> None:
    again = []
    for quantizer in quantizers:
        if quantizer.estimated:
            again.append(quantizer)  # its sign stays as it was decided, and nothing waits for the device
        elif quantizer.saw_data():
            quantizer.estimate()
    _estimate(again)


def follow_blank(blank: Iterable[Point]) -> list[LearnableFakeQuantize]:
    """Estimate anew scales of weights that were all zeros and have grown since; the quantizers whose scales were set.

    Args:
        blank: usually what `blank_weights` gave.
    """
    return [point.quantizer for point in blank if point.quantizer.follow(point.whole_parameter())]


def mark_blank(points: Points) -> None:
    """Note which channels of weights that have yet to learn are all zeros now."""
    for point in weights(points):
        if not point.quantizer.learned:
            point.quantizer.mark_blank(point.whole_parameter())


def blank_weights(points: Points) -> list[Point]:
    """Weights with a channel that was all zeros when it was marked, or when its scale was set."""
    return [point for point in weights(points) if point.quantizer.blank is not None]


@torch.no_grad()
def estimate_weights(points: Points, cheap: bool = False) -> None:
    """Set the qparams of weights that have not begun to learn from the weights as they are.

    Args:
        points: of a model; those that are no weights stay as they are.
        cheap: leave out those that cost more than a look at the weights, as after each batch.
    """
    looked: dict[LearnableFakeQuantize, Statistics] = {}
    for point in weights(points):
        quantizer = point.quantizer
        if quantizer.learned or (cheap and quantizer.costly):
            continue
        observer = quantizer.observer
        if isinstance(observer, Observer) and type(observer).observe is Observer.observe:
            looked[quantizer] = observer.statistics(point.whole_parameter())
        else:
            quantizer.estimate_from(point.whole_parameter())
    statistics = {_observer(quantizer): seen for quantizer, seen in looked.items()}
    reset_all(list(statistics))
    update_all(statistics)
    _estimate(list(looked))


def _estimate(quantizers: list[LearnableFakeQuantize]) -> None:
    """`estimate` of each, but for the sign."""
    found = calculate_all([_observer(quantizer) for quantizer in quantizers])
    own: list[Tensor] = []
    new: list[Tensor] = []
    for quantizer, qparams in zip(quantizers, found, strict=True):
        own += [quantizer.scale, quantizer.zero_point]
        new += qparams
        quantizer.__dict__["estimated"] = True
    if own:
        copy_each_(own, new)


def _observer(quantizer: LearnableFakeQuantize) -> Observer:
    observer = quantizer.observer
    assert isinstance(observer, Observer)
    return observer
