"""A histogram whose bins depend on no data, and the observer that leaves out outliers by it."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from lfq_lightning.checking import check_number
from lfq_lightning.observers.base import Observer, Statistics
from lfq_lightning.observers.outliers import beyond_the_rest, none_are_rare, rare_values
from lfq_lightning.observers.rows import rows_of

# A bin is a sign, an exponent and the first bits of a mantissa: 16 bins an octave over all of float32. So histograms of
# any batches and ranks add up exactly, and a change of units by a power of two changes nothing.
_SHIFT = 19
_PER_OCTAVE = 16
_PER_SIGN = 1 << (31 - _SHIFT)
BINS = 2 * _PER_SIGN


def histogram(rows: Tensor) -> Tensor:
    """How many finite values of each row fall into each bin, float64 of shape (rows, BINS)."""
    rows = rows.float().contiguous()
    bits = rows.view(torch.int32)
    index = ((bits & 0x7FFFFFFF) >> _SHIFT) + torch.where(bits < 0, _PER_SIGN, 0)
    index = index + torch.arange(len(rows), device=rows.device, dtype=torch.int32)[:, None] * BINS
    finite = rows.isfinite().flatten()
    looks = rows.device.type == "cpu" and not torch.compiler.is_compiling()  # at no cost, and outside a graph
    if looks and bool(finite.all()):
        return torch.bincount(index.flatten(), minlength=len(rows) * BINS).double().view(-1, BINS)
    counts = torch.zeros(len(rows) * BINS, dtype=torch.float64, device=rows.device)
    return counts.index_add_(0, index.flatten(), finite.double()).view(-1, BINS)


def edges(device: torch.device) -> tuple[Tensor, Tensor]:
    """The least and greatest value of each bin by magnitude, with the bin's sign, float64 of shape (BINS,)."""
    index = torch.arange(_PER_SIGN, device=device, dtype=torch.int32)
    inner = (index << _SHIFT).view(torch.float32).double()
    outer = torch.cat([inner[1:], inner[-1:]])
    return torch.cat([inner, -inner]), torch.cat([outer, -outer])


