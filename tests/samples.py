"""The backends, grids and tensors that every test of the operation shares."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

# The Triton kernels' own code, run by Triton's interpreter; with a GPU, tests/cuda runs it compiled.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
FAST_BACKENDS = ("reference", "native")
BACKENDS = (*FAST_BACKENDS, *(["triton"] * INTERPRETED))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SATURATIONS = ("lsq", "exclusive", "inclusive")
EPS = torch.finfo(torch.float32).eps


def on(backend: str) -> Any:
    """Force a backend within a `with` block."""
    return mock.patch.dict(os.environ, LFQ_BACKEND=backend)


class Grid(NamedTuple):
    """One scale and zero point, and the range of their codes."""

    quant_min: int
    quant_max: int
    scale: float
    zero_point: float


# 2 to 16 bits; ranges that exclude 0; scales at and below eps and at 1e30; zero points between integers and outside.
GRIDS = (
    Grid(-2, 1, 0.1, 0.0),
    Grid(-8, 7, 1 / 3, 0.0),
    Grid(-7, 7, 1.0, 0.0),
    Grid(0, 15, 0.7, 7.5),
    Grid(0, 255, 0.02, 128.0),
    Grid(-128, 127, 0.05, -3.4),
    Grid(0, 65535, 1e-4, 30000.5),
    Grid(-32768, 32767, EPS, 0.0),
    Grid(3, 10, 0.3, 5.0),
    Grid(-10, -3, 0.3, 0.0),
    Grid(0, 255, 1e30, 12.0),
    Grid(-8, 7, -1e-20, 1000.0),
    Grid(-65536, 65536, 3e-3, -70000.0),
)

_SPECIAL = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38]


def adversarial(grid: Grid, count: int, seed: int = 0) -> Tensor:
    """Float32 values that a careless kernel gets wrong: any bits at all, ties and their neighbours, special values."""
    generator = torch.Generator().manual_seed(seed)
    quarter = (count - len(_SPECIAL)) // 4
    scale = max(grid.scale, EPS)
    low, high = grid.quant_min - grid.zero_point - 4, grid.quant_max - grid.zero_point + 4
    any_bits = torch.randint(-(2**31), 2**31, (quarter,), generator=generator).to(torch.int32).view(torch.float32)
    # (k + 0.5) * scale in float32 is not always a tie after the division: its neighbours are.
    ties = (torch.empty(quarter).uniform_(low, high, generator=generator).floor() + 0.5) * scale
    towards = torch.where(torch.rand(quarter, generator=generator) < 0.5, torch.inf, -torch.inf)
    spread = torch.randn(quarter, generator=generator) * scale * (high - low) / 4
    parts = (any_bits, ties, torch.nextafter(ties, towards), spread, torch.tensor(_SPECIAL))
    return torch.cat(parts)


def every_half(dtype: torch.dtype) -> Tensor:
    """All 65536 values of a 16-bit dtype."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


# ---- memory layouts -------------------------------------------------------------------------------------------------


def _transposed(x: Tensor) -> Tensor:
    backwards = tuple(reversed(range(x.ndim)))
    return x.permute(backwards).contiguous().permute(backwards)


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.ndim > 1 else x.clone()


def _gaps(x: Tensor) -> Tensor:
    return torch.stack((x, torch.full_like(x, 7.0)), dim=-1)[..., 0]


def _offset(x: Tensor) -> Tensor:
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape) if x.ndim and x.shape[0] else x.clone()


DENSE: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.clone,
    "offset": _offset,
    "transposed": _transposed,
    "channels_last": _channels_last,
}
# "expanded" repeats the first slice of the values it is given.
LAYOUTS = {**DENSE, "gaps": _gaps, "expanded": _expanded}

# ---- hypothesis -----------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """One call of `fake_quantize`."""

    x: Tensor
    scale: Tensor
    zero_point: Tensor
    settings: dict[str, Any]


def scales_needed(shape: tuple[int, ...], axis: int | None = None, group_size: int | None = None) -> int:
    if group_size is not None:
        return shape[0] * -(-shape[1] // group_size)
    return 1 if axis is None else shape[axis]


@st.composite
def granularities(draw: st.DrawFn, shape: tuple[int, ...]) -> dict[str, int]:
    """Keywords for one scale, one per index of any axis, or one per group with or without a remainder."""
    kinds = ["tensor"] + ["channel"] * (len(shape) > 0) + ["group"] * (len(shape) > 1)
    kind = draw(st.sampled_from(kinds))
    if kind == "channel":
        return {"axis": draw(st.integers(-len(shape), len(shape) - 1))}
    return {"group_size": draw(st.integers(1, 9))} if kind == "group" else {}


@st.composite
def cases(draw: st.DrawFn, non_finite: bool = True) -> Case:
    """A tensor of any shape, strides and dtype with qparams for any granularity."""
    # Sampled, since hypothesis would else draw mostly short lists and zeros.
    rank = draw(st.sampled_from([4, 3, 2, 1, 0]))
    shape = tuple(draw(st.sampled_from([5, 3, 2, 1, 6, 4, 7, 3, 2, 5, 1, 0])) for _ in range(rank))
    settings: dict[str, Any] = draw(granularities(shape))
    count = scales_needed(shape, **settings)
    bits = draw(st.integers(2, 16))
    excluding_zero = [3, -(2**bits) - 5] if bits < 16 else []
    quant_min = draw(st.sampled_from([0, -(2 ** (bits - 1)), -(2 ** (bits - 1)) + 1, *excluding_zero]))
    quant_max = quant_min + 2**bits - 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    magnitude = draw(st.sampled_from([EPS, 1e-3, 0.1, 1 / 3, 1.0, 40.0, 1e30]))
    scale = torch.empty(count).uniform_(0.5, 2.0, generator=generator) * magnitude
    span = quant_max - quant_min
    zero_point = torch.empty(count).uniform_(quant_min - 0.2 * span, quant_max + 0.2 * span, generator=generator)
    if draw(st.booleans()):
        zero_point = zero_point.floor() + 0.5
    numel = torch.Size(shape).numel()
    kind = torch.rand(numel, generator=generator)
    values = torch.empty(numel).uniform_(-1.2 * span, 1.2 * span, generator=generator)
    values = torch.where(kind < 0.3, values.floor() + 0.5, values) * magnitude
    if non_finite:
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-45, 3e38])
        chosen = odd[torch.randint(len(odd), (numel,), generator=generator)]
        values = torch.where(kind > 0.85, chosen, values)
    x = values.reshape(shape).to(draw(st.sampled_from(DTYPES)))
    x = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x)
    return Case(x, scale, zero_point, {"quant_min": quant_min, "quant_max": quant_max, **settings})
