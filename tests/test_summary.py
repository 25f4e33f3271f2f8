"""The table of quantizers: what it measures, and what it leaves as it was."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from torch import nn

import lfq_lightning as lfq
from tests.runs import Net, images

pytestmark = pytest.mark.quick

X = images().tensors[0]


@pytest.fixture
def model() -> Net:
    net = Net()
    lfq.attach(net, weight=4, activation=4)
    lfq.calibrate(net, [X])
    return net


def test_every_quantizer_is_described_and_inputs_are_measured_on_a_batch(model: Net) -> None:
    rows = {row.quantizer: row for row in lfq.summarize(model, X).rows}
    assert list(rows) == list(lfq.quantizers(model))
    assert all(row.sqnr > 10 and 0 <= row.saturation < 0.1 for row in rows.values())
    assert (rows["second.weight_quantizer"].bits, rows["head.input_quantizer"].bits) == (4, 8)
    assert rows["second.weight_quantizer"].kind == "symmetric per_channel(0)"
    unmeasured = {row.quantizer: row for row in lfq.summarize(model).rows}
    assert math.isnan(unmeasured["head.input_quantizer"].sqnr)
    assert unmeasured["second.weight_quantizer"] == rows["second.weight_quantizer"]


def test_the_ratio_is_signal_power_over_noise_power_in_decibels(model: Net) -> None:
    weight = model.second.weight.detach()
    noise = model.second.weight_quantizer.quantized(weight).detach() - weight
    expected = 10 * math.log10(float(weight.square().sum() / noise.square().sum()))
    row = next(r for r in lfq.summarize(model).rows if r.quantizer == "second.weight_quantizer")
    assert row.sqnr == pytest.approx(expected, rel=1e-4)


def test_saturation_is_the_share_that_is_clamped() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    lfq.attach(model, weight=8, activation=8)
    lfq.calibrate(model, [torch.linspace(0, 1, 8).view(2, 4)])
    x = torch.tensor([[0.5, 2.0, 3.0, 0.1]])
    row = next(r for r in lfq.summarize(model, x).rows if r.quantizer == "0.input_quantizer")
    assert row.saturation == 0.5


def test_weight_bytes_count_codes_and_scales() -> None:
    model = nn.Sequential(nn.Linear(10, 6), nn.Linear(6, 3))
    lfq.attach(model, weight=4, activation=None, rules=[lfq.Rule("*", weight=4)])
    summary = lfq.summarize(model)
    assert summary.float_weight_bytes == 4 * (60 + 18)
    assert summary.weight_bytes == 30 + 6 * 4 + 9 + 3 * 4


def test_nothing_of_the_model_changes(model: Net) -> None:
    model.norm.eval()
    before = {key: str(value) for key, value in model.state_dict().items()}
    lfq.summarize(model, (X, None))
    assert {key: str(value) for key, value in model.state_dict().items()} == before
    assert model.training
    assert not model.norm.training
    assert not any(q._forward_hooks for q in lfq.quantizers(model).values())


def test_it_prints_an_aligned_table_and_returns_plain_values(model: Net, capsys: pytest.CaptureFixture[str]) -> None:
    summary = lfq.summarize(model, X)
    printed = capsys.readouterr().out
    assert printed == f"{summary}\n"
    assert json.loads(json.dumps(summary.to_dicts()))[0]["quantizer"] == "first.weight_quantizer"
    assert repr(summary).startswith("<Summary of 6 quantizers")  # a notebook does not show the table twice
    lines = printed.splitlines()
    assert lines[0].split() == ["quantizer", "bits", "kind", "scale", "zero", "point", "saturation", "SQNR", "dB"]
    assert set(lines[1]) == {"-"}
    assert len(lines) == 3 + len(lfq.quantizers(model))
    assert lines[-1].startswith("weights of quantized layers: ")


def test_in_a_terminal_rich_draws_the_table(
    model: Net, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    lfq.summarize(model, X)
    printed = capsys.readouterr().out
    assert "─" in printed
    assert all(name in printed for name in lfq.quantizers(model))
    assert "symmetric per_channel(0)" in printed  # not taken for markup


def test_a_model_without_quantizers_is_refused() -> None:
    with pytest.raises(ValueError, match="no quantizers to describe"):
        lfq.summarize(nn.Linear(2, 2))
