"""The observer that searches for the range with the least mean-square error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lfq_lightning.observers.histogram import HistogramObserver, edges
from lfq_lightning.ops import power_of_two_below


def _octaves(first: int, last: int, per_octave: int) -> Tensor:
    return 2.0 ** (torch.arange(first, last + 1, dtype=torch.float32, device="cpu") / per_octave)


# By what a range's ends are multiplied in one step of the search after the other: both by the same for a symmetric
# range, each by its own for an affine one.
_SYMMETRIC = (_octaves(-20, 0, 4), _octaves(-4, 4, 16))
_AFFINE = (_octaves(-10, 0, 2), _octaves(-2, 2, 4), _octaves(-2, 2, 16))
_FEW = 512  # values of a row of which the first step looks at each, as the others do
_STARTS = 8  # of such a row that are followed to their end
# At the end, steps so short that the outermost code moves by a quarter of a code: few values round luckily somewhere.
_SHORTEST, _LONGEST = 1e-3, 1e-2
_LARGEST = torch.finfo(torch.float32).max
# Elements at once: what the CPU's cache holds, and what keeps another device busy.
_IN_CACHE, _ELSEWHERE = 1 << 16, 1 << 21

Errors = Callable[[Tensor, Tensor], Tensor]


class Points(NamedTuple):
    """What a histogram holds: how many values lie between which ends, evenly spread; each (channels, points)."""

    counts: Tensor
    left: Tensor
    right: Tensor


class MSEObserver(HistogramObserver):
    """The range whose codes represent what was seen with the least mean-square error, clipping included.

    A search as in Nagel et al. 2021 (arXiv 2106.08295), section 3.1, equation 11: for a symmetric range over its width,
    for an affine one over both ends, as LSQ+ (Bhalgat et al. 2020, arXiv 2004.09576, section 3.3) asks.
    """

    def _fit(self, rows: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.where(rows.isfinite(), rows, 0.0)  # 0 is represented without error
        unit = _unit(low, high)
        errors = partial(self._errors, rows, unit)
        roughly, starts = errors, 1
        if rows.shape[1] <= _FEW:
            starts = _STARTS
        elif not self.symmetric:
            roughly = partial(self._expected_errors, _points(rows / unit[:, None]), unit)
        levels = self.quant_max - self.quant_min
        return self._search(roughly, errors, low, high, min(max(1 / (4 * levels), _SHORTEST), _LONGEST), starts)

    def _fit_histogram(self, counts: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        inner, outer = edges(counts.device)
        # Elsewhere, looking at the counts would wait for the device, and in a graph their number must be known.
        if counts.device.type == "cpu" and not torch.compiler.is_compiling():
            used = counts.sum(0) > 0
            counts, inner, outer = counts[:, used], inner[used], outer[used]
        unit = _unit(low, high)
        # The outermost bins, never used, have no ends.
        inner, outer = (p.float().nan_to_num(0.0, torch.inf, -torch.inf) for p in (inner, outer))
        ends = (p.clamp(low[:, None], high[:, None]) / unit[:, None] for p in (inner, outer))
        errors = partial(self._expected_errors, Points(counts.float(), *ends), unit)
        return self._search(errors, errors, low, high, _LONGEST / 2)

    def _search(
        self, roughly: Errors, errors: Errors, low: Tensor, high: Tensor, shortest: float, starts: int = 1
    ) -> tuple[Tensor, Tensor]:
        first, *finer = (
            factors.to(low.device, non_blocking=True) for factors in (_SYMMETRIC if self.symmetric else _AFFINE)
        )
        begun = self._best(roughly, low, high, *self._pairs(first), starts)
        found = [self._refined(errors, *ends, finer, shortest) for ends in zip(*begun[:2], strict=True)]
        if len(found) == 1:
            return found[0]
        # Few values have errors with many valleys: the deepest is not always where a coarse grid meets the least.
        scale, zero_point = (torch.stack(each) for each in zip(*found, strict=True))
        best = errors(scale.clamp(min=torch.finfo(torch.float32).tiny), zero_point).argmin(0, keepdim=True)
        return scale.gather(0, best).squeeze(0), zero_point.gather(0, best).squeeze(0)

    def _refined(
        self, errors: Errors, low: Tensor, high: Tensor, finer: list[Tensor], shortest: float
    ) -> tuple[Tensor, Tensor]:
        """The scale and zero point of the best range near this one."""
        for factors in finer:
            low, high, *best = (each[0] for each in self._best(errors, low, high, *self._pairs(factors)))
        # Moving one end of an affine range changes its scale by half of that.
        length, reach = (shortest, 0.04) if self.symmetric else (2 * shortest, 0.03)
        steps = max(2, round(reach / length))
        last = 1 + length * torch.arange(-steps, steps + 1, dtype=torch.float32, device="cpu")
        last = last.to(low.device, non_blocking=True)
        same = last if self.symmetric else torch.ones_like(last)
        low, high, *best = (each[0] for each in self._best(errors, low, high, same, last))
        if not self.symmetric:
            low, high, *best = (each[0] for each in self._best(errors, low, high, last, same))
        scale, zero_point = best
        return scale, zero_point

    def _pairs(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            return factors, factors
        at_low, at_high = torch.cartesian_prod(factors, factors).unbind(1)
        return at_low, at_high

    def _best(
        self, errors: Errors, low: Tensor, high: Tensor, at_low: Tensor, at_high: Tensor, how_many: int = 1
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of ranges with their ends multiplied by these factors the best ones: ends, scales and zero points."""
        # Finite, where a share above 1 of the largest numbers is not.
        lows = (at_low[:, None] * low).clamp(min=-_LARGEST)
        highs = (at_high[:, None] * high).clamp(max=_LARGEST)
        scale, zero_point = self.covering(lows, highs)
        found = errors(scale.clamp(min=torch.finfo(torch.float32).tiny), zero_point)
        best = found.argmin(0, keepdim=True) if how_many == 1 else found.topk(how_many, 0, largest=False).indices
        low, high, scale, zero_point = (each.gather(0, best) for each in (lows, highs, scale, zero_point))
        return low, high, scale, zero_point

    def _errors(self, rows: Tensor, unit: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The squared error of each row with each of these qparams, (qparams, channels), in squared units."""
        total = torch.zeros_like(scale)
        inverse, zero_point = scale.reciprocal()[..., None], zero_point[..., None]
        for columns in rows.split(_at_once(rows), dim=1):
            for chosen, channels in _parts(len(scale), columns):
                code = torch.addcmul(zero_point[chosen], columns[channels], inverse[chosen])
                error = code.clamp(self.quant_min, self.quant_max).round_().sub_(code)
                total[chosen] += torch.linalg.vector_norm(error, dim=-1).square_()
        return total * (scale / unit).square()

    def _expected_errors(self, points: Points, unit: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """The same of what a histogram holds, by the integral of the squared error over each bin.

        From 0 to u, in steps, with n the code of u, the integral is n / 12 + (u - n)^3 / 3.
        """
        total = torch.empty_like(scale)
        inverse, zero_point = (unit / scale)[..., None], zero_point[..., None]
        for chosen, channels in _parts(len(scale), points.counts):
            ends = (points.left, points.right)  # by name: Dynamo of torch 2.8 cannot slice a named tuple
            u, v = (torch.addcmul(zero_point[chosen], x[channels], inverse[chosen]) for x in ends)
            n, m = (x.clamp(self.quant_min, self.quant_max).round_() for x in (u, v))
            f, g = u - n, v - m
            width = m - n + g - f
            # Where a bin is so narrow that this would cancel, its middle stands for it.
            narrow = (f + g).square_().div_(4)
            mean = (g * g * g - f * f * f).div_(3).add_(m.sub_(n), alpha=1 / 12).div_(width)
            error = torch.where(width.abs() > 1e-3, mean, narrow)
            total[chosen] = torch.linalg.vecdot(error, points.counts[channels])
        return total * (scale / unit).square()


def _points(rows: Tensor) -> Points:
    """A summary of each row for the first step of a search: values in order, closer ones towards either end."""
    count = rows.shape[1]
    tail = {round(2 ** (k / 4)) for k in range(4 * count.bit_length() - 4)}
    ranks = {r for t in tail if t < count / 2 for r in (t, count - t)} | {round(k * count / 64) for k in range(65)}
    chosen = torch.tensor(sorted(ranks), device="cpu").to(rows.device, non_blocking=True)
    values = rows.sort(dim=1).values[:, chosen.clamp(max=count - 1)]
    return Points(chosen.diff().float().expand(len(rows), -1), values[:, :-1], values[:, 1:])


def _at_once(x: Tensor) -> int:
    return _IN_CACHE if x.device.type == "cpu" and not torch.compiler.is_compiling() else _ELSEWHERE


def _parts(candidates: int, x: Tensor) -> Iterator[tuple[tuple[slice, slice], slice]]:
    """Parts of candidates and channels that are worked on at once, and the channels alone."""
    at_once = _at_once(x)
    together = max(1, at_once // max(1, x.shape[1]))  # nothing but zeros leaves an empty histogram
    for first in range(0, len(x), together):
        channels = slice(first, first + together)
        each = max(1, at_once // max(1, x[channels].numel()))
        for k in range(0, candidates, each):
            yield (slice(k, k + each), channels), channels


def _unit(low: Tensor, high: Tensor) -> Tensor:
    """A power of two near the largest magnitude, in which squares do not overflow; it rounds nothing."""
    return power_of_two_below(torch.maximum(high, -low))
