"""Gradients agree with the seed's equations and PyTorch's kernels, except for their faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lfq_lightning as lfq
from tests import oracle
from tests.assertions import assert_sums
from tests.samples import BACKENDS, DTYPES, on

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def gradients(backend: str, x: Tensor, scale: Tensor, zero_point: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    """y, and the gradients of x, scale and zero point of sum(y * cos(position))."""
    inputs = [t.detach().clone().requires_grad_() for t in (x, scale, zero_point)]
    with on(backend):
        y = lfq.fake_quantize(*inputs, **arguments)
        return y.detach(), *torch.autograd.grad(y, inputs, upstream(x))


def upstream(x: Tensor) -> Tensor:
    return torch.arange(x.numel(), dtype=x.dtype).cos().view(x.shape)


def away_from_ties(x: Tensor, scale: Tensor) -> Tensor:
    """x, with what is so near a tie that another order of operations may round it elsewhere moved off."""
    u = x / scale
    return torch.where((u - u.floor() - 0.5).abs() < 0.01, (u.floor() + 0.3) * scale, x)


@each_backend
@settings(max_examples=50)
@given(
    codes=st.sampled_from([(-8, 7), (0, 15), (-128, 127), (0, 255), (-2, 1)]),
    scale=st.floats(2.0**-10, 10.0, width=16),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_inclusive_saturation_equals_the_seed(
    backend: str, codes: tuple[int, int], scale: float, share: float, seed: int
) -> None:
    quant_min, quant_max = codes
    zero_point = round(quant_min + share * (quant_max - quant_min))
    generator = torch.Generator().manual_seed(seed)
    u = torch.empty(40).uniform_(quant_min - zero_point - 3, quant_max - zero_point + 3, generator=generator)
    x = away_from_ties(u * scale, torch.tensor(scale))
    y, dx, d_scale, d_zero_point = gradients(
        backend,
        x,
        torch.tensor([scale]),
        torch.tensor([float(zero_point)]),
        quant_min=quant_min,
        quant_max=quant_max,
        saturation="inclusive",
    )
    arguments = (scale, zero_point, quant_min, quant_max)
    pairs = list(zip(x.tolist(), upstream(x).tolist(), strict=True))
    terms = torch.tensor([oracle.seed_gradient_terms(v, g, *arguments) for v, g in pairs], dtype=torch.float64).T
    expected = torch.tensor([oracle.seed_fake_quantize(v, *arguments) for v, _ in pairs])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, terms[0].float(), rtol=0.0, atol=0.0)
    # c - u loses digits where u is large: the error of u counts too.
    magnitude = terms[1].abs().sum() + (x / scale).abs().double().sum() * 1e-2
    assert_sums(d_scale, terms[1].sum().view(1), magnitude.view(1))
    assert_sums(d_zero_point, terms[2].sum().view(1), terms[2].abs().sum().view(1))


@each_backend
@settings(max_examples=40)
@given(
    codes=st.sampled_from([(-8, 7), (0, 15), (-128, 127), (0, 255)]),
    axis=st.sampled_from([None, 0, 1, 2]),
    factor=st.sampled_from([1.0, 0.125]),
    seed=st.integers(0, 2**31),
)
def test_exclusive_saturation_equals_torch_where_torch_is_right(
    backend: str, codes: tuple[int, int], axis: int | None, factor: float, seed: int
) -> None:
    quant_min, quant_max = codes
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 3, 5)
    count = 1 if axis is None else shape[axis]
    scale = torch.rand(count, generator=generator) + 0.1
    # Torch rounds zero points below 0 wrongly in its backward.
    zero_point = torch.randint(max(quant_min, 0), quant_max + 1, (count,), generator=generator).float()
    spread = [1, 1, 1] if axis is None else [-1 if d == axis else 1 for d in range(3)]
    u = torch.empty(shape).uniform_(quant_min - 3, quant_max + 3, generator=generator) - zero_point.view(spread)
    x = away_from_ties(u * scale.view(spread), scale.view(spread))
    ours = gradients(
        backend,
        x,
        scale,
        zero_point,
        quant_min=quant_min,
        quant_max=quant_max,
        axis=axis,
        grad_factor=factor,
        saturation="exclusive",
    )
    inputs = [t.requires_grad_() for t in (x, scale, zero_point)]
    if axis is None:
        y = torch._fake_quantize_learnable_per_tensor_affine(*inputs, quant_min, quant_max, factor)
    else:
        y = torch._fake_quantize_learnable_per_channel_affine(*inputs, axis, quant_min, quant_max, factor)
    theirs = (y.detach(), *torch.autograd.grad(y, inputs, upstream(x)))
    tolerance = 1e-5 * factor * float(u.abs().sum() + 1)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=tolerance)


# ---- the faults of the seed and of PyTorch's kernels, which ours must not have ---------------------------------------


@each_backend
@pytest.mark.parametrize(("zero_point", "expected"), [(-1.0, -13.6), (-3.0, -34.6), (0.0, 13.6), (3.0, 35.6)])
def test_forward_and_backward_use_one_zero_point(backend: str, zero_point: float, expected: float) -> None:
    scale = torch.tensor([0.25], requires_grad=True)
    x = torch.linspace(-2, 2, 41)
    with on(backend):
        lfq.fake_quantize(
            x, scale, torch.tensor([zero_point]), quant_min=-8, quant_max=7, saturation="exclusive"
        ).sum().backward()
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(expected, abs=1e-4)


@each_backend
@pytest.mark.parametrize("zero_point", [-3.0, -2.6, -0.5, 2.5, 3.5])
def test_a_zero_point_rounds_half_to_even_in_both_directions(backend: str, zero_point: float) -> None:
    x, scale = torch.linspace(-3, 3, 50), torch.tensor([0.25])
    arguments = {"quant_min": -8, "quant_max": 7}
    found = gradients(backend, x, scale, torch.tensor([zero_point]), **arguments)
    expected = gradients(backend, x, scale, torch.tensor([float(round(zero_point))]), **arguments)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@each_backend
def test_channels_of_a_vector_learn(backend: str) -> None:
    x, scale, zero_point = torch.tensor([-3.0, 0.2, 9.0]), torch.tensor([0.5, 0.25, 1.0]), torch.zeros(3)
    _, dx, d_scale, d_zero_point = gradients(backend, x, scale, zero_point, quant_min=-4, quant_max=3, axis=0)
    g = upstream(x)
    assert torch.equal(dx, g * torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(d_scale, g * torch.tensor([-4.0, 1 - 0.2 / 0.25, 3.0]))
    torch.testing.assert_close(d_zero_point, g * torch.tensor([-0.5, 0.0, -1.0]))


@each_backend
def test_nan_is_passed_on_and_infinity_teaches_the_scale_nothing(backend: str) -> None:
    x = torch.tensor([torch.nan, torch.inf, -torch.inf])
    y, *found = gradients(backend, x, torch.tensor([0.5]), torch.tensor([1.0]), quant_min=-4, quant_max=3)
    assert y.isnan().tolist() == [True, False, False]
    assert y[1:].tolist() == [1.0, -2.5]
    assert all((gradient == 0).all() for gradient in found)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", [{}, {"axis": 1}, {"group_size": 3}], ids=str)
def test_every_floating_dtype_learns(backend: str, dtype: torch.dtype, granularity: dict[str, int]) -> None:
    count = {"axis": 4, "group_size": 6}.get(next(iter(granularity), ""), 1)
    x = torch.linspace(-3, 3, 12).view(3, 4).to(dtype)
    qparams = torch.full((count,), 0.25), torch.ones(count)
    y, dx, d_scale, d_zero_point = gradients(backend, x, *qparams, quant_min=-8, quant_max=7, **granularity)
    assert y.dtype is dx.dtype is dtype
    assert d_scale.dtype is d_zero_point.dtype is torch.float32
    assert d_scale.abs().sum() > 0
    assert d_zero_point.abs().sum() > 0


@each_backend
def test_an_empty_batch_teaches_nothing(backend: str) -> None:
    x, scale, zero_point = torch.empty(0, 3, 8, 8), torch.tensor([0.3]), torch.tensor([1.0])
    _, dx, d_scale, d_zero_point = gradients(backend, x, scale, zero_point, quant_min=-8, quant_max=7)
    assert dx.shape == x.shape
    assert d_scale.item() == d_zero_point.item() == 0.0
