"""What a tensor's range is, and the qparams that cover it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lfq_lightning.ops import check_range

_EPS = torch.finfo(torch.float32).eps


class Observer(nn.Module):
    """Keeps a range per tensor, channel or group, and turns it into qparams.

    An observation has three steps, so that a batch can be merged over uses and over ranks before it counts:
    `statistics` (pure, one tensor), `merge` (elementwise maximum), `update` (the state).

    Args:
        quant_min: smallest integer code.
        quant_max: largest integer code.
        symmetric: whether the zero point is 0.
        axis: the dimension with one range per index, or None.
        group_size: for weights (O, I, ...), neighbouring inputs that share one range, or None.
        channels: how many ranges; 1 per tensor.

    Attributes:
        minimum, maximum: float32 buffers of shape (channels,), infinite where nothing was seen yet.
    """

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
    ) -> None:
        super().__init__()
        check_range(quant_min, quant_max)
        self.quant_min, self.quant_max = quant_min, quant_max
        self.symmetric, self.axis, self.group_size = symmetric, axis, group_size
        infinite = torch.full((channels,), torch.inf, dtype=torch.float32, device=device)
        self.register_buffer("minimum", infinite)
        self.register_buffer("maximum", -infinite)

    @property
    def channels(self) -> int:
        """How many ranges are kept."""
        return self.minimum.numel()

    def nothing(self) -> Tensor:
        """The statistics of no data, shape (3, channels)."""
        rows = torch.full((3, self.channels), -torch.inf, dtype=torch.float32, device=self.minimum.device)
        rows[2] = 0.0
        return rows

    @torch.no_grad()
    def statistics(self, x: Tensor) -> Tensor:
        """Rows -min, max and "has non-finite values" of x, shape (3, channels), of the finite values alone."""
        if x.numel() == 0:
            return self.nothing()
        rows = _rows(x.detach(), self.axis, self.group_size)
        low, high = torch.aminmax(rows, dim=1)
        at_fault = ~(low.isfinite() & high.isfinite())
        # Looking at the answer is free on the CPU alone; elsewhere it would wait for the device.
        if x.device.type != "cpu" or torch.compiler.is_compiling() or bool(at_fault.any()):
            finite = rows.isfinite()
            low = torch.where(finite, rows, torch.inf).amin(1)
            high = torch.where(finite, rows, -torch.inf).amax(1)
        return torch.stack((-low.float(), high.float(), at_fault.float()))

    @staticmethod
    def merge(a: Tensor, b: Tensor) -> Tensor:
        """The statistics of two parts of one batch together."""
        return torch.maximum(a, b)

    def update(self, statistics: Tensor) -> None:
        """Take one batch's statistics into the state."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Observe x as one batch, and return it."""
        self.update(self.statistics(x))
        return x

    def saw_data(self) -> bool:
        """Whether any range is known (copies to the host)."""
        return bool(self.maximum.isfinite().any())

    def reset(self) -> None:
        """Forget everything."""
        self.minimum.fill_(torch.inf)
        self.maximum.fill_(-torch.inf)

    @torch.no_grad()
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point that cover the range and 0, each float32 of shape (channels,); 1 and 0 where unseen.

        Krishnamoorthi 2018 (arXiv 1806.08342), equations 2 to 5.
        """
        seen = self.maximum.isfinite()
        low = torch.where(seen, self.minimum, 0.0).clamp(max=0.0)
        high = torch.where(seen, self.maximum, 0.0).clamp(min=0.0)
        if self.symmetric:
            # The side with codes decides; an unsigned range sees nothing below 0.
            scale = high / max(self.quant_max, 1)
            if self.quant_min < 0:
                scale = torch.maximum(scale, low / self.quant_min)
            zero_point = torch.zeros_like(scale)
        else:
            levels = self.quant_max - self.quant_min
            scale = high / levels - low / levels  # the difference itself may overflow
            zero_point = (self.quant_min - low / scale.clamp(min=_EPS)).clamp(self.quant_min, self.quant_max).round()
        return torch.where(seen, scale.clamp(min=_EPS), 1.0), torch.where(seen, zero_point, 0.0)

    def extra_repr(self) -> str:
        return f"quant_min={self.quant_min}, quant_max={self.quant_max}, channels={self.channels}"


class MinMaxObserver(Observer):
    """The smallest and largest value of all that was seen."""

    def update(self, statistics: Tensor) -> None:
        self.minimum.copy_(torch.minimum(self.minimum, -statistics[0]))
        self.maximum.copy_(torch.maximum(self.maximum, statistics[1]))


class MovingAverageObserver(Observer):
    """An exponential moving average of the batches' ranges, begun with the first batch.

    Jacob et al. 2018 (arXiv 1712.05877), section 3.1.

    Args:
        averaging_constant: weight of the newest batch.
    """

    def __init__(self, *args: Any, averaging_constant: float = 0.01, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 0.0 < averaging_constant <= 1.0:
            raise ValueError(f"`averaging_constant` must be in (0, 1]. Found {averaging_constant}.")
        self.averaging_constant = averaging_constant

    def update(self, statistics: Tensor) -> None:
        for state, new in ((self.minimum, -statistics[0]), (self.maximum, statistics[1])):
            moved = state + self.averaging_constant * (new - state)
            moved = torch.where(state.isfinite(), moved, new)
            state.copy_(torch.where(new.isfinite(), moved, state))


OBSERVERS: dict[str, type[Observer]] = {"minmax": MinMaxObserver, "moving_average": MovingAverageObserver}


def check_observer(observer: nn.Module, quant_min: int, quant_max: int, channel_len: int) -> None:
    """Raise unless a quantizer of this range and number of channels (-1 for one in all) can use the observer."""
    if not callable(getattr(observer, "calculate_qparams", None)):
        raise TypeError(
            f"`observer` must have `calculate_qparams()`. Found {type(observer).__name__}: use one of "
            "`lfq_lightning.observers` or `torch.ao.quantization`."
        )
    if isinstance(observer, Observer) and observer.channels != max(channel_len, 1):
        raise ValueError(
            f"`channel_len` must be the observer's number of channels. Found {channel_len} for {observer.channels}."
        )
    dtype = getattr(observer, "dtype", None)
    if isinstance(dtype, torch.dtype):
        limits = torch.iinfo(dtype)
        if quant_min < limits.min or quant_max > limits.max:
            raise ValueError(
                f"The observer's dtype {dtype} holds {limits.min} to {limits.max}. Found quant_min={quant_min} and "
                f"quant_max={quant_max}: give the observer a wider dtype, or narrow the range."
            )


def _rows(x: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """The elements that share one range as rows, shape (channels, elements)."""
    if group_size is not None:
        rows, inputs = x.shape[0], x.shape[1]
        groups = math.ceil(inputs / group_size)
        # The last input stands in for those that the last group lacks, and changes no range.
        index = torch.arange(groups * group_size, device=x.device).clamp(max=inputs - 1)
        return x[:, index].reshape(rows * groups, -1)
    if axis is None:
        return x.reshape(1, -1) if x.is_contiguous() else x.permute(_dense_order(x)).reshape(1, -1)
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)


def _dense_order(x: Tensor) -> list[int]:
    """Dimensions in memory order, so that flattening a channels_last tensor copies nothing."""
    return sorted(range(x.ndim), key=lambda d: -x.stride()[d])
