"""Weights of few bits take longer steps than their optimizer gives, and nothing else moves otherwise than it would."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim import LBFGS, SGD, Adam, AdamW

import lfq_lightning as lfq
from lfq_lightning.training.stepping.weights import Travel, WeightSteps
from tests.runs import BATCHES, Net, every_epoch, fit, qat
from tests.test_precision import scaled

pytestmark = pytest.mark.quick

FIRST = 2  # the first optimizer step with quantized weights, of three
SCHEDULE = lfq.PhaseSchedule(0, 1, FIRST, unit="step")
WEIGHTS = ("first.weight", "second.weight", "head.weight")


class Watched(Net):
    """The net with any optimizer, stepped automatically or by hand; keeps what each step adds to each parameter."""

    def __init__(self, make: Callable[..., Any] = SGD, by_hand: bool = False) -> None:
        super().__init__()
        self.make = make
        self.steps: list[dict[str, Tensor]] = []
        self.automatic_optimization = not by_hand

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        return None

    def on_train_batch_start(self, *_: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in self.named_parameters()}

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append({name: p.detach() - self.before[name] for name, p in self.named_parameters()})


def low_bits(weight: Any = 2, **options: Any) -> lfq.QuantizationAwareTraining:
    """Weights of so many bits, with the factors that are known beforehand, or of a specification."""
    weight = spec(weight, lr_factor="bits") if isinstance(weight, int) else weight
    rules = [lfq.Rule("*", weight=weight)]  # the ends too
    return qat(weight=8, activation=None, rules=rules, **{"schedule": SCHEDULE, **options})


def spec(bits: int = 2, **fields: Any) -> lfq.QuantSpec:
    return lfq.QuantSpec(bits=bits, granularity="per_channel", **fields)


def steps(directory: Path, weight: Any, model: Watched | None = None, **options: Any) -> list[dict[str, Tensor]]:
    """What the first steps of a run add to each parameter."""
    torch.manual_seed(3)
    model = Watched() if model is None else model
    fit(directory, model, callback=low_bits(weight), max_steps=FIRST + 1, max_epochs=1, limit_val_batches=0, **options)
    return model.steps


def compared(directory: Path, make: Callable[[], Watched], weight: Any, **options: Any) -> list[dict[str, float]]:
    """By how much each parameter moves further than with a factor of 1, in each step."""
    torch.manual_seed(3)
    plain = steps(directory / "plain", spec(lr_factor=1), make(), **options)
    torch.manual_seed(3)
    found = steps(directory / "found", weight, make(), **options)
    return [
        {n: float((a[n] * b[n]).sum() / (b[n] * b[n]).sum()) for n in b if b[n].any()}
        for a, b in zip(found, plain, strict=True)
    ]


OPTIMIZERS = {
    "SGD": SGD,
    "momentum and decay": partial(SGD, lr=0.01, momentum=0.9, weight_decay=0.1),
    "Adam": partial(Adam, lr=1e-3),
    "fused AdamW": partial(AdamW, lr=1e-3, weight_decay=0.1, fused=True),
    "LBFGS": partial(LBFGS, lr=0.01, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_of_two_bits_take_eight_times_the_step_of_any_optimizer_once_quantized(
    tmp_path: Path, name: str
) -> None:
    *earlier, last = compared(tmp_path, partial(Watched, OPTIMIZERS[name]), 2)
    # Estimates of the first step are made after it: the second is the first that is quantized.
    assert earlier[0] == pytest.approx(dict.fromkeys(earlier[0], 1.0))
    assert earlier[1] == {n: pytest.approx(8.0 if n in WEIGHTS else 1.0, rel=1e-3) for n in earlier[1]}
    assert set(WEIGHTS) < set(last)


def test_steps_by_hand_are_lengthened_too(tmp_path: Path) -> None:
    found = compared(tmp_path, partial(Watched, by_hand=True), 2)[1]
    assert {n: found[n] for n in WEIGHTS} == pytest.approx(dict.fromkeys(WEIGHTS, 8.0), rel=1e-3)


def test_each_step_without_lightning_is_lengthened_too() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    lfq.attach(model, weight=spec(), activation=None, rules=[lfq.Rule("*", weight=spec(lr_factor="bits"))])
    lfq.calibrate(model, [torch.randn(8, 4)])
    lfq.set_phase(model, "learn")
    optimizer, owner = SGD(model.parameters(), lr=0.1), WeightSteps()
    owner.follow(model, [optimizer])
    own = list(model[0].parameters(recurse=False))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        before = [parameter.detach().clone() for parameter in own]
        optimizer.step()
        for parameter, was, factor in zip(own, before, (8.0, 1.0), strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.detach() - was, -0.1 * factor * parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("weight", "factor"),
    [(spec(lr_factor=3), 3.0), (spec(lr_factor=0.5), 0.5), (spec(quant_min=-1, quant_max=1, lr_factor="bits"), 8.0)],
    ids=["3", "0.5", "ternary"],
)
def test_the_factor_is_a_setting(tmp_path: Path, weight: lfq.QuantSpec, factor: float) -> None:
    torch.manual_seed(3)
    plain = steps(tmp_path / "plain", weight.replace(lr_factor=1), Watched())[1]
    torch.manual_seed(3)
    found = steps(tmp_path / "found", weight, Watched())[1]
    for name in WEIGHTS:
        torch.testing.assert_close(found[name], factor * plain[name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("bits", "factor"), [(2, 8.0), (3, 4.0), (4, 1.0), (8, 1.0), (16, 1.0)])
def test_below_four_bits_each_bit_less_doubles_the_step(bits: int, factor: float) -> None:
    assert spec(bits, lr_factor="bits").lr_factor_at(bits) == factor
    assert spec(bits).lr_factor_at(bits) == (None if bits < 4 else 1.0)


def test_optimizers_of_four_bits_and_more_are_left_alone(tmp_path: Path) -> None:
    class Looks(Watched):
        def on_train_batch_start(self, *_: Any) -> None:
            super().on_train_batch_start()
            self.hooked = bool(self.optimizers().optimizer._optimizer_step_pre_hooks)

    hooked = {}
    for bits in (4, 3):
        torch.manual_seed(3)
        model = Looks()
        steps(tmp_path, bits, model)
        hooked[bits] = model.hooked
        assert not model.optimizers().optimizer._optimizer_step_pre_hooks
    assert hooked == {4: False, 3: True}


def test_steps_grow_as_bits_are_annealed(tmp_path: Path) -> None:
    last = []
    for factor in (1, "bits"):
        torch.manual_seed(3)
        model = Watched()
        callbacks = [lfq.BitAnnealing({0: 8, 1: 2})]
        options = {"max_epochs": 2, "max_steps": BATCHES + 1, "limit_val_batches": 0}
        fit(tmp_path, model, callback=low_bits(spec(lr_factor=factor)), callbacks=callbacks, **options)
        last.append([step["second.weight"] for step in model.steps])
    (*plain, plain_at_2), (*found, found_at_2) = last
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))  # an epoch of 8 bits
    torch.testing.assert_close(found_at_2, 8 * plain_at_2, rtol=1e-3, atol=1e-6)


def test_a_tied_weight_is_lengthened_once(tmp_path: Path) -> None:
    class Tied(Watched):
        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Conv2d(4, 4, 3, padding=1)
            self.fourth = nn.Conv2d(4, 4, 3, padding=1)
            self.fourth.weight = self.third.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.fourth(self.third(torch.relu(self.norm(self.first(x)))))
            return self.head(torch.relu(self.second(x)).flatten(1))

    assert compared(tmp_path, Tied, 2)[1]["third.weight"] == pytest.approx(8.0, rel=1e-3)


def test_a_frozen_weight_stays_and_each_optimizer_lengthens_its_own(tmp_path: Path) -> None:
    class TwoOptimizers(Watched):
        """One layer is frozen, and each of the others has an optimizer of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.first.weight.requires_grad_(False)

        def configure_optimizers(self) -> Any:
            return SGD(self.second.parameters(), lr=0.01), SGD(self.head.parameters(), lr=0.01)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.manual_backward(Net.training_step(self, batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()
            for optimizer in self.optimizers():
                optimizer.zero_grad()

    found = {n: factor for n, factor in compared(tmp_path, TwoOptimizers, 2)[1].items() if "quantizer" not in n}
    expected = {"second.weight": 8.0, "second.bias": 1.0, "head.weight": 8.0, "head.bias": 1.0}  # nothing of the first
    assert found == pytest.approx(expected, rel=1e-3)


def test_a_step_that_the_scaler_skips_moves_nothing_and_the_next_is_whole(tmp_path: Path) -> None:
    class Overflows(Watched):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx == 1 else loss

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:  # what others do to weights between two steps is no step
                self.second.weight.data.add_(0.01)
            super().on_train_batch_start()

    skipped, whole = compared(tmp_path, Overflows, 2, **scaled())[1:3]
    assert not skipped
    assert whole["second.weight"] == pytest.approx(8.0, rel=1e-3)


def test_a_run_of_two_bits_resumes_bit_equal(tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        schedule = lfq.PhaseSchedule(0, 1, 2)
        return {"callback": low_bits(schedule=schedule), "callbacks": [every_epoch(tmp_path)], "limit_val_batches": 0}

    whole, _, _ = fit(tmp_path / "whole", **options(), max_epochs=4)
    resumed, _, _ = fit(tmp_path / "resumed", **options(), max_epochs=4, ckpt_path=tmp_path / "epoch=2.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_run_says_the_factor_that_it_takes_where_codes_are_fewer_than_bits_hold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bits: int
) -> None:
    ternary = spec(bits, quant_min=-1, quant_max=1, lr_factor="bits")
    torch.manual_seed(3)
    plain = steps(tmp_path / "plain", ternary.replace(lr_factor=1), Watched())[1]["second.weight"]
    torch.manual_seed(3)
    with caplog.at_level("INFO"):
        found = steps(tmp_path / "found", ternary, Watched())[1]["second.weight"]
    assert "Weights of 2 bits move 8 times as far a step" in caplog.text
    torch.testing.assert_close(found, 8 * plain, rtol=1e-3, atol=1e-7)


def test_a_pruned_weight_takes_the_longer_steps_too(tmp_path: Path) -> None:
    class Pruned(Watched):
        def __init__(self) -> None:
            super().__init__()
            prune.l1_unstructured(self.second, "weight", amount=0.5)

    found = compared(tmp_path, Pruned, 2)[1]
    assert found["second.weight_orig"] == pytest.approx(8.0, rel=1e-3)
    assert found["head.weight"] == pytest.approx(8.0, rel=1e-3)


def test_the_run_says_that_steps_are_longer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        steps(tmp_path, 2)
    assert "Weights of 2 bits move 8 times as far a step (`QuantSpec.lr_factor`)." in caplog.text


def test_an_input_has_no_steps_to_lengthen() -> None:
    activation = lfq.QuantSpec(bits=2, symmetric=False, lr_factor=2.0)
    with pytest.raises(ValueError, match="`lr_factor` goes with a weight"):
        lfq.QuantizationAwareTraining(weight=2, activation=activation)
    with pytest.raises(ValueError, match="`lr_factor` goes with a weight"):
        lfq.attach(Net(), rules=[lfq.Rule("*", activation=activation)])


# ---- lr_factor="path": the run is looked at --------------------------------------------------------------------------

PATHS = r"Weights of (\d) bits go (\S+) quantization steps on the rest of this run at their learning rate: (.*)"


def at_rate(directory: Path, rate: float, weight: lfq.QuantSpec | None = None, **options: Any) -> Any:
    """A run of 48 steps of Adam at a constant rate."""

    class Constant(Net):
        on_train_batch_start, on_train_batch_end = Watched.on_train_batch_start, Watched.on_train_batch_end

        def __init__(self) -> None:
            super().__init__()
            self.steps: list[dict[str, Tensor]] = []

        def configure_optimizers(self) -> Any:
            return Adam(self.parameters(), lr=rate)

    torch.manual_seed(3)
    settings: dict[str, Any] = {"max_epochs": 6, "limit_val_batches": 0} | options
    return fit(directory, Constant(), callback=low_bits(weight or spec()), **settings)[0]


def crossing(directory: Path, rate: float, caplog: pytest.LogCaptureFixture, **options: Any) -> tuple[Any, float]:
    """The run, and the path that it told."""
    caplog.clear()
    with caplog.at_level("INFO"):
        model = at_rate(directory, rate, **options)
    told = re.findall(PATHS, caplog.text)
    return model, float(told[0][1]) if told else 0.0


def test_a_run_that_goes_too_short_a_way_takes_longer_steps_from_when_it_is_known_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = at_rate(tmp_path, 0.01, spec(lr_factor=1))
    model, path = crossing(tmp_path, 0.01, caplog)
    # A twentieth of 47 steps is let pass and as much measured, from the first that is quantized on.
    for index in range(1, 5):
        assert all(torch.equal(model.steps[index][n], plain.steps[index][n]) for n in WEIGHTS)
    assert 1 < path < 4
    [[_, _, rest]] = re.findall(PATHS, caplog.text)
    assert rest == f"they move {4 / path:.2g} times as far a step (`QuantSpec.lr_factor`)."
    ratios = [float(model.steps[5][n].norm() / plain.steps[5][n].norm()) for n in WEIGHTS]
    assert ratios == pytest.approx([4 / path] * 3, rel=0.05)


@pytest.mark.filterwarnings("ignore:Quantizers collapsed")  # at such a rate
def test_a_run_that_goes_far_enough_keeps_its_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, path = crossing(tmp_path, 0.08, caplog)
    assert path > 4
    assert "their steps stay as they are." in caplog.text
    plain = at_rate(tmp_path, 0.08, spec(lr_factor=1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_run_in_which_hardly_a_code_changes_takes_eight_times_its_steps_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, path = crossing(tmp_path, 1e-4, caplog)
    assert 0 < path < 0.1
    assert "they move 8 times as far a step" in caplog.text
    assert "few codes will change: raise the learning rate" in caplog.text


def test_the_first_steps_of_an_optimizer_which_differ_from_all_that_follow_are_let_pass() -> None:
    travel, measured = Travel(), []
    for moved in (9.0, 9.0, 0.5, 1.5):  # 40 are left: two pass, and two are measured
        measured.append(travel.begin(40.0))
        if measured[-1]:
            travel.measure(torch.full((5,), moved), torch.tensor([2.0]))
        last = travel.end()
    assert measured == [False, False, True, True]
    assert last and not travel.known
    assert travel.settle(4.0, None) == pytest.approx(4.0 * 0.5)
    assert travel.factor == pytest.approx(2.0) and travel.known


def test_a_run_without_an_end_keeps_its_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, path = crossing(tmp_path, 1e-4, caplog, max_epochs=-1, max_time={"seconds": 1})
    assert path == 0.0 and "times as far" not in caplog.text


@pytest.mark.parametrize("epoch", [0, 2])
def test_what_was_measured_goes_with_a_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture, epoch: int) -> None:
    def run(directory: Path, **options: Any) -> Any:
        callbacks = [every_epoch(directory)]
        return crossing(directory, 0.01, caplog, callbacks=callbacks, max_epochs=12, **options)[0]

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", ckpt_path=tmp_path / f"whole/epoch={epoch}.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
