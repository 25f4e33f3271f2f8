"""Oscillation: measured step by step, dampened through gradients, frozen on the grid."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

import lfq_lightning as lfq
from lfq_lightning.techniques.oscillation import (
    Oscillation,
    annealed,
    dampening_gradient,
    element_scales,
    integer_weights,
)
from tests.assertions import assert_bit_equal
from tests.runs import BATCHES, Net, StatefulLoader, every_epoch, fit, qat
from tests.test_resume import assert_same_run

SPECS = {
    "tensor": (lfq.QuantSpec(bits=2), None),
    "channel": (lfq.QuantSpec(bits=3, granularity="per_channel", axis=0), 4),
    "group": (lfq.QuantSpec(bits=3, granularity="per_group", group_size=2), 12),
}


def quantizer_of(kind: str) -> lfq.LearnableFakeQuantize:
    spec, channels = SPECS[kind]
    quantizer = lfq.LearnableFakeQuantize.from_spec(spec, channels, weight=True)
    quantizer.scale.data.uniform_(0.1, 0.5)
    return quantizer


@pytest.mark.quick
@pytest.mark.parametrize("kind", SPECS)
def test_integer_weights_times_their_scales_are_the_quantized_weights(kind: str) -> None:
    quantizer, weight = quantizer_of(kind), torch.randn(4, 5, 3, 3)
    integers = integer_weights(weight, quantizer)
    assert_bit_equal(integers, integers.round())
    assert set(integers.unique().tolist()) <= set(range(quantizer.quant_min, quantizer.quant_max + 1))
    torch.testing.assert_close(integers * element_scales(weight, quantizer), quantizer.quantized(weight).detach())


@pytest.mark.quick
@pytest.mark.parametrize("kind", SPECS)
def test_the_dampening_gradient_is_that_of_the_papers_loss(kind: str) -> None:
    quantizer, weight = quantizer_of(kind), torch.randn(4, 5, 3, 3, requires_grad=True)
    scales = element_scales(weight, quantizer)
    clipped = torch.clamp(weight, scales * quantizer.quant_min, scales * quantizer.quant_max)
    (0.3 * (quantizer.quantized(weight).detach() - clipped).square().sum()).backward()
    torch.testing.assert_close(dampening_gradient(weight, quantizer, 0.3), weight.grad)


def by_the_paper(values: list[int], momentum: float) -> tuple[float, float]:
    """Frequency and average of one weight's integer values, in plain Python."""
    frequency, average, last = 0.0, float(values[0]), 0
    for before, now in pairwise(values):
        change = (now > before) - (now < before)
        frequency = momentum * (change * last < 0) + (1 - momentum) * frequency
        average = momentum * now + (1 - momentum) * average
        last = change or last
    return frequency, average


@pytest.mark.quick
def test_frequency_and_average_follow_the_paper_for_each_weight() -> None:
    values = torch.randint(-2, 2, (40, 6)).float()
    known = Oscillation.begin(values[0])
    for integers in values[1:]:
        known.follow(integers, 0.1)
    for weight in range(6):
        frequency, average = by_the_paper([int(v) for v in values[:, weight]], 0.1)
        assert known.frequency[weight].item() == pytest.approx(frequency, rel=1e-4)
        assert known.average[weight].item() == pytest.approx(average, rel=1e-4, abs=1e-5)


@pytest.mark.quick
def test_a_weight_that_moves_one_way_or_rests_does_not_oscillate() -> None:
    known = Oscillation.begin(torch.tensor([0.0, 0.0, 0.0]))
    for values in ([1.0, 0.0, 1.0], [2.0, 0.0, 1.0], [3.0, 0.0, 0.0]):  # the last turns back after a rest
        known.follow(torch.tensor(values), 0.5)
    assert (known.frequency > 0).tolist() == [False, False, True]
    known.freeze(0.4)
    assert known.frozen.tolist() == [False, False, True]
    assert known.integers[2] == known.average[2].round()


@pytest.mark.quick
def test_annealing_is_a_cosine_between_the_two_values() -> None:
    assert [annealed((0.0, 0.1), p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.0, 0.05, 0.1])
    assert annealed(0.3, 0.7) == 0.3


class Watch(L.Callback):
    """After each step: are frozen weights on the grid, at the integers they were frozen to?"""

    def __init__(self, control: lfq.OscillationControl) -> None:
        self.control, self.frozen, self.held = control, 0, dict[str, tuple[Tensor, Tensor]]()
        self.scales: set[float] = set()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        for name, known in self.control._known.items():
            layer = pl_module.get_submodule(name)
            found = integer_weights(layer.weight, layer.weight_quantizer)
            assert torch.equal(found[known.frozen], known.integers[known.frozen])
            if name in self.held:
                mask, integers = self.held[name]
                assert known.frozen[mask].all()
                assert torch.equal(found[mask], integers[mask])
            self.held[name] = known.frozen.clone(), found
            self.frozen = max(self.frozen, int(known.frozen.sum()))
        self.scales.add(float(pl_module.second.weight_quantizer.scale.detach()[0]))


@pytest.mark.quick
def test_frozen_weights_keep_their_integers_while_scales_go_on_learning(tmp_path: Path) -> None:
    control = lfq.OscillationControl(freeze=(0.03, 0.005))
    watch = Watch(control)
    _, made, _ = fit(tmp_path, callback=qat(weight=2), callbacks=[control, watch], max_epochs=5)
    assert watch.frozen > 0
    assert len(watch.scales) > BATCHES
    assert 0 < made.callback_metrics["lfq/frozen"] < 1


