"""Observers that search for the range with the least mean-square error."""

from __future__ import annotations

import torch
from torch import Tensor

from lfq_lightning.observers.base import Statistics, rows_of
from lfq_lightning.observers.histogram import HistogramObserver, edges
from lfq_lightning.observers.moments import moments

# Shares of the whole range, 16 to the octave, from a 32nd of it to a little more than all.
_SHARES = 2.0 ** (torch.arange(-80, 3) / 16)
_AT_ONCE = 1 << 21  # elements of one step of the search


class MSEObserver(HistogramObserver):
    """The range whose codes represent what was seen with the least mean-square error, clipping included.

    A search as in Nagel et al. 2021 (arXiv 2106.08295), section 3.1, equation 11, on the histogram: a symmetric range
    over its width, an affine one over either end in turn.
    """

    def _qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        inner, outer = edges(self.histogram.device)
        counts = self.histogram
        if counts.device.type == "cpu":
            used = counts.sum(0) > 0
            counts, inner, outer = counts[:, used], inner[used], outer[used]
        inner, outer = (e.float() for e in (inner, outer))
        shares = _SHARES.to(low.device)
        low, high = low.clone(), high.clone()
        whole = low.clone(), high.clone()
        if self.symmetric:
            best = self._best(counts, inner, outer, shares[:, None] * low, shares[:, None] * high)
            return self.covering(shares[best] * low, shares[best] * high)
        for _ in range(2):
            ends = shares[:, None] * whole[1], shares[:, None] * whole[0]
            best = self._best(counts, inner, outer, low.expand_as(ends[0]), ends[0])
            high = shares[best] * whole[1]
            best = self._best(counts, inner, outer, ends[1], high.expand_as(ends[1]))
            low = shares[best] * whole[0]
        return self.covering(low, high)

    def _best(self, counts: Tensor, inner: Tensor, outer: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Which of the candidates, low and high of shape (candidates, channels), has the least error by channel."""
        step = max(1, _AT_ONCE // max(counts.numel(), 1))
        errors = [
            self._errors(counts, inner, outer, a, b) for a, b in zip(low.split(step), high.split(step), strict=True)
        ]
        return torch.cat(errors).argmin(0)

    def _errors(self, counts: Tensor, inner: Tensor, outer: Tensor, low: Tensor, high: Tensor) -> Tensor:
        scale, zero_point = (p[..., None] for p in self.covering(low, high))
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        centre, width = (inner + outer) / 2, (outer - inner).abs()
        code = (centre / scale).round() + zero_point
        clipped = code.clamp(self.quant_min, self.quant_max)
        error = ((clipped - zero_point) * scale - centre).square()
        # Within a bin that is wider than a step, rounding errors are spread evenly.
        spread = torch.where(width > scale, scale.square() / 12, error)
        return (counts * torch.where(code == clipped, spread, error)).sum(-1)


class LSQPlusObserver(MSEObserver):
    """Bhalgat et al. 2020 (LSQ+, arXiv 2004.09576), section 3.3.

    Symmetric, for weights: scale = max(|mean - 3 sigma|, |mean + 3 sigma|) / 2^(bits - 1). Affine, for activations: the
    scale and offset with the least mean-square error.
    """

    moments: Tensor

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        zeros = torch.zeros((self.channels, 4), dtype=torch.float64, device=self.minimum.device)
        self.register_buffer("moments", zeros)

    @property
    def sums(self) -> int:  # type: ignore[override]
        """Moments and histogram side by side."""
        return 4 + HistogramObserver.sums

    def sums_of(self, x: Tensor) -> Tensor:
        rows = rows_of(x, self.axis, self.group_size, padding=torch.nan).float()
        return torch.cat([moments(rows), super().sums_of(x)], dim=1)

    def update(self, statistics: Statistics) -> None:
        self.moments += statistics.sums[:, :4]
        super().update(Statistics(statistics.extremes, statistics.sums[:, 4:]))

    def reset(self) -> None:
        super().reset()
        self.moments.zero_()

    def _qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if not self.symmetric:
            return super()._qparams(low, high)
        count, _, total, squares = self.moments.unbind(1)
        mean = total / count.clamp(min=1)
        sigma = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        largest = torch.maximum((mean - 3 * sigma).abs(), (mean + 3 * sigma).abs())
        steps = max(abs(self.quant_min), abs(self.quant_max))
        return (largest / steps).float(), torch.zeros_like(low)
