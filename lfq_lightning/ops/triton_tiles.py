"""How the Triton kernels cut a tensor into tiles: rows of runs that share a scale, or a matrix whose columns do."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from triton import cdiv, next_power_of_2

from lfq_lightning.ops.layout import Layout
from lfq_lightning.ops.triton_kernels import NARROW, WIDE

# Each was the best of the variants that were measured on an H200, one changed at a time: tests/benchmarks/README.md.
_FORWARD_BYTES = 4096  # of a tile of four warps: 32 a thread
_FORWARD_TURNS = 4
_BACKWARD_TILE = 1024  # elements of a tile of four warps; more would not leave registers for enough of them
_BACKWARD_TURNS = 16  # the sums of a program cost as much as a tile
_COLUMNS_TILE = 512  # of two warps, between which fewer sums are exchanged
_PROGRAMS = 1024  # a program takes several tiles where there would be more of them


class Tiles(NamedTuple):
    """One launch: its kernel's kind, how many programs, its arguments of the cut, and what is compiled into it."""

    columns: bool
    programs: int
    sums: int  # partial sums of a gradient; as many as channels where these are the gradients
    per: int  # of them that lie beside each other for one channel
    arguments: tuple[int, ...]
    options: dict[str, Any]


class Adding(NamedTuple):
    """The launch that adds partial sums up: `count` a channel, `per` of them beside each other."""

    programs: int
    arguments: tuple[int, int, int]
    options: dict[str, Any]


def forward_tiles(layout: Layout, itemsize: int) -> Tiles:
    """The cut for writing y."""
    tile = _FORWARD_BYTES // itemsize
    if layout.width:
        return _columns(layout, tile, _FORWARD_TURNS, warps=4)
    return _runs(layout, tile, 1 if layout.segments == 1 else _FORWARD_TURNS)


def backward_tiles(layout: Layout) -> Tiles:
    """The cut for writing dx and the sums; by the tensor's size alone, so that no device changes a sum."""
    if layout.width:
        return _columns(layout, _COLUMNS_TILE, _BACKWARD_TURNS, warps=2)
    return _runs(layout, _BACKWARD_TILE, _BACKWARD_TURNS)


def adding(tiles: Tiles, channels: int) -> Adding | None:
    """What remains to be done after `backward_tiles`; None where each channel has one sum, which is its gradient."""
    if not tiles.sums or (tiles.sums == channels and not tiles.columns):
        return None
    count = tiles.sums // channels
    block = min(1024, next_power_of_2(count))
    together = min(1024 // block, next_power_of_2(channels))
    return Adding(cdiv(channels, together), (channels, count, tiles.per), {"CHANNELS": together, "BLOCK": block})


def _runs(layout: Layout, tile: int, most: int) -> Tiles:
    row, groups, chunk = layout.runs if layout.numel else (1, 1, 1)
    block = _fitting_block(chunk, tile)
    turns = min(_turns(layout.numel, tile, most), next_power_of_2(cdiv(chunk, block)))
    per_run = cdiv(chunk, block * turns)
    pieces, rows = layout.segments * per_run, tile // block
    return Tiles(
        columns=False,
        programs=cdiv(pieces, rows),
        sums=pieces,
        per=per_run,
        arguments=(pieces, per_run, layout.channels, row, groups, chunk),
        options={
            "ONE": layout.segments == 1,
            "INDEX": NARROW if pieces + rows < 2**31 else WIDE,
            "ROWS": rows,
            "BLOCK": block,
            "TURNS": turns,
            "STEP": _step(row, chunk, block),
            "num_warps": 4,
        },
    )


def _columns(layout: Layout, tile: int, most: int, warps: int) -> Tiles:
    width = layout.width
    rows, columns = layout.numel // width, min(128, next_power_of_2(width))
    lines = tile // columns
    turns = min(_turns(layout.numel, tile, most), next_power_of_2(cdiv(rows, lines)))
    down, across = cdiv(rows, lines * turns), cdiv(width, columns)
    return Tiles(
        columns=True,
        programs=down * across,
        sums=down * width,
        per=layout.repeat,
        arguments=(rows, width, across, layout.channels, layout.repeat),
        options={
            "ROWS": lines,
            "COLUMNS": columns,
            "TURNS": turns,
            "STEP": _step(width, columns),
            "num_warps": warps,
        },
    )


def _turns(numel: int, tile: int, most: int) -> int:
    """Tiles that a program takes, a power of 2."""
    return int(max(1, min(most, 1 << max(0, (numel // (tile * _PROGRAMS)).bit_length() - 1))))


def _step(*lengths: int) -> int:
    """The largest power of 2 up to 16 that divides them all."""
    return math.gcd(16, *lengths)


def _fitting_block(chunk: int, tile: int) -> int:
    """The power of 2 that cuts runs of this length with the fewest idle lanes, up to a tenth more for a longer one."""
    sizes = [1 << k for k in range(8, tile.bit_length())]
    if chunk <= sizes[0]:
        return next_power_of_2(chunk)
    idle = {size: cdiv(chunk, size) * size for size in sizes}
    return max(size for size in sizes if idle[size] <= 1.1 * min(idle.values()))
