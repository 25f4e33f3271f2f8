"""The elements of a tensor that share one range, as rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rows_of(x: Tensor, axis: int | None, group_size: int | None, padding: float | None = None) -> Tensor:
    """The elements that share one range as rows, shape (channels, elements).

    Where the last group is short, `padding` fills it; without one its last input does, which changes no range.
    """
    if group_size is not None:
        rows, inputs = x.shape[0], x.shape[1]
        groups = math.ceil(inputs / group_size)
        index = torch.arange(groups * group_size, device=x.device)
        filled = x[:, index.clamp(max=inputs - 1)]
        if padding is not None and groups * group_size > inputs:
            filled[:, inputs:] = padding
        return filled.reshape(rows * groups, -1)
    if axis is None:
        return x.reshape(1, -1) if x.is_contiguous() else x.permute(_dense_order(x)).reshape(1, -1)
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)


def never_empty(rows: Tensor, value: float) -> Tensor:
    """Rows with one more element, of which a graph can take extremes without knowing whether there are any others."""
    return torch.nn.functional.pad(rows, (0, 1), value=value)


def _dense_order(x: Tensor) -> list[int]:
    """Dimensions in memory order, so that flattening a channels_last tensor copies nothing."""
    return sorted(range(x.ndim), key=lambda d: -x.stride()[d])
