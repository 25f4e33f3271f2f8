"""The device code of the Triton backend: one pass forward, one pass backward, and sums in an order that is fixed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

_EPS = tl.constexpr(1.1920928955078125e-07)  # float32 machine epsilon
_LARGEST = tl.constexpr(3.4028234663852886e38)
_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds half to even

# Before Triton 3.6 its division takes subnormal numbers for zero, and gives zero for them.
_OLD = tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 6)
_FLUSHES = tl.constexpr(_OLD and not knobs.runtime.interpret and torch.version.hip is None)

NARROW, WIDE = tl.int32, tl.int64  # of offsets


# ---- one element ----------------------------------------------------------------------------------------------------


@triton.jit
def _clamp(v, low, high):
    # NaN survives both.
    above = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(above, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _round_half_even(v):
    # Right for magnitudes up to 2^22: clamp first. Never -0.0.
    return (v + _TO_INTEGER) - _TO_INTEGER


@triton.jit
def _divided(v, s):
    if _FLUSHES:
        return tl.inline_asm_elementwise(
            "div.rn.f32 $0, $1, $2;", "=f,f,f", [v, s], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.div_rn(v, s)


@triton.jit
def _used(scale, zero_point, quant_min, quant_max):
    """The scale, above zero, and the range of codes less the integer zero point; a NaN of either is in the scale."""
    z = _round_half_even(_clamp(zero_point, quant_min, quant_max))
    s = tl.where(scale < _EPS, _EPS, scale)
    return tl.where(z == z, s, z), quant_min - z, quant_max - z


@triton.jit
def _quantized(v, s, low, high):
    # Rounding is monotone and the limits are integers, so clamping first gives the same integer.
    return _round_half_even(_clamp(_divided(v, s), low, high)) * s


@triton.jit
def _terms(x, g, s, low, high, SATURATION: tl.constexpr):
    """Whether one element's gradient passes to x, its term for the scale, and for the zero point without the -s.

    An x that is not finite never passes: its code is out of range, or NaN.
    """
    u = _divided(x, s)
    if SATURATION == "lsq":
        c = _round_half_even(_clamp(u, low, high))
        passes = (u > low) & (u < high)
        learns = passes
    else:
        r = _round_half_even(_clamp(u, low - 1.0, high + 1.0))
        c = _clamp(r, low, high)
        passes = c == r
        learns = passes
        if SATURATION == "inclusive":
            learns = (r > low) & (r < high)
    finite = tl.abs(x) <= _LARGEST
    weight = tl.where(learns, c - u, c)
    return passes, tl.where(finite, g * weight, 0.0), tl.where(finite & (learns == 0), g, 0.0)


# ---- where the elements of a program are, and their scales -----------------------------------------------------------


@triton.jit
def _note(program, scale, zero_point, qparams, quant_min, quant_max, channels, CHANNELS: tl.constexpr):
    """Write what backward needs of some channels, (3, channels)."""
    channel = program * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    s, low, high = _used(
        tl.load(scale + channel, known, 1.0), tl.load(zero_point + channel, known, 0.0), quant_min, quant_max
    )
    tl.store(qparams + channel, s, known)
    tl.store(qparams + channels + channel, low, known)
    tl.store(qparams + 2 * channels + channel, high, known)


@triton.jit
def _runs(
    program,
    pieces,
    per_run,
    channels,
    row,
    groups,
    chunk,
    ONE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    STEP: tl.constexpr,
):
    """A program's pieces of memory that share one scale each: number, whether it is one, channel, start and length.

    `per_run` pieces of up to LENGTH elements make a run; ONE says that there is a single run. STEP divides `row` and
    `chunk`, so that so many neighbours are loaded and stored at once.
    """
    row, chunk = row // STEP * STEP, chunk // STEP * STEP  # the compiler learns it from the products
    piece = program.to(INDEX) * ROWS + tl.arange(0, ROWS)
    valid = piece < pieces
    run, part = piece // per_run, piece % per_run
    if ONE:
        run, part = piece * 0, piece
    begin = run % groups * chunk
    offset = part.to(tl.int64) * LENGTH
    start = (run // groups).to(tl.int64) * row + begin + offset
    # It does not see it through `where` and `minimum`.
    length = tl.multiple_of(tl.where(valid, tl.minimum(row - begin, chunk) - offset, 0), STEP)
    return piece, valid, run % channels, start, length


# ---- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def forward_runs_kernel(
    x,
    y,
    scale,
    zero_point,
    qparams,
    quant_min,
    quant_max,
    noting,
    pieces,
    per_run,
    channels,
    row,
    groups,
    chunk,
    ONE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,
    STEP: tl.constexpr,
    NOTED: tl.constexpr,
):
    """Write y over pieces of memory; the first `noting` programs write what backward needs."""
    program = tl.program_id(0)
    if program < noting:
        _note(program, scale, zero_point, qparams, quant_min, quant_max, channels, NOTED)
    else:
        _, valid, channel, start, length = _runs(
            program - noting, pieces, per_run, channels, row, groups, chunk, ONE, INDEX, ROWS, BLOCK * TURNS, STEP
        )
        s, low, high = _used(
            tl.load(scale + channel, valid, 1.0), tl.load(zero_point + channel, valid, 0.0), quant_min, quant_max
        )
        lane = tl.arange(0, BLOCK)[None, :]
        for turn in range(TURNS):
            column = lane + turn * BLOCK
            inside = column < length[:, None]
            at = start[:, None] + column
            value = tl.load(x + at, inside, 0.0).to(tl.float32)
            result = _quantized(value, s[:, None], low[:, None], high[:, None])
            tl.store(y + at, result.to(y.dtype.element_ty), inside)


@triton.jit
def forward_columns_kernel(
    x,
    y,
    scale,
    zero_point,
    qparams,
    quant_min,
    quant_max,
    noting,
    rows,
    width,
    across,
    channels,
    repeat,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TURNS: tl.constexpr,
    STEP: tl.constexpr,
    NOTED: tl.constexpr,
):
    """Write y of a matrix, `across` blocks beside each other; the first programs as in `forward_runs_kernel`."""
    program = tl.program_id(0)
    if program < noting:
        _note(program, scale, zero_point, qparams, quant_min, quant_max, channels, NOTED)
    else:
        width = width // STEP * STEP  # see `_runs`
        block = (program - noting) // across
        column = (program - noting) % across * COLUMNS + tl.arange(0, COLUMNS)
        within = column < width
        channel = column // repeat % channels
        s, low, high = _used(
            tl.load(scale + channel, within, 1.0), tl.load(zero_point + channel, within, 0.0), quant_min, quant_max
        )
        first = block.to(tl.int64) * (ROWS * TURNS) + tl.arange(0, ROWS)
        for turn in range(TURNS):
            line = first + turn * ROWS
            inside = (line < rows)[:, None] & within[None, :]
            at = line[:, None] * width + column[None, :]
            value = tl.load(x + at, inside, 0.0).to(tl.float32)
            result = _quantized(value, s[None, :], low[None, :], high[None, :])
            tl.store(y + at, result.to(y.dtype.element_ty), inside)


# ---- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def backward_runs_kernel(
    g,
    x,
    dx,
    qparams,
    d_scale,
    d_zero_point,
    grad_factor,
    pieces,
    per_run,
    channels,
    row,
    groups,
    chunk,
    SATURATION: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    NEED_ZERO_POINT: tl.constexpr,
    FINAL: tl.constexpr,
    ONE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Write dx, and a sum for each piece of memory. FINAL: each channel has one piece; its sums are the gradients."""
    piece, valid, channel, start, length = _runs(
        tl.program_id(0), pieces, per_run, channels, row, groups, chunk, ONE, INDEX, ROWS, BLOCK * TURNS, STEP
    )
    scales = tl.load(qparams + channel, valid, 1.0)
    s = scales[:, None]
    low = tl.load(qparams + channels + channel, valid, 0.0)[:, None]
    high = tl.load(qparams + 2 * channels + channel, valid, 0.0)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    scale_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    zero_point_sum = tl.zeros((ROWS, BLOCK), tl.float32)
    for turn in range(TURNS):
        column = lane + turn * BLOCK
        inside = column < length[:, None]
        at = start[:, None] + column
        value = tl.load(x + at, inside, 0.0).to(tl.float32)
        upstream = tl.load(g + at, inside, 0.0)  # to x as it came: float64 holds what float32 does not
        passes, to_scale, to_zero_point = _terms(value, upstream.to(tl.float32), s, low, high, SATURATION)
        tl.store(dx + at, tl.where(passes, upstream, 0.0), inside)
        scale_sum += to_scale
        zero_point_sum += to_zero_point
    if NEED_SCALE:
        total = tl.sum(scale_sum, 1)
        tl.store(d_scale + piece, total * grad_factor if FINAL else total, valid)
    if NEED_ZERO_POINT:
        total = tl.sum(zero_point_sum, 1)
        tl.store(d_zero_point + piece, -scales * total * grad_factor if FINAL else total, valid)


