"""The operation under torch.func: gradients of each sample, and a clear no to what no estimator can give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

import lfq_lightning as lfq
from tests.assertions import assert_bit_equal
from tests.samples import BACKENDS, on, scales_needed

each_backend = pytest.mark.parametrize("backend", BACKENDS)
GRANULARITIES = [
    ({}, (5, 6)),
    ({"axis": 0}, (4, 3, 2)),
    ({"axis": -1}, (4, 3)),
    ({"group_size": 4}, (3, 10, 2)),
    ({}, ()),
]


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, **settings: Any) -> Tensor:
    return lfq.fake_quantize(x, scale, zero_point, quant_min=-8, quant_max=7, **settings)


def loss(x: Tensor, scale: Tensor, zero_point: Tensor, settings: dict[str, int]) -> Tensor:
    return quantize(x, scale, zero_point, **settings).square().sum()


def qparams(shape: tuple[int, ...], settings: dict[str, int], *batch: int) -> tuple[Tensor, Tensor]:
    count = scales_needed(shape, **settings) if shape else 1
    return torch.rand(*batch, count) / 4 + 0.1, torch.randint(-3, 4, (*batch, count)).float()


def by_hand(x: Tensor, scale: Tensor, zero_point: Tensor, settings: dict[str, int]) -> tuple[Tensor, ...]:
    inputs = [t.detach().clone().requires_grad_() for t in (x, scale, zero_point)]
    return torch.autograd.grad(loss(*inputs, settings), inputs)


@each_backend
@pytest.mark.parametrize(("settings", "shape"), GRANULARITIES, ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_each_sample_of_a_batch_gets_the_gradients_that_it_has_alone(
    backend: str, settings: dict[str, int], shape: tuple[int, ...], own: bool
) -> None:
    xs = torch.randn(3, *shape)
    scales, zero_points = qparams(shape, settings, *[3] * own)
    with on(backend):
        in_dims = (0, *[0 if own else None] * 2)
        found = vmap(grad(lambda *given: loss(*given, settings), argnums=(0, 1, 2)), in_dims)(xs, scales, zero_points)
        outputs = vmap(lambda *given: quantize(*given, **settings), in_dims)(xs, scales, zero_points)
        for i, x in enumerate(xs):
            alone = (scales[i], zero_points[i]) if own else (scales, zero_points)
            assert_bit_equal(outputs[i], quantize(x, *alone, **settings))
            to_x, *to_qparams = by_hand(x, *alone, settings)
            assert_bit_equal(found[0][i], to_x)
            for one, other in zip((found[1][i], found[2][i]), to_qparams, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_one_x_under_many_scales() -> None:
    x, scales = torch.randn(4, 3), torch.rand(5, 1) + 0.1
    found = vmap(lambda scale: quantize(x, scale, torch.zeros(1)))(scales)
    assert_bit_equal(found, torch.stack([quantize(x, scale, torch.zeros(1)) for scale in scales]))


def test_a_dimension_other_than_the_first_is_mapped_over_and_two_are_nested() -> None:
    x, qparam = torch.randn(4, 3, 2), qparams((4, 3), {})
    twice = vmap(vmap(lambda v: quantize(v, *qparam), in_dims=1, out_dims=1), in_dims=2, out_dims=2)
    assert_bit_equal(twice(x), quantize(x, *qparam))


def test_gradients_of_several_losses_at_once() -> None:
    x, (scale, zero_point) = torch.randn(6), qparams((6,), {})
    inputs = [t.requires_grad_() for t in (x, scale, zero_point)]
    y = quantize(*inputs)
    jacobians = jacrev(quantize, argnums=(0, 1, 2))(*inputs)
    for i in range(6):
        expected = torch.autograd.grad(quantize(*inputs)[i], inputs)
        for one, other in zip(jacobians, expected, strict=True):
            torch.testing.assert_close(one[i], other)
    with pytest.raises(RuntimeError, match=r"by torch.func. Found `is_grads_batched=True`.*use torch.func.jacrev"):
        torch.autograd.grad(y, inputs, torch.eye(6), is_grads_batched=True)


def test_a_vjp_is_called_after_its_transform_has_ended() -> None:
    x, (scale, zero_point) = torch.randn(6), qparams((6,), {})
    y, back = vjp(quantize, x, scale, zero_point)
    inputs = [t.requires_grad_() for t in (x, scale, zero_point)]
    expected = torch.autograd.grad(quantize(*inputs), inputs, torch.ones(6))
    with torch.no_grad():
        quietly = back(torch.ones(6))
    for one, two, other in zip(back(torch.ones_like(y)), quietly, expected, strict=True):
        assert_bit_equal(one, other)
        assert_bit_equal(two, other)


@pytest.mark.parametrize("wrt", [0, 1, 2])
@pytest.mark.parametrize("loss_of", [lambda y: y.sum(), lambda y: y.square().sum()], ids=["linear", "curved"])
def test_second_derivatives_are_refused(wrt: int, loss_of: Any) -> None:
    x, given = torch.randn(6), qparams((6,), {})
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        grad(lambda *t: grad(lambda *u: loss_of(quantize(*u)), wrt)(*t).sum(), wrt)(x, *given)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch itself, the first time
def test_forward_mode_is_refused_with_the_remedy() -> None:
    x, given = torch.randn(6), qparams((6,), {})
    with pytest.raises(RuntimeError, match=r"reverse mode alone.*Found forward-mode.*phase \"off\""):
        jvp(lambda v: quantize(v, *given), (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="reverse mode alone"):
        quantize(forward_ad.make_dual(x, x), *given)


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("domain", ["linear", "power_of_two"])
@pytest.mark.parametrize("phase", ["off", "observe", "learn", "freeze"])
def test_per_sample_gradients_of_a_quantized_model(domain: str, phase: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    specs = [lfq.QuantSpec(bits=4, granularity="per_channel", symmetric=s, scale_domain=domain) for s in (True, False)]
    lfq.attach(model, *specs)
    xs, parameters = torch.randn(3, 2, 4, 4), dict(model.named_parameters())
    lfq.calibrate(model, [xs])
    lfq.set_phase(model, phase)
    model.eval()

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))({name: p.detach() for name, p in parameters.items()}, xs)
    for i, x in enumerate(xs):
        model.zero_grad()
        model(x[None]).square().sum().backward()
        for name, parameter in parameters.items():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[name][i], expected, rtol=1e-4, atol=1e-5, msg=name)
