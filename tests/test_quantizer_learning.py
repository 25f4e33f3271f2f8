"""Scales and zero points learn in `learn` alone, with LSQ's factor, and stay legal."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning import LearnableFakeQuantize, QuantSpec
from lfq_lightning.observers import MinMaxObserver
from lfq_lightning.schedule import PHASES
from tests.assertions import assert_bit_equal

pytestmark = pytest.mark.quick


def affine(phase: str = "learn", **arguments: Any) -> LearnableFakeQuantize:
    quantizer = LearnableFakeQuantize(MinMaxObserver(0, 15), 0, 15, 0.2, 5.0, **arguments)
    quantizer.phase = phase
    return quantizer


def from_spec(channels: int | None = None, weight: bool = False, **fields: Any) -> LearnableFakeQuantize:
    quantizer = LearnableFakeQuantize.from_spec(QuantSpec(**fields), channels, weight=weight)
    return quantizer.enable_param_learning()


def scale_gradient(quantizer: LearnableFakeQuantize, x: Tensor, loss: Any = torch.sum) -> Tensor:
    (gradient,) = torch.autograd.grad(loss(quantizer(x)), quantizer.scale)
    return gradient


@pytest.mark.parametrize("factor", [1.0, 0.125])
def test_learning_gives_the_gradients_of_the_operation(factor: float) -> None:
    quantizer, x = affine(grad_factor=factor), torch.linspace(-3, 4, 99)
    quantizer(x).sum().backward()
    scale, zero_point = torch.tensor([0.2], requires_grad=True), torch.tensor([5.0], requires_grad=True)
    lfq.fake_quantize(x, scale, zero_point, quant_min=0, quant_max=15, grad_factor=factor).sum().backward()
    for found, expected in ((quantizer.scale.grad, scale.grad), (quantizer.zero_point.grad, zero_point.grad)):
        assert found is not None
        assert expected is not None
        assert expected != 0
        assert_bit_equal(found, expected)


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "learn"])
def test_outside_learn_the_qparams_are_in_the_graph_and_get_no_gradient(phase: str) -> None:
    quantizer = affine(phase)
    x = torch.linspace(-3, 4, 99, requires_grad=True)
    y = quantizer(x)
    assert y.requires_grad
    y.sum().backward()
    assert x.grad is not None
    assert quantizer.scale.grad is None
    assert quantizer.zero_point.grad is None
    assert quantizer.scale.requires_grad


def test_a_caller_can_withhold_the_gradients_of_the_qparams() -> None:
    quantizer = affine()
    x = torch.linspace(-3, 4, 99, requires_grad=True)
    quantizer(x, learn=False).sum().backward()
    assert x.grad is not None
    assert quantizer.scale.grad is None


def test_a_symmetric_zero_point_is_a_constant_buffer_under_the_same_key() -> None:
    quantizer = LearnableFakeQuantize(MinMaxObserver(-8, 7, symmetric=True), -8, 7)
    quantizer(torch.randn(50))
    quantizer.enable_param_learning()
    quantizer(torch.randn(50) * 2).sum().backward()
    assert dict(quantizer.named_buffers())["zero_point"].tolist() == [0.0]
    assert [name for name, _ in quantizer.named_parameters()] == ["scale"]
    assert quantizer.zero_point.grad is None
    assert set(quantizer.state_dict()) == set(affine().state_dict())


@pytest.mark.parametrize("phase", PHASES)
def test_a_quantizer_can_be_used_twice_in_one_forward(phase: str) -> None:
    quantizer = affine(phase)
    first, second = torch.linspace(0, 3, 31, requires_grad=True), torch.linspace(-2, 6, 31, requires_grad=True)
    (quantizer(first) + quantizer(second)).sum().backward()
    assert first.grad is not None
    assert second.grad is not None
    if phase == "learn":
        separate = [scale_gradient(affine(), x.detach()) for x in (first, second)]
        torch.testing.assert_close(quantizer.scale.grad, separate[0] + separate[1])


# ---- LSQ's gradient factor: 1 / sqrt(N * max(|quant_min|, |quant_max|)) ---------------------------------------------


@pytest.mark.parametrize(
    ("fields", "weight", "channels", "shape", "elements"),
    [
        ({"symmetric": False}, False, None, (4, 3, 5, 5), 75),
        ({"symmetric": False}, False, None, (4, 6), 6),
        ({"symmetric": False}, False, None, (6,), 6),
        ({"symmetric": False, "granularity": "per_channel"}, False, 3, (4, 3, 5, 5), 25),
        ({"granularity": "per_channel"}, True, 6, (6, 3, 5, 5), 75),
        ({}, True, None, (6, 3, 5, 5), 450),
        ({"granularity": "per_group", "group_size": 4}, True, 12, (6, 8), 4),
    ],
    ids=str,
)
def test_the_lsq_factor_counts_the_elements_that_share_a_scale_and_not_the_batch(
    fields: dict[str, Any], weight: bool, channels: int | None, shape: tuple[int, ...], elements: int
) -> None:
    x = torch.randn(shape) * 40
    lsq = from_spec(channels, weight, **fields)
    plain = from_spec(channels, weight, grad_factor=1.0, **fields)
    largest = max(abs(lsq.quant_min), abs(lsq.quant_max))
    expected = scale_gradient(plain, x) / math.sqrt(elements * largest)
    torch.testing.assert_close(scale_gradient(lsq, x), expected)


@pytest.mark.parametrize("channels", [None, 3])
def test_doubling_the_batch_leaves_the_gradient_of_a_mean_loss_alone(channels: int | None) -> None:
    granularity = "per_tensor" if channels is None else "per_channel"
    quantizer = from_spec(channels, symmetric=False, granularity=granularity)
    x = torch.randn(4, 3, 5) * 40
    once, twice = scale_gradient(quantizer, x, torch.mean), scale_gradient(quantizer, torch.cat((x, x)), torch.mean)
    torch.testing.assert_close(once, twice)


def test_the_saturation_rule_of_the_specification_is_used() -> None:
    x = torch.tensor([-0.49, 14.7, 15.2])
    found = []
    for saturation in ("lsq", "exclusive", "inclusive"):
        quantizer = from_spec(bits=4, symmetric=False, saturation=saturation, grad_factor=1.0)
        found.append(scale_gradient(quantizer, x).item())
    assert found == pytest.approx([0 + 0.3 + 15, 0.49 + 0.3 - 0.2, 0 + 15 + 15], abs=1e-5)


# ---- staying legal --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "projected"), [(0.3, 0.3), (-1.0, 0.2), (0.0, 0.2), (math.nan, 0.2), (math.inf, 0.2), (1e-20, 2.0**-23)]
)
def test_projection_makes_an_illegal_scale_the_one_that_learning_began_with(scale: float, projected: float) -> None:
    quantizer = affine()
    quantizer.begin_learning()
    with torch.no_grad():
        quantizer.scale.fill_(scale)
    quantizer.project_()
    assert quantizer.scale.item() == pytest.approx(projected)


@pytest.mark.parametrize(("zero_point", "projected"), [(-3.0, 0.0), (4.4, 4.4), (99.0, 15.0), (math.nan, 0.0)])
def test_projection_brings_a_zero_point_into_range(zero_point: float, projected: float) -> None:
    quantizer = affine()
    with torch.no_grad():
        quantizer.zero_point.fill_(zero_point)
    quantizer.project_()
    assert quantizer.zero_point.item() == pytest.approx(projected)


def test_a_scale_driven_negative_still_gets_a_gradient_and_recovers() -> None:
    quantizer = affine()
    quantizer.begin_learning()
    x = torch.rand(200) * 3 - 1
    with torch.no_grad():
        quantizer.scale.fill_(-0.5)
    assert scale_gradient(quantizer, x, lambda y: ((y - x) ** 2).sum()) < 0  # a larger scale is better
    quantizer.project_()
    assert float((quantizer(x) - x).detach().abs().max()) <= 0.1 + 1e-6


def test_learning_begins_once_so_that_a_second_fit_continues() -> None:
    quantizer = affine()
    quantizer.begin_learning()
    assert quantizer.scale_reference.item() == pytest.approx(0.2)
    with torch.no_grad():
        quantizer.scale.fill_(0.9)
    quantizer.begin_learning()
    assert quantizer.scale_reference.item() == pytest.approx(0.2)
    quantizer.forget()
    quantizer.begin_learning()
    assert quantizer.scale_reference.item() == pytest.approx(0.9)


def test_learning_lowers_the_error_of_a_bad_first_range() -> None:
    quantizer = LearnableFakeQuantize(MinMaxObserver(0, 15), 0, 15, scale=1.0, zero_point=0.0, grad_factor=1.0)
    quantizer.enable_param_learning()
    x = nn.functional.silu(torch.linspace(-4, 4, 1000))
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    before = copy.deepcopy(quantizer)
    for _ in range(300):
        optimizer.zero_grad()
        ((quantizer(x) - x) ** 2).mean().backward()
        optimizer.step()
        quantizer.project_()
    errors = [float(((q(x) - x) ** 2).mean().detach()) for q in (before, quantizer)]
    assert errors[1] < 0.15 * errors[0]


@pytest.mark.parametrize(
    ("layer", "shape", "features"),
    [
        (nn.Linear(6, 2), (4, 6), 6),
        (nn.Linear(6, 2), (6,), 6),
        (nn.Linear(6, 2), (5, 4, 6), 6),  # (batch, time, features) or (time, batch, features)
        (nn.Conv1d(3, 2, 1), (4, 3, 5), 15),
        (nn.Conv1d(3, 2, 1), (3, 5), 15),  # one sample
        (nn.Conv2d(3, 2, 1), (4, 3, 5, 7), 105),
        (nn.Conv2d(3, 2, 1), (3, 5, 7), 105),
        (nn.ConvTranspose2d(3, 2, 1), (3, 5, 7), 105),
    ],
    ids=str,
)
def test_the_lsq_factor_of_an_input_counts_the_features_of_its_layer(
    layer: nn.Module, shape: tuple[int, ...], features: int
) -> None:
    model, x = nn.Sequential(layer), torch.rand(shape) * 3
    lfq.attach(model, weight=None, activation=8)
    lfq.calibrate(model, [x])
    quantizer = layer.input_quantizer
    found = {}
    for quantizer.grad_factor in ("lsq", 1.0):
        quantizer.phase = "learn"
        found[quantizer.grad_factor] = scale_gradient(quantizer, x)
    torch.testing.assert_close(found["lsq"], found[1.0] / math.sqrt(features * 255))


def test_a_quantizer_placed_by_hand_is_told_which_dimensions_are_features() -> None:
    x = torch.randn(7, 4, 6) * 40
    plain = from_spec(symmetric=False, grad_factor=1.0)
    for dims, elements in ((None, 24), (1, 6), (2, 24), (3, 168)):
        lsq = from_spec(symmetric=False)
        lsq.feature_dims = dims
        torch.testing.assert_close(scale_gradient(lsq, x), scale_gradient(plain, x) / math.sqrt(elements * 255))
