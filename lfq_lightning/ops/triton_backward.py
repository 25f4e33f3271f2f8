"""How the Triton backend launches the backward pass: over runs or columns of memory, then over partial sums."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor
from triton import cdiv, next_power_of_2

from lfq_lightning.ops import triton_kernels as kernels
from lfq_lightning.ops.layout import Layout
from lfq_lightning.ops.triton_kernels import NARROW, WIDE

_TILE = 2048  # elements of a program at a time
_WARPS = 8
_PROGRAMS = 2048  # a program takes several tiles where there would be more of them
_MOST_TURNS = 16


class Pass(NamedTuple):
    """One backward pass: tensors are dy, x, dx and qparams, gradients those of scale and zero point."""

    layout: Layout
    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    gradients: tuple[Tensor, Tensor]
    grad_factor: float
    saturation: str
    need_scale: bool
    need_zero_point: bool

    @property
    def options(self) -> dict[str, Any]:
        needs = {"NEED_SCALE": self.need_scale, "NEED_ZERO_POINT": self.need_zero_point}
        return {**needs, "SATURATION": self.saturation, "num_warps": _WARPS, "enable_fp_fusion": False}

    def partials(self, count: int) -> tuple[Tensor, ...]:
        """Room for that many partial sums of each gradient that is needed."""
        return tuple(gradient.new_empty(count if gradient.numel() else 0) for gradient in self.gradients)


def over_runs(given: Pass) -> None:
    """Launch over runs of memory that share a scale each."""
    layout = given.layout
    row, groups, chunk = layout.runs
    block = _fitting_block(chunk)
    turns = min(_turns(layout.numel), next_power_of_2(cdiv(chunk, block)))
    per_run = cdiv(chunk, block * turns)
    pieces, rows = layout.segments * per_run, _TILE // block
    final = pieces == layout.channels
    sums = given.gradients if final else given.partials(pieces)
    kernels.backward_runs_kernel[(cdiv(pieces, rows),)](
        *given.tensors,
        *sums,
        pieces,
        per_run,
        layout.channels,
        row,
        groups,
        chunk,
        given.grad_factor,
        FINAL=final,
        INDEX=NARROW if pieces + rows < 2**31 else WIDE,
        ROWS=rows,
        BLOCK=block,
        TURNS=turns,
        STEP=_step(row, chunk, block),
        **given.options,
    )
    if not final:
        _add_up(given, sums, pieces // layout.channels, per_run)


def over_columns(given: Pass) -> None:
    """Launch over a matrix whose columns have a scale each."""
    layout, width = given.layout, given.layout.width
    rows, columns = layout.numel // width, min(128, next_power_of_2(width))
    lines = _TILE // columns
    turns = min(_turns(layout.numel), next_power_of_2(cdiv(rows, lines)))
    down, across = cdiv(rows, lines * turns), cdiv(width, columns)
    sums = given.partials(down * width)
    kernels.backward_columns_kernel[(down * across,)](
        *given.tensors,
        *sums,
        rows,
        width,
        across,
        layout.channels,
        layout.repeat,
        ROWS=lines,
        COLUMNS=columns,
        TURNS=turns,
        STEP=_step(width, columns),
        **given.options,
    )
    _add_up(given, sums, down * (width // layout.channels), layout.repeat)


def _add_up(given: Pass, sums: tuple[Tensor, ...], count: int, per: int) -> None:
    """The second stage: `count` partial sums a channel, `per` of them beside each other."""
    if given.need_scale or given.need_zero_point:
        channels = given.layout.channels
        block = min(1024, next_power_of_2(count))
        together = min(1024 // block, next_power_of_2(channels))
        kernels.add_up_kernel[(cdiv(channels, together),)](
            *sums,
            given.tensors[-1],
            *given.gradients,
            channels,
            count,
            per,
            given.grad_factor,
            NEED_SCALE=given.need_scale,
            NEED_ZERO_POINT=given.need_zero_point,
            CHANNELS=together,
            BLOCK=block,
            enable_fp_fusion=False,
        )


def _turns(numel: int) -> int:
    """Tiles that a program takes, a power of 2; by the tensor's size alone, so that no device changes a sum."""
    return int(max(1, min(_MOST_TURNS, 1 << max(0, (numel // (_TILE * _PROGRAMS)).bit_length() - 1))))


def _step(*lengths: int) -> int:
    """The largest power of 2 up to 16 that divides them all."""
    return math.gcd(16, *lengths)


def _fitting_block(chunk: int) -> int:
    """The power of 2 that cuts runs of this length with the fewest idle lanes, up to a tenth more for a longer one."""
    sizes = [1 << k for k in range(8, _TILE.bit_length())]
    if chunk <= sizes[0]:
        return next_power_of_2(chunk)
    idle = {size: cdiv(chunk, size) * size for size in sizes}
    return max(size for size in sizes if idle[size] <= 1.1 * min(idle.values()))
