"""The callback in real runs: what a user sees, and what a wrong argument says."""

from __future__ import annotations

import copy
import csv
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.demos import LightningTransformer
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from lightning.pytorch.demos.lstm import LightningLSTM
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import lfq_lightning as lfq
from lfq_lightning.observers import MinMaxObserver
from lfq_lightning.placement.quantized_layer import QuantizedLayer
from lfq_lightning.records.trajectory import read_trajectory
from tests.runs import BATCHES, Net, every_epoch, fit, loader, qat, trainer


class Tokens(IterableDataset[Any]):
    """Sixteen sequences of twelve tokens and the next one of each."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(16):
            sequence = torch.randint(0, 50, (13,), generator=generator)
            yield sequence[:-1], sequence[1:]


DEMOS = {
    "boring": (BoringModel, {}, None),
    "manual": (ManualOptimBoringModel, {}, None),
    "transformer": (LightningTransformer, {"vocab_size": 50}, Tokens),
    "lstm": (LightningLSTM, {"vocab_size": 50}, Tokens),
}


def run(model: Any, x: Tensor) -> Tensor:
    if isinstance(model, LightningLSTM):
        return model.model(x, model.model.init_hidden(1))[0]
    return model(x, x) if isinstance(model, LightningTransformer) else model(x)


@pytest.mark.parametrize("demo", DEMOS)
def test_lightnings_own_demos_train_unchanged_and_come_back_from_their_checkpoint(tmp_path: Path, demo: str) -> None:
    kind, arguments, dataset = DEMOS[demo]
    model = kind(**arguments)
    if hasattr(model, "prepare_data"):
        model.prepare_data = lambda: None  # the text would be downloaded
    schedule = lfq.PhaseSchedule(observe=0, estimate=2, learn=3, unit="step")
    made = trainer(tmp_path, [qat(schedule=schedule)], max_epochs=2, limit_train_batches=4, limit_val_batches=1)
    made.fit(model, *([DataLoader(dataset(), batch_size=4)] if dataset else []))
    assert {q.phase for q in lfq.quantizers(model).values()} == {"learn"}
    made.save_checkpoint(tmp_path / "x.ckpt")
    again = lfq.load_from_checkpoint(kind, tmp_path / "x.ckpt", **arguments)
    x = next(iter(Tokens()))[0][None] if dataset else torch.randn(3, 32)
    found, expected = (run(m.eval(), x) for m in (again, model))
    assert torch.equal(found, expected)


class Watch(L.Callback):
    """Notes the phase at each step and evaluation."""

    def __init__(self) -> None:
        self.train: list[str] = []
        self.validation: list[str] = []
        self.training_outputs_on_grid: list[bool] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.train.append(pl_module.second.weight_quantizer.phase)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.validation.append(pl_module.second.weight_quantizer.phase)


@pytest.mark.quick
def test_phases_follow_the_schedule_by_epoch(tmp_path: Path) -> None:
    watch = Watch()
    fit(tmp_path, callback=qat(schedule=lfq.PhaseSchedule(1, 2, 3, 4)), callbacks=[watch], max_epochs=5)
    assert watch.train[::BATCHES] == ["off", "observe", "estimate", "learn", "freeze"]
    assert watch.validation == ["off", "observe", "estimate", "learn", "freeze"]


@pytest.mark.quick
def test_phases_follow_the_schedule_by_step(tmp_path: Path) -> None:
    watch = Watch()
    schedule = lfq.PhaseSchedule(observe=0, estimate=3, learn=5, freeze=7, unit="step")
    fit(tmp_path, callback=qat(schedule=schedule), callbacks=[watch], max_epochs=1)
    assert watch.train == ["observe"] * 3 + ["estimate"] * 2 + ["learn"] * 2 + ["freeze"]


@pytest.mark.quick
def test_frozen_qparams_are_constant_and_the_weights_are_not(tmp_path: Path) -> None:
    model, _, _ = fit(tmp_path, callback=qat(schedule=lfq.PhaseSchedule(0, 1, 2, 3)), max_epochs=5)
    rows = [r for r in read_trajectory(tmp_path / "trajectory.csv") if r.quantizer == "second.weight_quantizer"]
    frozen = {(r.scale_mean, r.scale_max) for r in rows if r.phase == "freeze"}
    assert len(frozen) == 1
    assert len({r.scale_mean for r in rows if r.phase == "learn"}) > 1
    assert model.second.weight_quantizer.scale.grad is None


@pytest.mark.quick
def test_without_a_schedule_one_is_derived_even_for_one_epoch(tmp_path: Path) -> None:
    model, _, callback = fit(tmp_path, callback=qat(schedule=None), max_epochs=1)
    assert callback.state_dict()["schedule"] == lfq.PhaseSchedule.for_run(1, BATCHES).to_dict()
    assert {q.phase for q in lfq.quantizers(model).values()} == {"learn"}


def test_without_time_to_observe_the_first_batch_passes_unquantized(tmp_path: Path) -> None:
    class First(Net):
        same: bool | None = None

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if self.same is None:
                twin = copy.deepcopy(self)
                lfq.detach(twin)
                self.same = torch.equal(twin(batch[0]), copy.deepcopy(self)(batch[0]))
            return super().training_step(batch, batch_idx)

    model, _, _ = fit(tmp_path, First(), callback=qat(schedule=lfq.PhaseSchedule(0, 0, 1)))
    assert not model.same  # the weights are quantized from the start
    rows = read_trajectory(tmp_path / "trajectory.csv")
    assert all(r.scale_mean < 1 for r in rows)
    model, _, _ = fit(tmp_path / "x", First(), callback=qat(weight=None, schedule=lfq.PhaseSchedule(0, 0, 1)))
    assert model.same


def test_a_fast_dev_run_goes_through_without_learning(tmp_path: Path) -> None:
    model, _, _ = fit(tmp_path, callback=qat(), fast_dev_run=True)
    assert {q.phase for q in lfq.quantizers(model).values()} == {"observe"}
    model, _, _ = fit(tmp_path, callback=qat(schedule=lfq.PhaseSchedule(0, 0, 0)), fast_dev_run=2)
    assert {q.phase for q in lfq.quantizers(model).values()} == {"off"}


@pytest.mark.quick
def test_sanity_check_and_validation_observe_nothing(tmp_path: Path) -> None:
    class Huge(Net):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self(1e6 * batch[0])

    model, _, _ = fit(tmp_path, Huge(), num_sanity_val_steps=2)
    assert model.first.input_quantizer.observer.maximum < 100


@pytest.mark.quick
def test_the_trajectory_has_every_quantizer_at_every_recorded_step(tmp_path: Path) -> None:
    model, made, _ = fit(tmp_path)
    rows = read_trajectory(tmp_path / "trajectory.csv")
    assert {r.step for r in rows} == set(range(3, 3 * BATCHES + 1, 3))
    assert {r.quantizer for r in rows} == set(lfq.quantizers(model))
    last = {r.quantizer: r for r in rows if r.step == made.global_step}
    for name, quantizer in lfq.quantizers(model).items():
        assert last[name].scale_max == pytest.approx(float(quantizer.scale.detach().max()), rel=1e-6)
        assert 0 <= last[name].saturation < 1
        assert last[name].gradient_norm > 0
    assert all(math.isnan(r.gradient_norm) or r.gradient_norm == 0 for r in rows if r.phase == "observe")


def test_summaries_can_be_monitored_and_every_logger_gets_the_trajectories(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b")]
    _, made, _ = fit(tmp_path, logger=loggers, log_every_n_steps=1)
    assert made.callback_metrics["lfq/phase"] == 3
    assert made.callback_metrics["lfq/lr"] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 2 / 10)) / 2)
    for key in ("lfq/weight_scale", "lfq/input_scale", "lfq/weight_saturation", "lfq/input_saturation"):
        assert made.callback_metrics[key] >= 0
    for logger in loggers:
        with open(Path(logger.log_dir, "metrics.csv")) as file:
            columns = set(next(csv.reader(file)))
        assert {"lfq/scale/second.weight_quantizer", "lfq/zero_point/head.input_quantizer", "lfq/phase"} <= columns
        assert "lfq/zero_point/second.weight_quantizer" not in columns  # symmetric: always 0
    assert Path(loggers[0].log_dir, "trajectory.csv").exists()


def test_the_progress_bar_shows_the_phase_and_is_left_as_it_was(tmp_path: Path) -> None:
    shown: list[str] = []

    class Bar(TQDMProgressBar):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            shown.append(self.get_metrics(trainer, pl_module)["phase"])
            super().on_train_batch_end(trainer, pl_module, *args)

    bar = Bar()
    fit(tmp_path, callbacks=[bar], enable_progress_bar=True)
    assert list(dict.fromkeys(shown)) == ["observe", "estimate", "learn"]
    assert "get_metrics" not in bar.__dict__


@pytest.mark.quick
def test_nothing_but_quantizers_is_left_behind(tmp_path: Path) -> None:
    model, made, _ = fit(tmp_path)
    assert not {"configure_model", "configure_optimizers", "on_load_checkpoint"} & set(model.__dict__)
    assert not any("zero_grad" in optimizer.__dict__ for optimizer in made.optimizers)
    assert {q.gathering for q in lfq.quantizers(model).values()} == {None}
    assert not any(q._forward_pre_hooks for q in lfq.quantizers(model).values())


@pytest.mark.quick
def test_an_exception_in_training_leaves_the_model_usable(tmp_path: Path) -> None:
    class Fails(Net):
        fail = True

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if self.fail and self.trainer.global_step == 5:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    model = Fails()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, model)
    assert {q.gathering for q in lfq.quantizers(model).values()} == {None}
    assert not {"configure_model", "configure_optimizers", "on_load_checkpoint"} & set(model.__dict__)
    Fails.fail = False
    fit(tmp_path, model)
    assert {q.phase for q in lfq.quantizers(model).values()} == {"learn"}


@pytest.mark.quick
@pytest.mark.parametrize("phase", ["observe", "estimate", "learn"])
def test_a_batch_of_nan_or_inf_warns_once_by_name_and_poisons_no_scale(tmp_path: Path, phase: str) -> None:
    at = {"observe": 2, "estimate": BATCHES + 2, "learn": 2 * BATCHES + 1}[phase]

    class Bad(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            x = batch[0].clone()
            if self.trainer.global_step == at:
                x[0, 0, 0, 0], x[1, 0, 0, 0] = torch.nan, torch.inf
                self(x)
                return super().training_step(batch, batch_idx)
            return super().training_step(batch, batch_idx)

    class NormFree(Bad):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.second(torch.relu(self.first(x)))).flatten(1))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, _, _ = fit(tmp_path, NormFree(), callback=qat(record_every_n_steps=1))
    named = [str(w.message) for w in caught if "NaN or infinite" in str(w.message)]
    assert sum("first.input_quantizer" in message for message in named) == 1
    for quantizer in lfq.quantizers(model).values():
        assert quantizer.scale.isfinite().all()
        assert quantizer.observer.maximum.isfinite().all()


def test_layers_made_in_setup_or_configure_model_are_quantized(tmp_path: Path) -> None:
    class Late(Net):
        def setup(self, stage: str) -> None:
            self.head = torch.nn.Linear(36, 20)

        def configure_model(self) -> None:
            if not hasattr(self, "tail"):
                self.tail = torch.nn.Linear(20, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(super().forward(x))

    model, _, callback = fit(tmp_path, Late())
    assert [(p.name, p.weight.bits) for p in callback.placement.layers] == [
        ("first", 8),
        ("second", 4),
        ("head", 4),
        ("tail", 8),
    ]
    assert isinstance(model.tail, QuantizedLayer)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_qparams_stay_float32_in_every_precision(tmp_path: Path, precision: str) -> None:
    class Cast(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step([batch[0].to(self.head.weight.dtype), batch[1]], batch_idx)

    model, _, _ = fit(tmp_path, Cast(), precision=precision, limit_val_batches=0)
    for quantizer in lfq.quantizers(model).values():
        assert quantizer.scale.dtype is quantizer.zero_point.dtype is torch.float32
        assert not torch.equal(quantizer.scale, quantizer.scale_reference)


def test_disk_trouble_stops_recording_and_not_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="trajectory"):
        _, made, _ = fit(tmp_path / "file" / "run")
    assert made.current_epoch == 3


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"weight": 17}, ValueError, "`bits` must be between 2 and 16. Found 17"),
        ({"weigth": 4}, TypeError, "unexpected keyword argument 'weigth'"),
        ({"activation": 4.5}, TypeError, "must be a number of bits"),
        ({"schedule": "learn"}, TypeError, "must be a PhaseSchedule"),
        ({"record_every_n_steps": 0}, ValueError, "must be at least 1"),
        ({"rules": [{"match": "head", "wait": 8}]}, ValueError, "wait"),
    ],
)
def test_wrong_arguments_are_refused_at_once(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lfq.QuantizationAwareTraining(**settings)


@pytest.mark.parametrize("schedule", [lfq.PhaseSchedule(0, 1, 3), lfq.PhaseSchedule(0, 1, 24, unit="step")])
def test_a_schedule_that_never_learns_is_refused_before_training(tmp_path: Path, schedule: lfq.PhaseSchedule) -> None:
    model = Net()
    before = model.first.weight.detach().clone()
    with pytest.raises(ValueError, match="would never be learned"):
        fit(tmp_path, model, callback=qat(schedule=schedule))
    assert torch.equal(model.first.weight, before)


def test_a_short_fit_of_a_model_that_has_learned_goes_on_under_the_same_schedule(tmp_path: Path) -> None:
    model, _, _ = fit(tmp_path)
    before = model.second.input_quantizer.scale.detach().clone()
    fit(tmp_path, model, max_epochs=1)
    assert not torch.equal(model.second.input_quantizer.scale, before)
    with pytest.raises(ValueError, match="would never be learned"):
        fit(tmp_path, model, callback=qat(reobserve=True), max_epochs=1)
    assert model.second.input_quantizer.learned


def test_a_rule_that_matches_nothing_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Near are head"):
        fit(tmp_path, callback=qat(rules=[lfq.Rule("hed", weight=8)]))


def test_a_layer_that_is_never_used_is_named_and_ends_no_run(tmp_path: Path) -> None:
    class Unused(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = torch.nn.Linear(3, 3)

    _, _, callback = fit(tmp_path / "flow", Unused())
    assert dict(callback.placement.left_in_float)["spare"] == "it has no part in the training step"
    with pytest.warns(UserWarning, match=r"spare\.input_quantizer never saw data"):
        model, _, _ = fit(tmp_path, Unused(), callback=qat(example=False))
    assert model.spare.input_quantizer.phase == "observe"
    assert model.head.input_quantizer.phase == "learn"
    fit(tmp_path, Unused(), callback=qat(rules=[lfq.Rule("spare", weight=None, activation=None)]))


def test_a_quantizer_of_the_users_own_goes_through_the_phases_too(tmp_path: Path) -> None:
    class Own(Net):
        def __init__(self) -> None:
            super().__init__()
            self.sum = lfq.LearnableFakeQuantize(MinMaxObserver(), quant_max=15, grad_factor="lsq")

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.sum(torch.relu(self.second(torch.relu(self.first(x))))).flatten(1))

    model, _, _ = fit(tmp_path, Own())
    assert model.sum.phase == "learn"
    assert model.sum.observer.saw_data()
    assert not torch.equal(model.sum.scale, model.sum.scale_reference)


def test_hooks_that_are_called_without_a_trainers_run_say_so(tmp_path: Path) -> None:
    made, model, callback = trainer(tmp_path, []), Net(), qat()
    with pytest.raises(RuntimeError, match=r"`setup` first\. Found another"):
        callback.on_fit_start(made, model)
    made.callbacks = [callback]
    callback.setup(made, model, "fit")
    with pytest.raises(RuntimeError, match="Found a batch before it"):
        callback.on_train_batch_start(made, model, None, 0)
    callback.teardown(made, model, "fit")
    assert "configure_optimizers" not in vars(model)


def test_it_prints_as_the_call_that_makes_it() -> None:
    callback = qat(rules=[lfq.Rule("head", weight=8)])
    again = eval(repr(callback), vars(lfq))
    assert repr(again) == repr(callback)


@pytest.mark.parametrize("verb", ["test", "validate", "predict"])
def test_numbers_of_a_model_that_computes_in_float_are_called_so_once(tmp_path: Path, verb: str) -> None:
    with pytest.warns(UserWarning, match=rf"What `trainer\.{verb}` gives here are numbers of the float model") as said:
        getattr(trainer(tmp_path, [qat()]), verb)(Net(), loader())
    assert len([warning for warning in said if "float model" in str(warning.message)]) == 1


def test_numbers_of_an_epoch_from_before_quantization_are_called_float_and_later_ones_are_not(tmp_path: Path) -> None:
    model, made, _ = fit(tmp_path, callbacks=[every_epoch(tmp_path)])
    made.test(model, loader(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False, weights_only=True)
    with pytest.warns(UserWarning, match=r"in phase 'observe'.*while_learning"):
        made.test(model, loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False, weights_only=True)


class ReadsInStep(Net):
    """Reads weights in its training step itself: one that a layer has, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(10, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        scores = nn.functional.linear(self(batch[0]) @ self.own, self.head.weight.t()[:10, :])
        return nn.functional.cross_entropy(scores, batch[1])


def test_what_code_outside_of_any_forward_reads_is_named(tmp_path: Path) -> None:
    _, _, callback = fit(tmp_path, ReadsInStep(), max_epochs=3)
    left = dict(callback.placement.left_in_float)
    assert set(left) == {"", "head"}
    assert all("code that stands in no module's `forward` reads it" in reason for reason in left.values())
    assert "head" in {layer.name for layer in callback.placement.layers}


class RunsLater(Net):
    """Has a layer that runs from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.later = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x)
        return self.later(scores) if self.current_epoch > 0 else scores


def test_a_layer_that_had_no_part_in_the_batch_and_runs_later_is_named_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning) as caught:
        _, _, callback = fit(tmp_path, RunsLater(), max_epochs=3)
    assert dict(callback.placement.left_in_float) == {"later": "it has no part in the training step"}
    said = [str(warning.message) for warning in caught if "runs now" in str(warning.message)]
    assert len(said) == 1
    assert said[0].startswith("'later' had no part in the training step by which the model was quantized, and runs now")
