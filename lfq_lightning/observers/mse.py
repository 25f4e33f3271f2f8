"""The observer that searches for the range with the least mean-square error."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lfq_lightning.observers.histogram import HistogramObserver, edges
from lfq_lightning.ops import power_of_two_below

# Shares of the whole range: a quarter of an octave apart, then a sixteenth around the best of those.
_COARSE = 2.0 ** (torch.arange(-20, 1, dtype=torch.float32, device="cpu") / 4)
_FINE = 2.0 ** (torch.arange(-4, 5, dtype=torch.float32, device="cpu") / 16)
_LARGEST = torch.finfo(torch.float32).max
_AT_ONCE = 1 << 21  # elements of one step of the search


class Points(NamedTuple):
    """What is to be represented: how often, around which value, and how far spread; each (channels or 1, points)."""

    counts: Tensor
    centre: Tensor
    width: Tensor


class MSEObserver(HistogramObserver):
    """The range whose codes represent what was seen with the least mean-square error, clipping included.

    A search as in Nagel et al. 2021 (arXiv 2106.08295), section 3.1, equation 11: for a symmetric range over its width,
    for an affine one over both ends, as LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576, section 3.3) asks.
    """

    def _fit(self, rows: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        finite = rows.isfinite()
        return self._search(Points(finite.float(), torch.where(finite, rows, 0.0), rows.new_zeros(1, 1)), low, high)

    def _fit_histogram(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        inner, outer = edges(self.histogram.device)
        counts = self.histogram
        used = counts.sum(0) > 0
        # Elsewhere, looking at the counts would wait for the device, and in a graph their number must be known.
        if counts.device.type == "cpu" and not torch.compiler.is_compiling():
            counts, inner, outer, used = counts[:, used], inner[used], outer[used], used[used]
        # The outermost bins, never used, are infinite.
        centre, width = (torch.where(used, p, 0.0).float()[None] for p in ((inner + outer) / 2, (outer - inner).abs()))
        return self._search(Points(counts.float(), centre, width), low, high)

    def _search(self, points: Points, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        # Errors are squared in units near the largest magnitude, as float32 does not hold 1e25 squared. A power of two
        # rounds nothing: the answer is the same in any unit.
        unit = power_of_two_below(torch.maximum(high, -low))[:, None]
        points = Points(points.counts, points.centre / unit, points.width / unit)
        for shares in (_COARSE.to(low.device), _FINE.to(low.device)):
            # An affine range may be narrowed at either end, each by its own share.
            pairs = shares.expand(2, -1) if self.symmetric else torch.cartesian_prod(shares, shares).T
            # Finite, where a share above 1 of the largest numbers is not.
            lows = (pairs[0][:, None] * low).clamp(min=-_LARGEST)
            highs = (pairs[1][:, None] * high).clamp(max=_LARGEST)
            step = max(1, _AT_ONCE // max(points.counts.numel(), 1))
            parts = zip(lows.split(step), highs.split(step), strict=True)
            best = torch.cat([self._errors(points, unit, *part) for part in parts]).argmin(0, keepdim=True)
            low, high = lows.gather(0, best).squeeze(0), highs.gather(0, best).squeeze(0)
        return self.covering(low, high)

    def _errors(self, points: Points, unit: Tensor, low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = (p[..., None] for p in self.covering(low, high))
        scale = (scale / unit).clamp(min=torch.finfo(torch.float32).tiny)
        code = (points.centre / scale).round() + zero_point
        clipped = code.clamp(self.quant_min, self.quant_max)
        error = ((clipped - zero_point) * scale - points.centre).square()
        # Within a bin that is wider than a step, rounding errors are spread evenly.
        rounded = torch.where(points.width > scale, scale.square() / 12, error)
        return (points.counts * torch.where(code == clipped, rounded, error)).sum(-1)