class HistogramObserver(Observer):
    """Keeps a histogram beside the range while it observes: 64 KiB for each scale, however many batches there are."""

    costly: ClassVar[bool] = True

    found: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sums = 0 if self.whole else BINS
        if self.whole:
            found = torch.ones((2, self.channels), dtype=torch.float32, device=self.minimum.device)
            self.register_buffer("found", found)

    def sums_of(self, x: Tensor) -> Tensor:
        if self.whole:
            return super().sums_of(x)
        return histogram(rows_of(x, self.axis, self.group_size, padding=math.nan))

    def update(self, statistics: Statistics) -> None:
        self.update_range(statistics)
        if not self.whole:
            self.add_histogram(statistics.sums)

    def update_range(self, statistics: Statistics) -> None:
        """`update`, but for the histogram."""
        super().update(statistics)
        if not self.whole:
            self._count(statistics)

    def add_histogram(self, counts: Tensor) -> None:
        """Take in that of one batch, as `sums_of` gives it."""
        # Whole numbers, so that a change of dtype leaves them alone.
        self._kept("histogram", BINS, torch.int64).add_(counts.long())

    @torch.no_grad()
    def observe(self, x: Tensor) -> Tensor:
        at_fault = super().observe(x)
        if self.whole and x.numel():
            rows = rows_of(x.detach(), self.axis, self.group_size, padding=math.nan).float()
            self.found.copy_(torch.stack(self._fit(rows, *self._range())))
        return at_fault

    def _qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.whole:
            return self.found[0], self.found[1]
        if "histogram" not in self.passing:  # settled: the range is what was found
            return self.reaching(low, high)
        return self._fit_histogram(*self._without_outliers(low, high))

    def _found_range(self) -> tuple[Tensor, Tensor]:
        scale, zero_point = self.calculate_qparams()
        return (self.quant_min - zero_point) * scale, (self.quant_max - zero_point) * scale

    def _without_outliers(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The histogram and its range without values that are rare and apart, or of few batches."""
        counts = self.passing["histogram"]
        magnitudes = counts[:, :_PER_SIGN] + counts[:, _PER_SIGN:]
        glance = "batches" in self.passing and none_are_rare(self.passing["batches"])
        if glance and not bool(rare_values(magnitudes, _PER_OCTAVE).any()):
            return counts, low, high
        inner = edges(counts.device)[0][:_PER_SIGN].nan_to_num(torch.inf)  # the outermost bins are never used
        few = torch.zeros_like(magnitudes, dtype=torch.bool)
        if "batches" in self.passing:  # files from before have none
            few = inner >= beyond_the_rest(self.passing["batches"]).double()[:, None]  # `_range` has left them out
        outliers = rare_values(magnitudes.masked_fill(few, 0), _PER_OCTAVE) | few
        limit = torch.where(outliers, inner, torch.inf).amin(1).float()
        counts = counts.masked_fill(outliers.repeat(1, 2), 0)
        return counts, torch.maximum(low, -limit), torch.minimum(high, limit)

    def _fit(self, rows: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The qparams for these rows; NaN is padding, and other values that are not finite do not count."""
        raise NotImplementedError

    def _fit_histogram(self, counts: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The qparams for all that a histogram holds, whose values lie between these ends."""
        raise NotImplementedError


class PercentileObserver(HistogramObserver):
    """The range that holds all but a small share of the values on each side, such as McKinstry et al. 2018 use.

    arXiv 1809.04191, section 3.1. A quantile is interpolated within its bin, a sixteenth of an octave wide.

    Args:
        percentile: of the values, above which (and, mirrored, below which) they count as outliers.
    """

    def __init__(self, *args: Any, percentile: float = 99.99, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_number("percentile", percentile)
        if not 50.0 < percentile <= 100.0:
            raise ValueError(f"`percentile` must be above 50 and at most 100. Found {percentile}.")
        self.percentile = percentile

    def _fit(self, rows: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        finite = rows.isfinite()
        ordered = torch.where(finite, rows, torch.inf).sort(dim=1).values
        count = finite.sum(1, keepdim=True)
        outside = ((1 - self.percentile / 100) * count.float()).long()  # whole numbers would take the default dtype
        last = (count - 1).clamp(min=0)
        lower = ordered.gather(1, torch.minimum(outside, last)).squeeze(1)
        upper = ordered.gather(1, (last - outside).clamp(min=0)).squeeze(1)
        return self.covering(lower.clamp(max=0.0), upper.clamp(min=0.0))

    def _without_outliers(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.percentile == 100.0:
            return self.passing["histogram"], self.minimum, self.maximum
        return super()._without_outliers(low, high)

    def _fit_histogram(self, counts: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        inner, outer = edges(counts.device)
        # In order of value: negative bins from the outermost inwards, then positive ones outwards.
        counts = torch.cat([counts[:, _PER_SIGN:].flip(1), counts[:, :_PER_SIGN]], dim=1).double()
        left = torch.cat([outer[_PER_SIGN:].flip(0), inner[:_PER_SIGN]])
        right = torch.cat([inner[_PER_SIGN:].flip(0), outer[:_PER_SIGN]])
        share = self.percentile / 100
        upper = _quantile(counts, left, right, share).float()
        lower = -_quantile(counts.flip(1), -right.flip(0), -left.flip(0), share).float()
        return self.covering(torch.maximum(lower, low).clamp(max=0.0), torch.minimum(upper, high).clamp(min=0.0))


def _quantile(counts: Tensor, left: Tensor, right: Tensor, share: float) -> Tensor:
    """For each row the value below which this share of the counts lies."""
    reached = counts.cumsum(1)
    wanted = share * reached[:, -1:]
    index = torch.searchsorted(reached, wanted).clamp(max=counts.shape[1] - 1)
    before = reached.gather(1, index) - counts.gather(1, index)
    within = ((wanted - before) / counts.gather(1, index).clamp(min=1)).clamp(0.0, 1.0)
    return (left[index] + within * (right[index] - left[index])).squeeze(1)