def test_dampening_pulls_weights_to_their_grid_and_measuring_changes_nothing(tmp_path: Path) -> None:
    distances, runs = [], []
    for name, more in (
        ("none", []),
        ("measured", [lfq.OscillationControl()]),
        ("dampened", [lfq.OscillationControl(dampen=5.0)]),
    ):
        runs.append(fit(tmp_path / name, callbacks=more, max_epochs=5))
        layer = runs[-1][0].second
        away = layer.weight - layer.weight_quantizer.quantized(layer.weight)
        distances.append(away.abs().mean().item())
    assert distances[2] < 0.7 * distances[0]
    assert_same_run(runs[1], runs[0])
    assert "lfq/oscillating" in runs[1][1].callback_metrics


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_gradient_scaler_dampening_is_as_strong_as_without(tmp_path: Path, fused: bool) -> None:
    class Still(Net):
        """Its loss moves nothing, so that dampening alone does; a fused optimizer unscales gradients in its step."""

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * 1e-6

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05, fused=fused)

    def moved(scale: float) -> Tensor:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
        torch.manual_seed(3)
        model = Still()
        start = model.second.weight.detach().clone()
        fit(tmp_path, model, callbacks=[lfq.OscillationControl(dampen=1.0)], plugins=plugin, limit_val_batches=0)
        return model.second.weight.detach() - start

    plain, scaled = moved(1.0), moved(1024.0)
    assert plain.abs().max() > 3e-3
    same = torch.isclose(scaled, plain, rtol=1e-2, atol=1e-4)
    assert same.float().mean() > 0.95  # a weight between two codes may go to either


@pytest.mark.parametrize("accumulate", [1, 4])
def test_steps_are_followed_once_each(tmp_path: Path, accumulate: int) -> None:
    control = lfq.OscillationControl(momentum=0.5)
    seen: list[Tensor] = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Net, *_: Any) -> None:
            if "second" in control._known and (trainer.fit_loop.epoch_loop.batch_idx + 1) % accumulate == 0:
                layer = pl_module.second
                seen.append(integer_weights(layer.weight, layer.weight_quantizer))
                assert torch.equal(control._known["second"].integers, seen[-1])

    fit(tmp_path, callbacks=[control, Note()], max_epochs=4, accumulate_grad_batches=accumulate)
    assert control.state_dict()["began"] == 2 * BATCHES // accumulate
    assert len(seen) == 2 * BATCHES // accumulate
    values = torch.stack(seen).flatten(1)
    expected = [by_the_paper([int(v) for v in column], 0.5) for column in values.T]
    known = control._known["second"]
    assert known.frequency.flatten().tolist() == pytest.approx([frequency for frequency, _ in expected])
    assert known.average.flatten().tolist() == pytest.approx([average for _, average in expected])


@pytest.mark.parametrize("options", [{"freeze": (0.03, 0.005)}, {"dampen": (0.0, 0.1)}])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, options: dict[str, Any]) -> None:
    def run(directory: Path, **more: Any) -> tuple[Any, ...]:
        control = lfq.OscillationControl(**options)
        fitted = fit(
            directory,
            callback=qat(weight=2, batch_norm="keep"),  # whose loader has a state
            callbacks=[control, every_epoch(tmp_path)],
            max_epochs=6,
            data=StatefulLoader(),
            **more,
        )
        return *fitted, control

    whole = run(tmp_path)
    for epoch in (1, 2, 4):
        part = run(tmp_path / str(epoch), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert_same_run(part, whole)
        for name, known in whole[3].state_dict()["known"].items():
            for key, tensor in known.items():
                assert torch.equal(part[3].state_dict()["known"][name][key], tensor), (name, key)


def test_another_model_is_not_held_at_the_first_ones_integers(tmp_path: Path) -> None:
    def states(control: lfq.OscillationControl, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = Net()
        fit(tmp_path, model, callback=qat(weight=2), callbacks=[control])
        return {**model.state_dict(), **{n: known["frozen"] for n, known in control.state_dict()["known"].items()}}

    used = lfq.OscillationControl(freeze=0.0, momentum=0.5)
    states(used, 1)
    for again in (used, pickle.loads(pickle.dumps(used))):
        found, expected = states(again, 2), states(lfq.OscillationControl(freeze=0.0, momentum=0.5), 2)
        assert all(torch.equal(found[key], v) for key, v in expected.items() if isinstance(v, Tensor))


def test_other_bits_are_another_grid(tmp_path: Path) -> None:
    control = lfq.OscillationControl(freeze=0.02)
    annealing = lfq.BitAnnealing({0: 4, 4: 2})
    fit(tmp_path, callback=qat(weight=2, activation=2), callbacks=[annealing, control, Bounds(control)], max_epochs=6)


class Bounds(L.Callback):
    def __init__(self, control: lfq.OscillationControl) -> None:
        self.control = control

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Net, *_: Any) -> None:
        for name, known in self.control._known.items():
            quantizer = pl_module.get_submodule(name).weight_quantizer
            assert known.integers.min() >= quantizer.quant_min
            assert known.integers.max() <= quantizer.quant_max


@pytest.mark.parametrize(
    "options", [{"dampen": -1.0}, {"freeze": (0.1, 0.2, 0.3)}, {"momentum": 0.0}, {"freeze": float("nan")}]
)
def test_wrong_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        lfq.OscillationControl(**options)


def test_the_wrong_order_and_a_run_without_end_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"QuantizationAwareTraining\(...\), OscillationControl"):
        fit(tmp_path, callback=lfq.OscillationControl(), callbacks=[qat()])
    with pytest.raises(ValueError, match="must have an end"):
        fit(tmp_path, callbacks=[lfq.OscillationControl(dampen=(0.0, 0.1))], max_epochs=-1, max_time="00:00:00:02")
