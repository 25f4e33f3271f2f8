"""A batch of calls as one call: its dimension becomes one with that of the channels, each entry with its own scales."""

from __future__ import annotations

from torch import Tensor


def batched(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A tensor with the batch as dimension 0, repeated where it has none."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def fold(x: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """The batch as one tensor, which has (batch * scales,) scales along `folded_axis`.

    Args:
        x: of shape (batch, ...); `axis` and `group_size` are those of one entry.
        axis: the dimension of an entry with one scale per index, or None.
        group_size: neighbouring inputs of a weight that share one scale, or None.
    """
    if group_size is not None:
        return x.flatten(0, 1)
    return x if axis is None else x.movedim(axis % (x.ndim - 1) + 1, 1).flatten(0, 1)


def unfold(y: Tensor, size: int, axis: int | None, group_size: int | None) -> Tensor:
    """What `fold` made, of shape (batch, ...) again."""
    if group_size is not None:
        return y.unflatten(0, (size, -1))
    if axis is None:
        return y
    y = y.unflatten(0, (size, -1))
    return y.movedim(1, axis % (y.ndim - 1) + 1)


def folded_axis(group_size: int | None) -> int | None:
    """The dimension of the channels after `fold`; groups have none."""
    return 0 if group_size is None else None
