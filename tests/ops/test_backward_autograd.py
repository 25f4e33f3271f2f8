"""The operation as a citizen of autograd: threads, in-place changes, double backward, torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lfq_lightning as lfq
from tests.assertions import assert_bit_equal
from tests.samples import BACKENDS, DTYPES, FAST_BACKENDS, on, scales_needed

each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def forward_and_backward(x: Tensor, scale: Tensor, zero_point: Tensor, **arguments: object) -> tuple[Tensor, ...]:
    inputs = [t.detach().requires_grad_() for t in (x, scale, zero_point)]
    y = lfq.fake_quantize(*inputs, quant_min=-8, quant_max=7, **arguments)
    dy = torch.arange(x.numel()).sin().view(x.shape).to(x.dtype)
    return y.detach(), *torch.autograd.grad(y, inputs, dy)


# All above the 32768 elements below which the native kernels stay on one thread.
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "granularity"),
    [
        ((123_457,), {}),
        ((31, 40, 7, 9), {"axis": 1}),
        ((5000, 17), {"axis": 1}),
        ((17, 5000), {"axis": 0}),
        ((100, 70, 3, 3), {"group_size": 32}),
    ],
    ids=str,
)
def test_the_number_of_threads_changes_no_bit(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], granularity: dict[str, int]
) -> None:
    x = torch.randn(shape).to(dtype)
    count = scales_needed(shape, **granularity)
    qparams = torch.rand(count) / 4 + 0.1, torch.randint(-3, 4, (count,)).float()
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        with on(backend):
            results.append(forward_and_backward(x, *qparams, **granularity))
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            assert_bit_equal(other, one)


@each_backend
def test_changing_the_qparams_between_forward_and_backward_changes_no_gradient(backend: str) -> None:
    x, scale, zero_point = torch.randn(50), torch.tensor([0.2]), torch.tensor([1.0])
    with on(backend):
        expected = forward_and_backward(x, scale, zero_point)
        inputs = [t.detach().clone().requires_grad_() for t in (x, scale, zero_point)]
        y = lfq.fake_quantize(*inputs, quant_min=-8, quant_max=7)
        with torch.no_grad():
            inputs[1].mul_(7.0)
            inputs[2].fill_(-5.0)
        found = torch.autograd.grad(y, inputs, torch.arange(50).sin())
    for one, other in zip(found, expected[1:], strict=True):
        assert_bit_equal(one, other)


@each_backend
def test_changing_x_between_forward_and_backward_is_noticed(backend: str) -> None:
    x, scale = torch.randn(5), torch.ones(1, requires_grad=True)
    with on(backend):
        y = lfq.fake_quantize(x, scale, torch.zeros(1), quant_min=-8, quant_max=7)
        x.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


LOSSES = {"curved": lambda y: (y**2).sum(), "linear": lambda y: y.sum()}


@pytest.mark.quick
@each_backend
@pytest.mark.parametrize("wrt", ["x", "scale", "zero_point"])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_second_derivative_is_refused_with_the_remedy(backend: str, wrt: str, loss: str) -> None:
    inputs = {
        "x": torch.linspace(-3, 3, 20, requires_grad=True),
        "scale": torch.tensor([0.3], requires_grad=True),
        "zero_point": torch.tensor([1.0], requires_grad=True),
    }
    with on(backend):
        y = lfq.fake_quantize(**inputs, quant_min=-8, quant_max=7)
        (gradient,) = torch.autograd.grad(LOSSES[loss](y), inputs[wrt], create_graph=True)
        # The penalty alone, and hidden behind a term that has a gradient.
        with pytest.raises(
            RuntimeError, match=r"can be differentiated once.*Found a backward pass.*the quantizers in phase"
        ):
            ((gradient**2).sum() + inputs["x"].sum()).backward()


@each_backend
def test_a_second_derivative_of_the_scale_is_refused_where_x_needs_no_gradient(backend: str) -> None:
    scale, other = torch.tensor([0.3], requires_grad=True), torch.ones(1, requires_grad=True)
    with on(backend):
        y = lfq.fake_quantize(torch.linspace(-3, 3, 20), scale, torch.zeros(1), quant_min=-8, quant_max=7)
        (gradient,) = torch.autograd.grad(y.sum(), scale, create_graph=True)
        with pytest.raises(RuntimeError, match="can be differentiated once"):
            ((gradient**2).sum() + other.sum()).backward()


@each_backend
def test_keeping_the_graph_of_a_gradient_is_allowed(backend: str) -> None:
    x, scale, zero_point = torch.randn(20), torch.tensor([0.3]), torch.tensor([1.0])
    inputs = [t.requires_grad_() for t in (x, scale, zero_point)]
    with on(backend):
        y = lfq.fake_quantize(*inputs, quant_min=-8, quant_max=7)
        kept = torch.autograd.grad((y**2).sum(), inputs, create_graph=True)
        plain = torch.autograd.grad((lfq.fake_quantize(*inputs, quant_min=-8, quant_max=7) ** 2).sum(), inputs)
    for one, other in zip(kept, plain, strict=True):
        assert_bit_equal(one, other)


@each_backend
def test_two_uses_of_one_scale_add_their_gradients(backend: str) -> None:
    a, b, zero_point = torch.randn(30), torch.randn(40), torch.zeros(1)
    scale = torch.tensor([0.2], requires_grad=True)
    with on(backend):
        parts = [lfq.fake_quantize(x, scale, zero_point, quant_min=-8, quant_max=7).sum() for x in (a, b)]
        separate = [torch.autograd.grad(part, scale, retain_graph=True)[0] for part in parts]
        (parts[0] + parts[1]).backward()
    torch.testing.assert_close(scale.grad, separate[0] + separate[1])


# Dynamo and Inductor use what torch itself has deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_code_gives_the_same_bits_forward_and_close_gradients() -> None:
    x = torch.cat((torch.randn(998) * 3, torch.tensor([torch.nan, torch.inf])))
    inputs = [t.requires_grad_() for t in (x.view(100, 10), torch.rand(10) / 4 + 0.1, torch.randn(10))]

    def network(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        y = lfq.fake_quantize(x, scale, zero_point, quant_min=-8, quant_max=7, axis=1, grad_factor=0.5)
        return y * 1.0

    eager = network(*inputs)
    compiled = torch.compile(network, fullgraph=True)(*inputs)
    assert_bit_equal(compiled, eager)
    dy = torch.arange(1000).cos().view(100, 10)
    expected = torch.autograd.grad(eager, inputs, dy)
    found = torch.autograd.grad(compiled, inputs, dy)
    assert_bit_equal(found[0], expected[0])
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


@each_backend
@pytest.mark.parametrize("unpack", [lambda t: t, Tensor.half, Tensor.double, lambda t: t.mT.contiguous().mT])
def test_saved_tensors_that_hooks_bring_back_otherwise_are_read_as_what_they_hold(backend: str, unpack: Any) -> None:
    x, scale, zero_point = torch.randn(6, 3), torch.tensor([0.25, 0.5, 1.0]), torch.tensor([0.0, 2.0, -1.0])
    inputs = [t.requires_grad_() for t in (x, scale, zero_point)]

    def gradients(hook: Any) -> tuple[Tensor, ...]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t if t.shape == x.shape else hook(t)):
            y = lfq.fake_quantize(*inputs, quant_min=-8, quant_max=7, axis=1)
            return torch.autograd.grad(y, inputs, torch.ones(6, 3))

    with on(backend):
        for one, other in zip(gradients(unpack), gradients(lambda t: t), strict=True):
            assert_bit_equal(one, other)
