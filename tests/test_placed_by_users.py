"""A quantizer that the user has placed is served by every tool as those are that `attach` puts on layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.placement.quantized_layer import quantized_layers
from lfq_lightning.records.trajectory import read_trajectory
from tests.runs import Net, every_epoch, fit, images, loader, qat

X = images().tensors[0][:8]


def placed(**options: Any) -> lfq.LearnableFakeQuantize:
    return lfq.LearnableFakeQuantize.from_spec(lfq.QuantSpec(bits=8, symmetric=False, **options))


class Residual(Net):
    """Quantizes the sum of two branches, and a weight that no layer holds."""

    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        self.sum = placed()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, width).view(1, -1, 1, 1))
        spec = lfq.QuantSpec(bits=8, granularity="per_channel", axis=1)
        self.gain_quantizer = lfq.LearnableFakeQuantize.from_spec(spec, width, weight=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = self.sum(x + torch.tanh(x) * self.gain_quantizer(self.gain))
        return self.head(torch.relu(self.second(x)).flatten(1))


OWN = ("sum", "gain_quantizer")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Residual, Any]:
    """A fit of three epochs with a checkpoint of each."""
    directory = tmp_path_factory.mktemp("run")
    model, _, callback = fit(directory, Residual(), callbacks=[every_epoch(directory)])
    return directory, model.eval(), callback


def test_they_go_through_the_phases_with_the_others_and_learn(run: tuple[Path, Residual, Any]) -> None:
    directory, model, _ = run
    for name in OWN:
        quantizer = lfq.quantizers(model)[name]
        assert (quantizer.phase, quantizer.site) == ("learn", None)
        assert not torch.equal(quantizer.scale, quantizer.scale_reference)
        assert 0 < quantizer.scale.max() < 0.5
    rows = read_trajectory(directory / "trajectory.csv")
    assert {row.phase for row in rows if row.quantizer == "sum"} == {"observe", "estimate", "learn"}
    assert all(row.saturation == row.saturation for row in rows if row.quantizer == "sum")


def test_their_checkpoints_resume_and_load_anywhere(run: tuple[Path, Residual, Any], tmp_path: Path) -> None:
    directory, model, _ = run
    again = lfq.load_from_checkpoint(Residual, directory / "epoch=2.ckpt").eval()
    assert torch.equal(again(X), model(X))
    resumed, _, _ = fit(tmp_path, Residual(), callbacks=[every_epoch(tmp_path)], ckpt_path=directory / "epoch=1.ckpt")
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    other = Residual()
    lfq.load_state_dict(other, model.state_dict())  # of the quantizers, only those that it has
    assert list(lfq.quantizers(other)) == list(OWN)
    assert torch.equal(other.sum.scale, model.sum.scale)
    plain = Net()
    lfq.load_state_dict(other, {**other.state_dict(), **plain.state_dict()})
    assert torch.equal(other.head.weight, plain.head.weight)


def test_a_state_from_before_they_were_placed_loads_and_keeps_them() -> None:
    model = Residual()
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(OWN)}
    with torch.no_grad():
        model.sum.scale.fill_(3.0)
    lfq.load_state_dict(model, state)
    assert model.sum.scale == 3.0


def test_detach_leaves_them_as_they_are(run: tuple[Path, Residual, Any]) -> None:
    model = copy.deepcopy(run[1])
    scale, keys = model.sum.scale.clone(), [key for key in Residual().state_dict() if "quantizer" not in key]
    lfq.detach(model)
    assert list(lfq.quantizers(model)) == list(OWN)
    assert [key for key in model.state_dict() if "quantizer" not in key] == keys
    assert model.sum.phase == "learn"
    assert torch.equal(model.sum.scale, scale)
    lfq.attach(model)
    assert not quantized_layers(model)["head"].weight_quantizer.learned


@pytest.mark.quick
def test_a_rule_for_one_says_that_its_settings_are_the_users() -> None:
    model = Residual()
    with pytest.raises(ValueError, match="sum is a quantizer that you have placed"):
        lfq.attach(model, rules=[lfq.Rule("sum", weight=4)])
    assert not quantized_layers(model)


@pytest.mark.quick
def test_a_layer_with_a_child_of_that_name_is_left_to_its_owner() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].input_quantizer = nn.Identity()
    placement = lfq.attach(model)
    assert [layer.name for layer in placement.layers] == ["0"]
    assert "input_quantizer" in dict(placement.left_in_float)["1"]
    assert isinstance(model[1].input_quantizer, nn.Identity)


# ---- tools ---------------------------------------------------------------------------------------------------------


def test_summary_sensitivity_and_report_speak_of_them(run: tuple[Path, Residual, Any], tmp_path: Path) -> None:
    directory, model, _ = run
    rows = {row.quantizer: row for row in lfq.summarize(model, X).rows}
    assert all(rows[name].sqnr > 20 for name in OWN)
    lost = lfq.sensitivity(model, [(X, torch.zeros(8).long())], nn.functional.cross_entropy, higher_is_better=False)
    assert {("sum",), ("gain_quantizer",)} <= {row.layers for row in lost.rows}
    page = lfq.write_report(directory / "epoch=2.ckpt", tmp_path / "page.html").read_text()
    assert all(f">{name}<" in page for name in OWN)


def test_frozen_copies_and_programs_compute_the_same(run: tuple[Path, Residual, Any]) -> None:
    model = run[1]
    frozen = lfq.freeze(model)
    assert not lfq.quantizers(frozen)
    assert torch.equal(frozen(X), model(X))
    program = lfq.export_pt2(model, X)
    torch.testing.assert_close(program.module()(X), model(X), rtol=1e-4, atol=1e-4)
    assert sum("quantize_per_tensor" in str(node.target) for node in program.graph.nodes) >= 8


def test_the_onnx_file_holds_them_and_agrees(run: tuple[Path, Residual, Any], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    parity = lfq.export_onnx(run[1], X, tmp_path / "x.onnx", batches=loader())
    shares = {row.quantizer: row for row in parity.quantizers}
    assert set(OWN) <= set(shares)
    assert all(shares[name].codes > 0 and shares[name].equal > 0.99 for name in OWN)
    assert parity.agrees


def test_the_optimizer_of_the_user_takes_them_too(tmp_path: Path) -> None:
    model, _, _ = fit(tmp_path, Residual(), callback=qat(optimizer="user"))
    for name in OWN:
        quantizer = lfq.quantizers(model)[name]
        assert not torch.equal(quantizer.scale, quantizer.scale_reference)
