"""Every backend computes the definition, bit for bit, whatever the values, shapes, strides and dtypes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lfq_lightning as lfq
from tests import oracle
from tests.assertions import assert_bit_equal, assert_no_negative_zero, assert_on_grid, assert_strides_kept, case
from tests.samples import (
    BACKENDS,
    DENSE,
    DTYPES,
    EPS,
    FAST_BACKENDS,
    GRIDS,
    LAYOUTS,
    Case,
    Grid,
    adversarial,
    cases,
    every_half,
    on,
    scales_needed,
)

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def fake_quantized(backend: str, x: Tensor, grid: Grid) -> Tensor:
    with on(backend):
        return lfq.fake_quantize(
            x,
            torch.tensor([grid.scale]),
            torch.tensor([grid.zero_point]),
            quant_min=grid.quant_min,
            quant_max=grid.quant_max,
        )


def by_oracle(x: Tensor, grid: Grid) -> Tensor:
    scale, zero_point = torch.tensor([grid.scale]), torch.tensor([grid.zero_point])
    return oracle.forward(x, scale, zero_point, grid.quant_min, grid.quant_max)


def values_for(grid: Grid, dtype: torch.dtype, count: int) -> Tensor:
    return every_half(dtype) if dtype.itemsize == 2 else adversarial(grid, count).to(dtype)


@pytest.mark.quick
@each_grid
def test_every_backend_equals_the_scalar_oracle(grid: Grid) -> None:
    for dtype in DTYPES:
        x = values_for(grid, dtype, 1500)
        x = x[:: max(1, x.numel() // 1500)]
        expected = by_oracle(x, grid)
        assert_no_negative_zero(expected)
        for backend in BACKENDS:
            with case(backend=backend, dtype=dtype):
                assert_bit_equal(fake_quantized(backend, x, grid), expected)


@each_grid
def test_backends_are_bit_equal_on_ten_million_values(grid: Grid) -> None:
    x = adversarial(grid, 10_000_000 // len(GRIDS), seed=1)
    assert_bit_equal(fake_quantized("native", x, grid), fake_quantized("reference", x, grid))


@each_grid
def test_backends_are_bit_equal_in_other_dtypes_on_every_half_and_bfloat16(grid: Grid) -> None:
    for dtype in DTYPES:
        x = values_for(grid, dtype, 100_000)
        with case(dtype=dtype):
            y = fake_quantized("native", x, grid)
            assert_bit_equal(y, fake_quantized("reference", x, grid))
            assert y.dtype is dtype


@pytest.mark.quick
@settings(max_examples=300)
@given(drawn=cases())
def test_every_shape_stride_dtype_and_granularity_equals_the_oracle(drawn: Case) -> None:
    expected = oracle.forward(drawn.x, drawn.scale, drawn.zero_point, **drawn.settings)
    assert_no_negative_zero(expected)
    for backend in FAST_BACKENDS:
        with on(backend), case(backend=backend):
            y = lfq.fake_quantize(drawn.x, drawn.scale, drawn.zero_point, **drawn.settings)
            assert_bit_equal(y, expected)


# Both sides of every cut of the native kernels: runs and columns, blocks of 2048 elements or 64 rows, lanes of 16.
@pytest.mark.quick
@pytest.mark.parametrize(
    ("shape", "granularity"),
    [
        ((4095,), {}),
        ((4099,), {"axis": 0}),
        ((2, 2047), {"axis": 0}),
        ((2, 2051), {"axis": -2}),
        ((3, 2, 33), {"axis": 1}),
        ((65, 5, 31), {"axis": 1}),
        ((130, 17), {"axis": 1}),
        ((2, 4200), {"group_size": 2100}),
        ((3, 100, 3), {"group_size": 32}),
        ((7, 9, 5, 5), {"group_size": 4}),
        ((3, 5, 9), {"group_size": 8}),
        ((2, 6, 4, 8), {"axis": 3}),
    ],
    ids=str,
)
def test_blocks_and_their_remainders_equal_the_oracle(shape: tuple[int, ...], granularity: dict[str, int]) -> None:
    count = scales_needed(shape, **granularity)
    x = torch.randn(shape)
    arguments = {"quant_min": -8, "quant_max": 7, **granularity}
    qparams = torch.rand(count) / 4 + 0.01, torch.randint(-3, 4, (count,)).float()
    expected = oracle.forward(x, *qparams, **arguments)
    for backend, layout in itertools.product(BACKENDS, ("contiguous", "channels_last", "gaps")):
        with on(backend), case(backend=backend, layout=layout):
            assert_bit_equal(lfq.fake_quantize(LAYOUTS[layout](x), *qparams, **arguments), expected)


@each_backend
def test_the_result_lies_in_memory_as_x_does(backend: str) -> None:
    for layout, granularity in itertools.product(DENSE, [{}, {"axis": 1}, {"axis": 3}, {"group_size": 4}]):
        x = DENSE[layout](torch.randn(2, 6, 5, 4))
        qparams = torch.ones(scales_needed(x.shape, **granularity)), torch.zeros(scales_needed(x.shape, **granularity))
        with on(backend), case(layout=layout, granularity=granularity):
            assert_strides_kept(lfq.fake_quantize(x, *qparams, quant_min=-8, quant_max=7, **granularity), x)


@each_backend
def test_a_tensor_with_gaps_gives_the_dense_result_that_torch_gives(backend: str) -> None:
    x = torch.randn(4, 6, 5, 5).contiguous(memory_format=torch.channels_last)[:, ::2]
    assert_strides_kept(fake_quantized(backend, x, GRIDS[1]), torch.empty_like(x))


@pytest.mark.parametrize("granularity", [{}, {"axis": 0}, {"axis": 1}], ids=str)
@pytest.mark.parametrize("layout", DENSE)
def test_native_copies_no_dense_tensor(layout: str, granularity: dict[str, int]) -> None:
    x = DENSE[layout](torch.randn(2, 6, 5, 4))
    count = scales_needed(x.shape, **granularity)
    scale, zero_point = torch.ones(count), torch.zeros(count)
    with on("native"), mock.patch.object(Tensor, "contiguous", _only_without_a_copy):
        lfq.fake_quantize(x, scale, zero_point, quant_min=-8, quant_max=7, **granularity)


def _only_without_a_copy(x: Tensor) -> Tensor:
    assert x.is_contiguous()
    return x


@each_backend
@pytest.mark.parametrize("granularity", [{"axis": 0}, {"axis": 1}, {"group_size": 2}], ids=str)
@pytest.mark.parametrize(
    "strided", [lambda p: p.repeat_interleave(2)[::2], lambda p: p[:1].expand(p.shape)], ids=["gaps", "expanded"]
)
def test_the_strides_of_scale_and_zero_point_do_not_matter(
    backend: str, granularity: dict[str, int], strided: Callable[[Tensor], Tensor]
) -> None:
    x = torch.randn(6, 6)
    count = scales_needed(x.shape, **granularity)
    scale, zero_point = strided(torch.rand(count) + 0.1), strided(torch.rand(count) * 3)
    arguments = {"quant_min": -8, "quant_max": 7, **granularity}
    with on(backend):
        y = lfq.fake_quantize(x, scale, zero_point, **arguments)
    assert_bit_equal(y, oracle.forward(x, scale, zero_point, **arguments))


@each_backend
@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
def test_the_default_dtype_does_not_matter(backend: str, default: torch.dtype) -> None:
    x = torch.linspace(-2, 2, 41)
    expected = by_oracle(x, GRIDS[5])
    scale, zero_point = torch.tensor([GRIDS[5].scale]), torch.tensor([GRIDS[5].zero_point])
    torch.set_default_dtype(default)
    try:
        with on(backend):
            y = lfq.fake_quantize(x, scale, zero_point, quant_min=GRIDS[5].quant_min, quant_max=GRIDS[5].quant_max)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_bit_equal(y, expected)


@each_backend
def test_the_default_device_does_not_matter(backend: str) -> None:
    x = torch.linspace(-2, 2, 41)
    scale, zero_point = torch.tensor([0.1]), torch.tensor([3.0])
    with torch.device("meta"), on(backend):
        y = lfq.fake_quantize(x, scale, zero_point, quant_min=-8, quant_max=7)
    assert_bit_equal(y, oracle.forward(x, scale, zero_point, -8, 7))


@each_backend
@each_grid
def test_results_are_on_the_grid_and_a_second_time_changes_nothing(backend: str, grid: Grid) -> None:
    scale = max(grid.scale, EPS)
    zero_point = float(torch.tensor(min(max(grid.zero_point, grid.quant_min), grid.quant_max)).round())
    y = fake_quantized(backend, torch.randn(2000) * scale * 8, grid)
    assert_on_grid(y, float(torch.tensor(scale)), zero_point, grid.quant_min, grid.quant_max)
    assert_bit_equal(fake_quantized(backend, y, grid), y)


@pytest.mark.quick
@each_backend
@each_dtype
def test_nan_stays_nan_and_infinities_saturate(backend: str, dtype: torch.dtype) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0], dtype=dtype)
    y = fake_quantized(backend, x, Grid(-8, 7, 0.5, 2.0))
    assert_bit_equal(y, torch.tensor([torch.nan, 2.5, -5.0, 0.0], dtype=dtype))


@each_backend
@pytest.mark.parametrize("which", ["scale", "zero_point"])
def test_a_nan_qparam_is_not_hidden(backend: str, which: str) -> None:
    grid = Grid(-8, 7, 0.5, 2.0)._replace(**{which: torch.nan})
    assert fake_quantized(backend, torch.randn(50), grid).isnan().all()


@each_backend
@settings(max_examples=40)
@given(scale=st.floats(EPS, 2.0**100, width=32), zero_point=st.integers(-128, 127))
def test_ties_round_half_to_even_and_their_neighbours_do_not(backend: str, scale: float, zero_point: int) -> None:
    ties = (torch.arange(-140, 141) + 0.5).mul(scale)[torch.randperm(281)[:40]]
    x = torch.cat([ties, *(torch.nextafter(ties, torch.full_like(ties, end)) for end in (-torch.inf, torch.inf))])
    grid = Grid(-128, 127, scale, float(zero_point))
    assert_bit_equal(fake_quantized(backend, x, grid), by_oracle(x, grid))


@pytest.mark.quick
@each_backend
def test_the_smallest_tensors_work(backend: str) -> None:
    for dtype, shape in itertools.product(DTYPES, [(), (1,), (0,), (0, 3), (3, 0, 2)]):
        x = torch.full(shape, 0.6, dtype=dtype)
        with case(dtype=dtype, shape=shape):
            y = fake_quantized(backend, x, Grid(-8, 7, 0.5, 0.0))
            assert_bit_equal(y, torch.full(shape, 0.5, dtype=dtype))
