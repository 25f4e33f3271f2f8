"""How the elements of a tensor are shared out among the scales."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Where each element's scale is, in the order in which the results lie in memory.

    Memory is cut into `segments` runs of `chunk` elements that share one scale; run `i` uses scale `i % channels`.
    Every `groups` runs make a row of `row` elements, whose last run may be shorter. Where the runs would be too short
    to vectorise, `width` is positive instead: memory is then a matrix of that many columns, and column `c` uses scale
    `c // repeat % channels`.
    """

    channels: int
    numel: int
    segments: int
    groups: int
    row: int
    chunk: int
    width: int = 0
    repeat: int = 1

    @property
    def runs(self) -> tuple[int, int, int]:
        """Elements of a row, runs of a row and elements of a run, such that a row of one run stands for every other."""
        if self.width:
            return self.repeat, 1, self.repeat
        if self.groups * self.chunk == self.row or self.groups == 1:
            return self.chunk, 1, self.chunk
        return self.row, self.groups, self.chunk


# Starting a run costs as much as some 100 elements: shorter ones are faster as columns of a matrix, if it has rows over
# which to spread the cost of giving each column its scale. Few columns are faster when rows are joined.
_SHORTEST_RUN = 128
_FEWEST_ROWS = 8
_FEWEST_COLUMNS = 64


def memory_order(shape: tuple[int, ...], stride: tuple[int, ...]) -> list[int]:
    """The dimensions longer than 1, outermost in memory first."""
    return sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: (-stride[d], d))


def lay_out(
    shape: tuple[int, ...], stride: tuple[int, ...], axis: int | None, group_size: int | None, scales: int
) -> Layout | None:
    """The layout of results with these strides, which leave no gaps; None where groups are not runs of memory.

    Raises:
        ValueError: if `axis` is out of range or `scales` is not the number that the shape asks for.
    """
    check_scales(shape, axis, group_size, scales)
    numel = math.prod(shape)
    if numel == 0:
        return Layout(scales, 0, 0, 1, 0, 0)
    order = memory_order(shape, stride)
    if group_size is not None:
        return _grouped(shape, group_size, scales, numel) if order == sorted(order) else None
    if scales == 1:
        return Layout(1, numel, 1, 1, numel, numel)
    assert axis is not None
    position = order.index(axis % len(shape))
    inner = math.prod(shape[d] for d in order[position + 1 :])
    rows = numel // (scales * inner)
    if inner >= _SHORTEST_RUN or (rows < _FEWEST_ROWS and inner >= 8):
        return Layout(scales, numel, numel // inner, 1, inner, inner)
    width = scales * inner
    most = max(1, _FEWEST_COLUMNS // width)
    together = max(divisor for divisor in range(1, most + 1) if rows % divisor == 0)
    return Layout(scales, numel, 0, 1, 0, 0, width=width * together, repeat=inner)


def view(shape: tuple[int, ...], stride: tuple[int, ...], dense: tuple[int, ...]) -> tuple[int, ...] | None:
    """How to read a tensor in the order of the strides `dense`, which leave no gaps; None if it lies so itself.

    Returns:
        The number of dimensions, their sizes and their strides, outermost first, with neighbours merged.
    """
    merged: list[tuple[int, int]] = []
    for dimension in memory_order(shape, dense):
        size, step = shape[dimension], stride[dimension]
        if merged and merged[-1][1] == size * step:
            merged[-1] = (merged[-1][0] * size, step)
        else:
            merged.append((size, step))
    if len(merged) <= 1 and all(step == 1 for _, step in merged):
        return None
    return (len(merged), *(size for size, _ in merged), *(step for _, step in merged))


def _grouped(shape: tuple[int, ...], group_size: int, scales: int, numel: int) -> Layout:
    kernel = math.prod(shape[2:])
    groups = math.ceil(shape[1] / group_size)
    return Layout(scales, numel, scales, groups, shape[1] * kernel, min(group_size, shape[1]) * kernel)


def check_scales(shape: tuple[int, ...], axis: int | None, group_size: int | None, scales: int) -> None:
    """Raise unless a tensor of this shape takes this many scales.

    Raises:
        ValueError: naming the rule, what was found and the remedy.
    """
    if group_size is not None:
        if len(shape) < 2:
            raise ValueError(
                f"`group_size` needs a weight of shape (output, input, ...). Found shape {tuple(shape)}: use `axis`, "
                "or neither for one scale."
            )
        expected, kind = shape[0] * math.ceil(shape[1] / group_size), f"per group of {group_size}"
    elif axis is not None:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"`axis` must name a dimension of x. Found axis {axis} for a tensor of {len(shape)} dimensions, "
                f"shape {tuple(shape)}: use a value from {-len(shape)} to {len(shape) - 1}."
            )
        expected, kind = shape[axis], f"per channel on axis {axis}"
    else:
        expected, kind = 1, "per tensor"
    if scales != expected:
        raise ValueError(
            f"`scale` and `zero_point` {kind} must have shape ({expected},) for x of shape {tuple(shape)}. "
            f"Found {scales} value{'s' * (scales != 1)}: give one for each, or another axis."
        )
