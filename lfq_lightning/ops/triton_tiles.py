"""How the Triton kernels cut a tensor into tiles: rows of runs that share a scale, or a matrix whose columns do."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from triton import cdiv, next_power_of_2

from lfq_lightning.ops.layout import Layout
from lfq_lightning.ops.triton_kernels import NARROW, WIDE

WARPS = 4
_FORWARD_BYTES = 4096  # of a tile: 32 a thread
_BACKWARD_TILE = 1024  # elements; more would not leave registers for enough warps
_PROGRAMS = 1024  # a program takes several tiles where there would be more of them
_MOST_TURNS = 16


class Tiles(NamedTuple):
    """One launch: its kernel's kind, how many programs, its arguments of the cut, and what is compiled into it."""

    columns: bool
    programs: int
    sums: int  # partial sums of a gradient; as many as channels where these are the gradients
    per: int  # of them that lie beside each other for one channel
    arguments: tuple[int, ...]
    options: dict[str, Any]


def forward_tiles(layout: Layout, itemsize: int) -> Tiles:
    """The cut for writing y."""
    return _tiles(layout, _FORWARD_BYTES // itemsize)


def backward_tiles(layout: Layout) -> Tiles:
    """The cut for writing dx and the sums; by the tensor's size alone, so that no device changes a sum."""
    return _tiles(layout, _BACKWARD_TILE)


def _tiles(layout: Layout, tile: int) -> Tiles:
    return _columns(layout, tile) if layout.width else _runs(layout, tile)


def _runs(layout: Layout, tile: int) -> Tiles:
    row, groups, chunk = layout.runs if layout.numel else (1, 1, 1)
    block = _fitting_block(chunk, tile)
    turns = min(_turns(layout.numel, tile), next_power_of_2(cdiv(chunk, block)))
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
            "num_warps": WARPS,
        },
    )


def _columns(layout: Layout, tile: int) -> Tiles:
    width = layout.width
    rows, columns = layout.numel // width, min(128, next_power_of_2(width))
    lines = tile // columns
    turns = min(_turns(layout.numel, tile), next_power_of_2(cdiv(rows, lines)))
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
            "num_warps": WARPS,
        },
    )


def _turns(numel: int, tile: int) -> int:
    """Tiles that a program takes, a power of 2."""
    return int(max(1, min(_MOST_TURNS, 1 << max(0, (numel // (tile * _PROGRAMS)).bit_length() - 1))))


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
