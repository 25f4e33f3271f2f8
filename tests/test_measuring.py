"""A record of every quantizer: what it measures, and that it costs one copy to the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.placement.points import points
from lfq_lightning.records import measuring
from lfq_lightning.records.measuring import measure_weights, probed, snapshot
from tests.runs import Net, images

pytestmark = pytest.mark.quick


@pytest.fixture
def model() -> Net:
    net = Net()
    lfq.attach(net, weight=4, activation=4)
    lfq.calibrate(net, [images().tensors[0]])
    lfq.set_phase(net, "learn")
    return net


def test_rows_are_mean_smallest_and_largest_over_channels(model: Net) -> None:
    model(images().tensors[0]).sum().backward()
    rows = {row.quantizer: row for row in snapshot(points(model), {}).rows(7, 2)}
    assert list(rows) == list(lfq.quantizers(model))
    for name, quantizer in lfq.quantizers(model).items():
        row, scale = rows[name], quantizer.scale.detach()
        assert (row.step, row.epoch, row.phase) == (7, 2, "learn")
        assert row.scale_mean == pytest.approx(float(scale.mean()))
        assert (row.scale_min, row.scale_max) == (float(scale.min()), float(scale.max()))
        assert row.zero_point_mean == pytest.approx(float(quantizer.zero_point.detach().mean()))
        assert row.gradient_norm == pytest.approx(float(quantizer.scale.grad.norm()))
        assert row.saturation != row.saturation  # nothing was measured


def test_one_copy_to_the_host_makes_a_record(model: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measure_weights(points(model))
    copies: list[str] = []
    for name in ("item", "tolist", "__float__", "__bool__", "cpu"):
        original = getattr(Tensor, name)

        def counted(tensor: Tensor, *args: Any, name: str = name, original: Any = original) -> Any:
            copies.append(name)
            return original(tensor, *args)

        monkeypatch.setattr(Tensor, name, counted)
    snapshot(points(model), measured).rows(1, 0)
    assert copies == ["cpu"]


def test_weights_and_inputs_are_measured_exactly_where_they_are_small(model: Net) -> None:
    x = images().tensors[0]
    with probed(points(model)) as measured:
        model(x)
    assert set(measured) == {name for name in lfq.quantizers(model) if "input" in name}
    expected = lfq.quantizers(model)["first.input_quantizer"].saturation(x)
    assert torch.equal(measured["first.input_quantizer"][:2], expected)
    state = snapshot(points(model), measured | measure_weights(points(model)))
    assert all(0 <= share <= 1 for share in state.saturation)


@pytest.mark.parametrize("axis", [None, 1])
def test_of_large_inputs_an_even_choice_is_measured_and_every_element_is_checked(
    monkeypatch: pytest.MonkeyPatch, axis: int | None
) -> None:
    monkeypatch.setattr(measuring, "_ENOUGH", 64)
    spec = lfq.QuantSpec(bits=4, symmetric=False, granularity="per_tensor" if axis is None else "per_channel")
    model = nn.Sequential(nn.Linear(4, 2))
    lfq.attach(model, weight=None, activation=spec, rules=[lfq.Rule("0", weight=None)])
    lfq.calibrate(model, [torch.rand(64, 4)])
    lfq.set_phase(model, "freeze")
    x = torch.rand(64, 4)
    x[::4] += 100  # every fourth sample is clamped, and every fourth is chosen
    with probed(points(model)) as measured:
        model(x)
    assert measured["0.input_quantizer"][:2].tolist() == [1.0, 0.0]
    x[1, 1] = torch.inf  # in no chosen sample
    with probed(points(model)) as measured:
        model(x)
    assert measured["0.input_quantizer"][:2].tolist() == [1.0, 1.0]


def test_what_is_not_finite_in_one_of_several_uses_is_known(model: Net) -> None:
    x = images().tensors[0]
    with probed(points(model)) as measured:
        model(torch.where(x == x.max(), torch.inf, x))
        model(x)
    assert measured["first.input_quantizer"][1] == 1


@pytest.mark.parametrize("shape", [(0, 4), (0,)])
def test_an_empty_batch_has_no_saturation(shape: tuple[int, ...]) -> None:
    quantizer = lfq.LearnableFakeQuantize.from_spec(lfq.QuantSpec(bits=4))
    share, flag = quantizer.saturation(torch.empty(shape)).tolist()
    assert share != share
    assert flag == 0
