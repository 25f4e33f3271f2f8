"""What every observer does: gather statistics of a tensor, merge them, and turn a range into qparams."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lfq_lightning.checking import check_device, check_flags, check_whole
from lfq_lightning.observers.outliers import MAGNITUDES, beyond_the_rest, bin_of_range
from lfq_lightning.observers.passing import Passing
from lfq_lightning.observers.rows import never_empty, rows_of
from lfq_lightning.ops import check_range, nearest_power_of_two, power_of_two_above

_EPS = torch.finfo(torch.float32).eps


class Statistics(NamedTuple):
    """What an observer wants to know of one batch.

    Attributes:
        extremes: rows -min, max and "has values that are not finite", float32 of shape (3, channels), whose elementwise
            maximum belongs to two parts together.
        sums: what adds up, float64 of shape (channels, sums); no columns, and float32, for an observer of ranges.
    """

    extremes: Tensor
    sums: Tensor


class Observer(Passing):
    """Keeps a range per tensor, channel or group, and turns it into qparams.

    An observation has three steps, so that a batch can be merged over uses and over ranks before it counts:
    `statistics` (pure), `merge` (of two parts of one batch), `update` (the state).

    Args:
        quant_min: smallest integer code.
        quant_max: largest integer code.
        symmetric: whether the zero point is 0.
        axis: the dimension with one range per index, or None.
        group_size: for weights (O, I, ...), neighbouring inputs that share one range, or None.
        channels: how many ranges; 1 per tensor.
        whole: each tensor observed is all that there is, as a weight is, so that no histogram need be kept.
        power_of_two: scales are powers of two.

    Attributes:
        minimum, maximum: float32 buffers of shape (channels,), infinite where nothing was seen yet.
    """

    costly: ClassVar[bool] = False  # whether finding qparams costs much more than looking at the data once

    minimum: Tensor
    maximum: Tensor

    def __init__(
        self,
        quant_min: int = 0,
        quant_max: int = 255,
        symmetric: bool = False,
        axis: int | None = None,
        group_size: int | None = None,
        channels: int = 1,
        device: Any = None,
        whole: bool = False,
        power_of_two: bool = False,
    ) -> None:
        super().__init__()
        check_range(quant_min, quant_max)
        check_flags(symmetric=symmetric, whole=whole, power_of_two=power_of_two)
        if axis is not None:
            check_whole("axis", axis, -64, 63)
        if group_size is not None:
            check_whole("group_size", group_size, 1)
        check_whole("channels", channels)
        check_device("device", device)
        self.quant_min, self.quant_max = quant_min, quant_max
        self.symmetric, self.axis, self.group_size = symmetric, axis, group_size
        self.whole, self.power_of_two = whole, power_of_two
        self.sums = 0  # columns of `Statistics.sums`
        infinite = torch.full((channels,), torch.inf, dtype=torch.float32, device=device)
        self.register_buffer("minimum", infinite)
        self.register_buffer("maximum", -infinite)

    @property
    def channels(self) -> int:
        """How many ranges are kept."""
        return self.minimum.numel()

    def nothing(self) -> Statistics:
        """The statistics of no data."""
        extremes = torch.full((3, self.channels), -torch.inf, dtype=torch.float32, device=self.minimum.device)
        extremes[2] = 0.0
        dtype = torch.float64 if self.sums else torch.float32
        return Statistics(extremes, extremes.new_zeros((self.channels, self.sums), dtype=dtype))

    @torch.no_grad()
    def statistics(self, x: Tensor) -> Statistics:
        """What this observer wants to know of x, of the finite values alone."""
        if not torch.compiler.is_compiling() and x.numel() == 0:  # a graph may not know
            return self.nothing()
        self._check_channels(x)
        x = x.detach()
        return Statistics(self._extremes(rows_of(x, self.axis, self.group_size)), self.sums_of(x))

    def _check_channels(self, x: Tensor) -> None:
        axis = self.axis
        if axis is not None and (not -x.ndim <= axis < x.ndim or x.shape[axis] != self.channels):
            raise ValueError(
                f"Dimension {axis} of `x` must have an entry for each of the {self.channels} channels. Found shape "
                f"{tuple(x.shape)}: give `axis` the dimension of the channels, or use one scale per tensor."
            )

    def sums_of(self, x: Tensor) -> Tensor:
        """The statistics of x that add up, of shape (channels, sums)."""
        # Where there is nothing to add up, not in float64, which Metal does not have.
        return torch.empty((self.channels, 0), dtype=torch.float32, device=x.device)

    @staticmethod
    def _extremes(rows: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            low, high = torch.aminmax(rows, dim=1)
            at_fault = ~(low.isfinite() & high.isfinite())
        # Looking at the answer is free on the CPU alone; elsewhere it would wait for the device.
        if compiling or rows.device.type != "cpu" or bool(at_fault.any()):
            finite = rows.isfinite()
            at_fault = ~finite.all(1)
            low = never_empty(torch.where(finite, rows, torch.inf), torch.inf).amin(1)
            high = never_empty(torch.where(finite, rows, -torch.inf), -torch.inf).amax(1)
        return torch.stack((-low.float(), high.float(), at_fault.float()))

    @staticmethod
    def merge(a: Statistics, b: Statistics) -> Statistics:
        """The statistics of two parts of one batch together."""
        return Statistics(torch.maximum(a.extremes, b.extremes), a.sums + b.sums)

    def update(self, statistics: Statistics) -> None:
        """Take one batch's statistics into the state: here the smallest and largest value of all that was seen."""
        self.minimum.copy_(torch.minimum(self.minimum, -statistics.extremes[0]))
        self.maximum.copy_(torch.maximum(self.maximum, statistics.extremes[1]))

    def _count(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        """Batches by their greatest magnitude, of shape (channels, MAGNITUDES), and this one's bin, (channels, 1)."""
        where = bin_of_range(-statistics.extremes[0], statistics.extremes[1])
        batches = self._kept("batches", MAGNITUDES, torch.int64)
        batches.scatter_add_(1, where, torch.ones_like(where))
        return batches, where

    def _kept(self, name: str, columns: int, dtype: torch.dtype) -> Tensor:
        """A tensor of shape (channels, columns) of what comes and goes, zeros at first."""
        if name not in self.passing:
            self.passing[name] = torch.zeros((self.channels, columns), dtype=dtype, device=self.minimum.device)
        return self.passing[name]

    @torch.no_grad()
    def settle(self) -> None:
        """Keep the range as it was found, and let go of what is only needed to go on observing."""
        if self.whole or not self.passing:
            return
        seen = self.maximum.isfinite()
        for end, found in zip((self.minimum, self.maximum), self._found_range(), strict=True):
            end.copy_(torch.where(seen, found, end))
        self.passing = {}

    def _found_range(self) -> tuple[Tensor, Tensor]:
        """The range that `settle` keeps."""
        return self._range()

    def observe(self, x: Tensor) -> Tensor:
        """Observe x as one batch; the result is positive where it has values that are not finite, shape (channels,)."""
        statistics = self.statistics(x)
        self.update(statistics)
        return statistics.extremes[2]

    def forward(self, x: Tensor) -> Tensor:
        """Observe x as one batch, and return it."""
        self.observe(x)
        return x

    def saw_data(self) -> bool:
        """Whether any range is known (copies to the host)."""
        return bool(self.maximum.isfinite().any())

    def reset(self) -> None:
        """Forget everything."""
        self.minimum.fill_(torch.inf)
        self.maximum.fill_(-torch.inf)
        self.passing = {}

    def reset_parameters(self) -> None:
        """Forget everything, as after `to_empty` on a new device."""
        self.reset()

    @torch.no_grad()
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, each float32 of shape (channels,); 1 and 0 where nothing was seen."""
        scale, zero_point = self._qparams(*self._range())
        scale = nearest_power_of_two(scale) if self.power_of_two else scale
        seen = self.maximum.isfinite()
        return torch.where(seen, scale.clamp(min=_EPS), 1.0), torch.where(seen, zero_point, 0.0)

    def _range(self) -> tuple[Tensor, Tensor]:
        """The least range that holds 0 and all that was seen, outliers of few batches left out."""
        low, high = (torch.where(end.isfinite(), end, 0.0) for end in (self.minimum, self.maximum))
        if "batches" in self.passing:
            limit = beyond_the_rest(self.passing["batches"])
            low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
        return low.clamp(max=0.0), high.clamp(min=0.0)

    def _qparams(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point where all that was seen lies in [low, high], which holds 0."""
        return self.covering(low, high)

    def covering(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and zero point whose codes reach from low <= 0 to high >= 0, the scale one that is allowed.

        Krishnamoorthi 2018 (arXiv 1806.08342), equations 2 to 5.
        """
        scale = self._width(low, high)
        scale = power_of_two_above(scale) if self.power_of_two else scale
        return scale, self._zero_point(low, scale)

    def reaching(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """`covering`, of a range that qparams gave: the scale is what it was, but for rounding."""
        scale = self._width(low, high)
        scale = nearest_power_of_two(scale) if self.power_of_two else scale
        return scale, self._zero_point(low, scale)

    def _width(self, low: Tensor, high: Tensor) -> Tensor:
        if not self.symmetric:
            levels = self.quant_max - self.quant_min
            return high / levels - low / levels  # the difference itself may overflow
        # The side with codes decides; an unsigned range sees nothing below 0.
        scale = high / max(self.quant_max, 1)
        return torch.maximum(scale, low / self.quant_min) if self.quant_min < 0 else scale

    def _zero_point(self, low: Tensor, scale: Tensor) -> Tensor:
        if self.symmetric:
            return torch.zeros_like(scale)
        zero_point = self.quant_min - low / scale.clamp(min=_EPS)
        return zero_point.clamp(self.quant_min, self.quant_max).round()

    def extra_repr(self) -> str:
        return f"quant_min={self.quant_min}, quant_max={self.quant_max}, channels={self.channels}"