@triton.jit
def backward_columns_kernel(
    g,
    x,
    dx,
    qparams,
    d_scale,
    d_zero_point,
    rows,
    width,
    across,
    channels,
    repeat,
    SATURATION: tl.constexpr,
    NEED_SCALE: tl.constexpr,
    NEED_ZERO_POINT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TURNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Write dx, and a sum for each column of each block of rows; `across` blocks lie beside each other."""
    width = width // STEP * STEP  # see `_runs`
    program = tl.program_id(0)
    block = program // across
    column = program % across * COLUMNS + tl.arange(0, COLUMNS)
    within = column < width
    channel = column // repeat % channels
    s = tl.load(qparams + channel, within, 1.0)[None, :]
    low = tl.load(qparams + channels + channel, within, 0.0)[None, :]
    high = tl.load(qparams + 2 * channels + channel, within, 0.0)[None, :]
    first = block.to(tl.int64) * (ROWS * TURNS) + tl.arange(0, ROWS)
    scale_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    zero_point_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for turn in range(TURNS):
        line = first + turn * ROWS
        inside = (line < rows)[:, None] & within[None, :]
        at = line[:, None] * width + column[None, :]
        value = tl.load(x + at, inside, 0.0).to(tl.float32)
        upstream = tl.load(g + at, inside, 0.0)  # to x as it came: float64 holds what float32 does not
        passes, to_scale, to_zero_point = _terms(value, upstream.to(tl.float32), s, low, high, SATURATION)
        tl.store(dx + at, tl.where(passes, upstream, 0.0), inside)
        scale_sum += to_scale
        zero_point_sum += to_zero_point
    to = block.to(tl.int64) * width + column
    if NEED_SCALE:
        tl.store(d_scale + to, tl.sum(scale_sum, 0), within)
    if NEED_ZERO_POINT:
        tl.store(d_zero_point + to, tl.sum(zero_point_sum, 0), within)


# ---- second stage: the partial sums of each channel, in order, in float64 -------------------------------------------


@triton.jit
def _totals(partial, channel, known, channels, count, per, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((CHANNELS, BLOCK), tl.float64)
    for begin in range(0, count, BLOCK):
        k = begin + lane
        at = (k // per * per).to(tl.int64)[None, :] * channels + channel[:, None] * per + (k % per)[None, :]
        total += tl.load(partial + at, known[:, None] & (k < count)[None, :], 0.0).to(tl.float64)
    return tl.sum(total, 1)


@triton.jit
def add_up_kernel(
    scale_partial,
    zero_point_partial,
    qparams,
    d_scale,
    d_zero_point,
    grad_factor,
    channels,
    count,
    per,
    NEED_SCALE: tl.constexpr,
    NEED_ZERO_POINT: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradients of some channels' qparams; partial sums lie as (count / per, channels, per)."""
    channel = tl.program_id(0).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    if NEED_SCALE:
        scale_total = _totals(scale_partial, channel, known, channels, count, per, CHANNELS, BLOCK)
        tl.store(d_scale + channel, scale_total.to(tl.float32) * grad_factor, known)
    if NEED_ZERO_POINT:
        s = tl.load(qparams + channel, known, 1.0)
        zero_point_total = _totals(zero_point_partial, channel, known, channels, count, per, CHANNELS, BLOCK)
        tl.store(d_zero_point + channel, (-s * zero_point_total).to(tl.float32) * grad_factor, known)
