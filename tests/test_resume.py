"""A run that was interrupted and resumed equals the uninterrupted one, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import lfq_lightning as lfq
from tests.runs import BATCHES, Net, StatefulLoader, every_epoch, fit, loader, qat, trainer

SCHEDULE = lfq.PhaseSchedule(observe=0, estimate=1, learn=2, freeze=4)
EPOCHS = 6


def assert_same_run(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    ours, theirs = found[0].state_dict(), expected[0].state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value) if isinstance(value, Tensor) else ours[key] == value, key
    rows = [Path(run[1].default_root_dir, "trajectory.csv").read_text() for run in (found, expected)]
    assert rows[0] == rows[1]
    assert found[1].global_step == expected[1].global_step


@pytest.mark.quick
def test_resuming_at_any_epoch_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    whole = fit(tmp_path, callback=qat(schedule=SCHEDULE), callbacks=[every_epoch(tmp_path)], max_epochs=EPOCHS)
    for epoch in range(EPOCHS - 1):
        again = tmp_path / f"from{epoch}"
        options = {"callbacks": [every_epoch(tmp_path)], "max_epochs": EPOCHS, "callback": qat(schedule=SCHEDULE)}
        part = fit(again, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", **options)
        assert_same_run(part, whole)


@pytest.mark.parametrize("steps", [(3, 9, 10), (12, 17, 19, 22)])
def test_resuming_in_the_middle_of_an_epoch_equals_an_uninterrupted_run(tmp_path: Path, steps: tuple[int]) -> None:
    schedule = lfq.PhaseSchedule(observe=0, estimate=10, learn=18, unit="step")

    def every_step() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)

    def run(directory: Path, **more: Any) -> tuple[Any, ...]:
        options = {"callback": qat(schedule=schedule), "callbacks": [every_step()], "data": StatefulLoader()}
        return fit(directory, **options, **more)

    whole = run(tmp_path)
    assert whole[1].global_step == 3 * BATCHES
    for step in steps:
        assert_same_run(run(tmp_path / f"from{step}", ckpt_path=tmp_path / f"step={step}.ckpt"), whole)


def test_a_run_resumed_between_two_epochs_can_be_resumed_again_within_the_next(tmp_path: Path) -> None:
    def run(directory: Path, **more: Any) -> tuple[Any, ...]:
        every_step = ModelCheckpoint(directory, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        return fit(directory, callback=qat(), callbacks=[every_step], data=StatefulLoader(), **more)

    whole = run(tmp_path)
    run(tmp_path / "once", ckpt_path=tmp_path / f"step={BATCHES}.ckpt")
    saved = (torch.load(tmp_path / part / f"step={BATCHES + 5}.ckpt", weights_only=True) for part in ("", "once"))
    progress, expected = (checkpoint["loops"]["fit_loop"]["epoch_progress"] for checkpoint in saved)
    assert progress == expected
    assert_same_run(run(tmp_path / "twice", ckpt_path=tmp_path / f"once/step={BATCHES + 5}.ckpt"), whole)


@pytest.mark.parametrize("step", [2 * BATCHES, 2 * BATCHES + 3])
def test_an_epoch_that_a_run_resumes_with_logs_its_phase_and_learning_rate(tmp_path: Path, step: int) -> None:
    def run(directory: Path, **more: Any) -> dict[str, Tensor]:
        every_step = ModelCheckpoint(directory, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        return fit(directory, callbacks=[every_step], data=StatefulLoader(), **more)[1].callback_metrics

    whole = run(tmp_path)
    last_epoch = run(tmp_path / "again", ckpt_path=tmp_path / f"step={step}.ckpt")
    for name in ("lfq/phase", "lfq/lr"):
        assert last_epoch[name] == whole[name]


def test_a_derived_schedule_is_kept_by_the_run_that_resumes(tmp_path: Path) -> None:
    options = {"callbacks": [every_epoch(tmp_path)], "callback": qat(schedule=None), "max_epochs": 4}
    whole = fit(tmp_path, **options)
    longer = qat(schedule=None)
    fit(tmp_path / "more", ckpt_path=tmp_path / "epoch=0.ckpt", **{**options, "callback": longer, "max_epochs": 12})
    assert longer.state_dict()["schedule"] == whole[2].state_dict()["schedule"]


@pytest.mark.quick
def test_a_second_fit_goes_on_learning_and_reobserve_starts_over(tmp_path: Path) -> None:
    model, _, _ = fit(tmp_path)
    reference = model.second.weight_quantizer.scale_reference.clone()
    seen: list[str] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            seen.append(pl_module.second.weight_quantizer.phase)

    fit(tmp_path / "second", model, callbacks=[Watch()])
    assert set(seen) == {"learn"}
    assert torch.equal(model.second.weight_quantizer.scale_reference, reference)
    seen.clear()
    fit(tmp_path / "third", model, callback=qat(reobserve=True), callbacks=[Watch()])
    assert list(dict.fromkeys(seen)) == ["observe", "estimate", "learn"]


def test_a_checkpoint_that_was_only_tested_leaves_the_next_fit_alone(tmp_path: Path) -> None:
    callback = qat(schedule=None, reobserve=True)
    model, made, _ = fit(tmp_path, callback=callback, max_epochs=5)
    derived, rows = callback.state_dict()["schedule"], (tmp_path / "trajectory.csv").read_bytes()
    made.save_checkpoint(tmp_path / "x.ckpt")
    trainer(tmp_path, [callback]).test(model, loader(), ckpt_path=tmp_path / "x.ckpt", verbose=False, weights_only=True)
    began: list[Any] = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            state = callback.state_dict()["qparam_optimizer"]["optimizers"][0]["state"]
            began.append((pl_module.first.input_quantizer.phase, len(state)))

    fit(tmp_path, model, callback=callback, callbacks=[Look()], max_epochs=1)
    assert began[0] == ("observe", 0)
    assert callback.state_dict()["schedule"] != derived
    assert (tmp_path / "trajectory.csv.bak").read_bytes() == rows


def test_a_checkpoint_that_is_saved_after_a_test_holds_what_the_fit_knew(tmp_path: Path) -> None:
    model, made, callback = fit(tmp_path)
    own, known = callback.qparam_optimizer, callback.state_dict()
    made.test(model, loader(), verbose=False)
    found = callback.state_dict()
    assert callback.qparam_optimizer is own
    assert found.keys() == known.keys() == {"recorder", "sentinel", "schedule", "since", "qparam_optimizer"}
    assert all(found[key] == known[key] for key in known.keys() - {"qparam_optimizer"})


def test_a_checkpoint_of_weights_alone_goes_on_learning_where_it_stopped(tmp_path: Path) -> None:
    model, made, _ = fit(tmp_path)
    made.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    again = lfq.load_from_checkpoint(Net, tmp_path / "x.ckpt").train()
    fit(tmp_path / "more", again, callback=qat(schedule=lfq.PhaseSchedule(0, 0, 0)), max_epochs=1)
    for name, quantizer in lfq.quantizers(again).items():
        before = lfq.quantizers(model)[name]
        assert torch.equal(quantizer.scale_reference, before.scale_reference)
        assert not torch.equal(quantizer.scale, before.scale)
        torch.testing.assert_close(quantizer.scale, before.scale, rtol=0.05, atol=0.0)


def test_after_detach_a_fit_attaches_again(tmp_path: Path) -> None:
    model, _, _ = fit(tmp_path)
    lfq.detach(model)
    fit(tmp_path / "again", model)
    assert {q.phase for q in lfq.quantizers(model).values()} == {"learn"}


@pytest.mark.quick
def test_the_trajectory_goes_on_in_the_directory_of_the_resumed_run(tmp_path: Path) -> None:
    fit(tmp_path / "a", callbacks=[every_epoch(tmp_path)])
    callback = qat()
    L.seed_everything(3, verbose=False)
    resumed = trainer(tmp_path / "b", [callback, every_epoch(tmp_path)], max_epochs=5)
    resumed.fit(Net(), loader(), loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    steps = [int(line.split(",")[0]) for line in (tmp_path / "b/trajectory.csv").read_text().splitlines()[1:]]
    assert steps == sorted(steps)
    assert set(steps) == set(range(3, 5 * BATCHES + 1, 3))


def test_a_layer_that_is_new_to_a_learned_model_goes_through_every_phase_while_the_others_learn(tmp_path: Path) -> None:
    model, _, _ = fit(tmp_path)
    learned = lfq.quantizers(model)["second.weight_quantizer"].scale_reference.clone()
    model.head = torch.nn.Linear(36, 10)
    seen: dict[str, list[str]] = {"second": [], "head": []}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            for name, phases in seen.items():
                phases.append(getattr(pl_module, name).input_quantizer.phase)

    fit(tmp_path / "second", model, callbacks=[Watch()])
    assert set(seen["second"]) == {"learn"}
    assert list(dict.fromkeys(seen["head"])) == ["observe", "estimate", "learn"]
    head, second = model.head.input_quantizer, model.second.weight_quantizer
    assert not torch.equal(head.scale, head.scale_reference)
    assert torch.equal(second.scale_reference, learned)
