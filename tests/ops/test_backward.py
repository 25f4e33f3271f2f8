"""Gradients are those of the definition, summed to within 1e-5 of the terms' magnitudes, on every backend."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lfq_lightning as lfq
from tests import oracle
from tests.assertions import assert_bit_equal, assert_strides_kept, assert_sums, case
from tests.samples import (
    BACKENDS,
    DENSE,
    DTYPES,
    FAST_BACKENDS,
    GRIDS,
    LAYOUTS,
    SATURATIONS,
    Case,
    Grid,
    cases,
    on,
    scales_needed,
)

BLOCK_LAYOUTS = ("contiguous", "channels_last", "gaps")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_saturation = pytest.mark.parametrize("saturation", SATURATIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Gradients(NamedTuple):
    x: Tensor
    scale: Tensor
    zero_point: Tensor


def gradients(backend: str, dy: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, **arguments: Any) -> Gradients:
    inputs = [t.detach().requires_grad_() for t in (x, scale, zero_point)]
    with on(backend):
        y = lfq.fake_quantize(*inputs, **arguments)
        return Gradients(*torch.autograd.grad(y, inputs, dy))


def assert_gradients_are_the_definition(
    backend: str, dy: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, **arguments: Any
) -> None:
    expected = oracle.backward(dy, x, scale, zero_point, **arguments)
    assert_gradients_are(expected, backend, dy, x, scale, zero_point, **arguments)


def assert_gradients_are(expected: oracle.Gradients, backend: str, dy: Tensor, *tensors: Tensor, **more: Any) -> None:
    found = gradients(backend, dy, *tensors, **more)
    assert_bit_equal(found.x, expected.x)
    assert_sums(found.scale, expected.scale, expected.scale_magnitude)
    assert_sums(found.zero_point, expected.zero_point, expected.zero_point_magnitude)


def upstream(x: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)


@pytest.mark.quick
@settings(max_examples=300)
@given(drawn=cases(), saturation=st.sampled_from(SATURATIONS), layout=st.sampled_from(sorted(LAYOUTS)))
def test_every_shape_stride_dtype_and_granularity_gives_the_definition(
    drawn: Case, saturation: str, layout: str
) -> None:
    dy = LAYOUTS[layout](upstream(drawn.x))
    expected = oracle.backward(dy, *drawn[:3], saturation=saturation, **drawn.settings)
    for backend in FAST_BACKENDS:
        with case(backend=backend):
            assert_gradients_are(expected, backend, dy, *drawn[:3], saturation=saturation, **drawn.settings)


@pytest.mark.parametrize(
    ("shape", "granularity"),
    [
        ((2, 2051), {}),
        ((2, 2051), {"axis": 0}),
        ((3, 4, 33), {"axis": 1}),
        ((130, 5), {"axis": 1}),
        ((66, 5, 7), {"axis": 1}),
        ((3, 50, 3), {"group_size": 16}),
        ((2, 20, 3, 3), {"group_size": 7}),
        ((700,), {"axis": 0}),
    ],
    ids=str,
)
def test_blocks_and_their_remainders_give_the_definition(shape: tuple[int, ...], granularity: dict[str, int]) -> None:
    count = scales_needed(shape, **granularity)
    values = torch.randn(shape)
    qparams = torch.rand(count) / 4 + 0.05, torch.randint(-3, 4, (count,)).float()
    for dtype, saturation in itertools.product(DTYPES, SATURATIONS):
        arguments = {"quant_min": -8, "quant_max": 7, "saturation": saturation, **granularity}
        x = values.to(dtype)
        dy = upstream(x)
        expected = oracle.backward(dy, x, *qparams, **arguments)
        # Triton's interpreter is slow, and how blocks are cut hangs on neither.
        interpreted = dtype is torch.float32 or (dtype, saturation) == (torch.float16, "lsq")
        for backend, layout in itertools.product(BACKENDS if interpreted else FAST_BACKENDS, BLOCK_LAYOUTS):
            with case(backend=backend, dtype=dtype, saturation=saturation, layout=layout):
                assert_gradients_are(expected, backend, dy, LAYOUTS[layout](x), *qparams, **arguments)


@each_saturation
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_backends_give_the_same_bits_for_x(grid: Grid, saturation: str) -> None:
    low, high = grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point
    x = torch.empty(50_000).uniform_(1.5 * low - 2, 1.5 * high + 2)
    x[::2] = x[::2].floor() + 0.5
    x = x * max(grid.scale, 1e-7)
    arguments = {"quant_min": grid.quant_min, "quant_max": grid.quant_max, "saturation": saturation}
    qparams = torch.tensor([grid.scale]), torch.tensor([grid.zero_point])
    expected = gradients("reference", upstream(x), x, *qparams, **arguments).x
    for backend in BACKENDS[1:]:
        count = len(x) if backend == "native" else 5000  # several of Triton's blocks, in its slow interpreter
        found = gradients(backend, upstream(x)[:count], x[:count], *qparams, **arguments).x
        with case(backend=backend):
            assert_bit_equal(found, expected[:count])


@each_backend
@pytest.mark.parametrize("layout", DENSE)
def test_the_gradient_of_x_lies_in_memory_as_x_does(backend: str, layout: str) -> None:
    x = DENSE[layout](torch.randn(2, 6, 5, 4))
    dy = torch.randn(2, 6, 5, 4)
    found = gradients(backend, dy, x, torch.full((6,), 0.2), torch.zeros(6), axis=1, quant_min=-8, quant_max=7)
    assert_strides_kept(found.x, x)


@each_backend
@each_saturation
@each_dtype
def test_sums_of_millions_of_terms_of_one_sign_stay_accurate(backend: str, saturation: str, dtype: torch.dtype) -> None:
    # 500 values many times over: the scalar oracle sees each of them once.
    few = torch.linspace(0.3, 9.0, 500).to(dtype)
    arguments = {"quant_min": 0, "quant_max": 7, "saturation": saturation}
    qparams = torch.tensor([0.37]), torch.tensor([0.0])
    times = 20 if backend == "triton" else 4000
    expected = oracle.backward(torch.ones_like(few), few, *qparams, **arguments)
    found = gradients(backend, torch.ones(500 * times, dtype=dtype), few.repeat(times), *qparams, **arguments)
    assert_sums(found.scale, expected.scale * times, expected.scale_magnitude * times)
    assert_sums(found.zero_point, expected.zero_point * times, expected.zero_point_magnitude * times)


@pytest.mark.quick
@each_saturation
@each_dtype
def test_values_that_are_not_finite_contribute_nothing(saturation: str, dtype: torch.dtype) -> None:
    finite = torch.linspace(-6, 6, 40).to(dtype)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf] * 20, dtype=dtype)
    arguments = {"quant_min": -8, "quant_max": 7, "saturation": saturation}
    qparams = torch.tensor([0.5]), torch.tensor([2.0])
    expected = oracle.backward(torch.ones(40), finite, *qparams, **arguments)
    expected = expected._replace(x=torch.cat((expected.x, torch.zeros(60, dtype=dtype))))
    for backend in BACKENDS:
        with case(backend=backend):
            ones, x = torch.ones(100, dtype=dtype), torch.cat((finite, odd))
            assert_gradients_are(expected, backend, ones, x, *qparams, **arguments)


@pytest.mark.quick
@each_backend
@pytest.mark.parametrize(
    ("shape", "granularity"),
    [
        ((0,), {}),
        ((0, 3), {"axis": 1}),
        ((3, 0), {"axis": 0}),
        ((0, 3), {"axis": 0}),
        ((3, 0, 40), {"axis": 0}),
        ((0, 5), {"group_size": 2}),
        ((3, 0), {"group_size": 2}),
        ((3, 4, 0), {"group_size": 2}),
    ],
    ids=str,
)
def test_an_empty_input_gives_zero_gradients(backend: str, shape: tuple[int, ...], granularity: dict[str, int]) -> None:
    x, count = torch.empty(shape), scales_needed(shape, **granularity)
    qparams = torch.ones(count), torch.zeros(count)
    found = gradients(backend, torch.empty(shape), x, *qparams, quant_min=0, quant_max=7, **granularity)
    assert found.x.shape == shape
    for gradient in (found.scale, found.zero_point):
        assert gradient.shape == (count,)
        assert (gradient == 0).all()


@pytest.mark.quick
@each_backend
@pytest.mark.parametrize("factor", [1.0, -2.0, 0.25, 1e-4])
def test_the_gradient_factor_multiplies_the_gradients_of_the_qparams_alone(backend: str, factor: float) -> None:
    x, qparams = torch.randn(300), (torch.tensor([0.1]), torch.tensor([1.0]))
    arguments = {"quant_min": -8, "quant_max": 7}
    expected = oracle.backward(upstream(x), x, *qparams, **arguments)
    found = gradients(backend, upstream(x), x, *qparams, grad_factor=factor, **arguments)
    assert_bit_equal(found.x, expected.x)
    assert_sums(found.scale, expected.scale, expected.scale_magnitude, factor)
    assert_sums(found.zero_point, expected.zero_point, expected.zero_point_magnitude, factor)


@pytest.mark.quick
@each_backend
@each_saturation
@pytest.mark.parametrize("grid", [Grid(-8, 7, 1e-9, 0.0), Grid(-8, 7, -3.0, 0.0), Grid(-8, 7, 0.2, 40.0)], ids=str)
def test_gradients_pass_straight_through_the_limits_of_scale_and_zero_point(
    backend: str, saturation: str, grid: Grid
) -> None:
    x = torch.linspace(-3, 4, 81)
    arguments = {"quant_min": grid.quant_min, "quant_max": grid.quant_max, "saturation": saturation}
    qparams = torch.tensor([grid.scale]), torch.tensor([grid.zero_point])
    assert_gradients_are_the_definition(backend, x, x, *qparams, **arguments)
    found = gradients(backend, x, x, *qparams, **arguments)
    assert found.scale != 0
    assert found.zero_point != 0


@pytest.mark.quick
@each_backend
def test_without_a_gradient_factor_the_qparams_get_no_gradient(backend: str) -> None:
    x, scale, zero_point = torch.randn(9).requires_grad_(), torch.ones(1).requires_grad_(), torch.zeros(1)
    with on(backend):
        lfq.fake_quantize(x, scale, zero_point, quant_min=0, quant_max=1, grad_factor=0.0).sum().backward()
    assert x.grad is not None
    assert scale.grad is None


@pytest.mark.quick
@each_backend
@pytest.mark.parametrize("wanted", ["x", "scale", "zero_point"])
def test_what_needs_no_gradient_gets_none_and_changes_no_other(backend: str, wanted: str) -> None:
    tensors = {"x": torch.linspace(-3, 3, 99), "scale": torch.tensor([0.3]), "zero_point": torch.tensor([2.0])}
    everything = gradients(backend, torch.ones(99), *tensors.values(), quant_min=-8, quant_max=7)
    tensors[wanted].requires_grad_()
    with on(backend):
        lfq.fake_quantize(**tensors, quant_min=-8, quant_max=7).sum().backward()
    assert_bit_equal(tensors[wanted].grad, getattr(everything, wanted))
    assert all(t.grad is None for name, t in tensors.items() if name != wanted)


@each_backend
def test_a_lazily_negated_gradient_counts_with_its_sign(backend: str) -> None:
    x, qparams = torch.linspace(-3, 3, 99), (torch.tensor([0.3]), torch.tensor([2.0]))
    arguments = {"quant_min": -8, "quant_max": 7}
    found = gradients(backend, torch._neg_view(torch.ones(99)), x, *qparams, **arguments)
    expected = gradients(backend, -torch.ones(99), x, *qparams, **arguments)
    for one, other in zip(found, expected, strict=True):
        assert_bit_equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "granularity"),
    [((300,), {}), ((40, 5), {"axis": 1}), ((3, 4, 2), {"axis": 0}), ((4, 10, 3), {"group_size": 4})],
    ids=str,
)
def test_the_gradient_of_a_float64_x_keeps_the_precision_of_what_comes_in(
    backend: str, shape: tuple[int, ...], granularity: dict[str, int]
) -> None:
    count = scales_needed(shape, **granularity)
    x = torch.randn(shape, dtype=torch.float64).clamp(-3, 3).requires_grad_()
    dy = torch.randn(shape, dtype=torch.float64) * 10.0 ** torch.randint(-250, -40, shape)
    with on(backend):
        y = lfq.fake_quantize(
            x, torch.full((count,), 0.1), torch.zeros(count), quant_min=-40, quant_max=40, **granularity
        )
        (found,) = torch.autograd.grad(y, x, dy)
    assert_bit_equal(found, dy)
