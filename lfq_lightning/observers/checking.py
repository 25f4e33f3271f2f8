"""Whether a quantizer can use an observer, ours or another library's."""

from __future__ import annotations

import torch
from torch import nn

from lfq_lightning.observers.base import Observer


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
