"""The scales that LSQ and LSQ+ start from, of the values' moments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lfq_lightning.observers.base import Statistics
from lfq_lightning.observers.by_batch import ByBatchObserver
from lfq_lightning.observers.rows import never_empty, rows_of
from lfq_lightning.ops import power_of_two_below


def moments(rows: Tensor) -> Tensor:
    """Count and sums of |x|, x and x^2 of the finite values of each row, float64 of shape (rows, 4)."""
    finite = rows.isfinite()
    x = torch.where(finite, rows, 0.0)
    # Float32 does not hold 1e25 squared: sums are in units of a power of two near the largest value, which rounds
    # nothing. Each sum is in float32 over one batch; only their sums over batches need more.
    unit = power_of_two_below(never_empty(x.abs(), 0.0).amax(1, keepdim=True))
    x, unit = x / unit, unit.double().squeeze(1)
    sums = (part.sum(1).double() for part in (x.abs(), x, x * x))
    return torch.stack([finite.sum(1).double(), *map(torch.mul, sums, (unit, unit, unit * unit))], dim=1)


class MomentsObserver(ByBatchObserver):
    """Keeps the first two moments beside the range; those of a tensor's samples, without outliers' batches."""

    moments: Tensor

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.sums = 4
        zeros = torch.zeros((self.channels, 4), dtype=torch.float64, device=self.minimum.device)
        self.register_buffer("moments", zeros)

    def sums_of(self, x: Tensor) -> Tensor:
        return moments(rows_of(x, self.axis, self.group_size, padding=math.nan).float())

    def update(self, statistics: Statistics) -> None:
        if self.whole:
            self.moments += statistics.sums
        else:
            self.moments.copy_(self._add(statistics, statistics.sums, self.moments))
        super().update(statistics)

    def reset(self) -> None:
        super().reset()
        self.moments.zero_()


class LSQObserver(MomentsObserver):
    """scale = 2 E|x| / sqrt(quant_max), Esser et al. 2020 (LSQ, arXiv 1902.08153), section 2.1.

    An affine quantizer takes the width of its range for quant_max, and the zero point that min-max gives.
    """

    def _qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        count, magnitude = self.moments[:, 0], self.moments[:, 1]
        largest = self.quant_max if self.symmetric else self.quant_max - self.quant_min
        scale = (2 * magnitude / count.clamp(min=1) / math.sqrt(max(largest, 1))).float()
        return scale, self.covering(low, high)[1]


class ThreeSigmaObserver(MomentsObserver):
    """scale = max(|mean - 3 sigma|, |mean + 3 sigma|) / 2^(bits - 1), for symmetric quantizers.

    Bhalgat et al. 2020 (LSQ+, arXiv 2004.09576), section 3.3.
    """

    def _qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        count, _, total, squares = self.moments.unbind(1)
        mean = total / count.clamp(min=1)
        sigma = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
        largest = torch.maximum((mean - 3 * sigma).abs(), (mean + 3 * sigma).abs())
        return (largest / max(abs(self.quant_min), abs(self.quant_max))).float(), torch.zeros_like(low)
