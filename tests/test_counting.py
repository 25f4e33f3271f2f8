"""A model's phases go by what this model has had, whatever the Trainer has counted before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lfq_lightning as lfq
from tests.runs import BATCHES, Net, every_epoch, loader, qat, trainer

STEPS = lfq.PhaseSchedule(observe=0, estimate=4, learn=8, freeze=20, unit="step")


class Phases(L.Callback):
    """The phase of each batch, and a number of batches after which the fit stops."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.seen.append(pl_module.second.input_quantizer.phase)


def fit_again(made: L.Trainer, model: L.LightningModule, epochs: int) -> list[str]:
    """The phases of some more epochs on the same Trainer."""
    [watch] = (callback for callback in made.callbacks if isinstance(callback, Phases))
    before = len(watch.seen)
    made.fit_loop.max_epochs = made.current_epoch + epochs
    made.fit(model, loader())
    return watch.seen[before:]


def run_length(phases: list[str]) -> list[tuple[str, int]]:
    return [(phase, phases.count(phase)) for phase in dict.fromkeys(phases)]


def made_with(directory: Path, schedule: Any, *more: L.Callback) -> L.Trainer:
    return trainer(directory, [qat(schedule=schedule), Phases(), *more], max_epochs=0, limit_val_batches=0)


@pytest.mark.parametrize("schedule", [lfq.PhaseSchedule(0, 1, 2), STEPS, None])
def test_another_model_on_the_same_trainer_goes_through_every_phase(tmp_path: Path, schedule: Any) -> None:
    made = made_with(tmp_path, schedule)
    first = fit_again(made, Net(), 3)
    assert list(dict.fromkeys(first))[:3] == ["observe", "estimate", "learn"]
    assert fit_again(made, Net(), 3) == first


@pytest.mark.filterwarnings("ignore:The run ended in phase")
@pytest.mark.parametrize("schedule", [lfq.PhaseSchedule(0, 2, 4), lfq.PhaseSchedule(0, 16, 32, unit="step")])
@pytest.mark.parametrize("same", [True, False])
def test_a_model_that_is_halfway_goes_on_from_there(tmp_path: Path, schedule: Any, same: bool) -> None:
    callback, watch, model = qat(schedule=schedule), Phases(), Net()
    options = {"max_epochs": 5, "limit_val_batches": 0}
    made = trainer(tmp_path, [callback, watch], **options)
    made.fit_loop.max_epochs = 5
    made.should_stop = False

    class Stops(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    made.callbacks.append(Stops())
    made.fit(model, loader())
    assert run_length(watch.seen) == [("observe", 2 * BATCHES), ("estimate", BATCHES)]
    made.callbacks.pop()
    made.should_stop = False
    again = made if same else trainer(tmp_path, [callback, watch], **options)
    watch.seen.clear()
    again.fit(model, loader())
    assert run_length(watch.seen)[:2] == [("estimate", BATCHES), ("learn", (1 if same else 4) * BATCHES)]


def test_a_schedule_that_the_rest_of_the_trainer_cannot_hold_is_refused_before_anything_is_changed(
    tmp_path: Path,
) -> None:
    made = made_with(tmp_path, lfq.PhaseSchedule(0, 1, 2))
    fit_again(made, Net(), 3)
    other = Net()
    with pytest.raises(ValueError, match="starts to learn at epoch 2, and the run ends after 1 epochs"):
        fit_again(made, other, 1)
    assert not lfq.quantizers(other)


def test_a_run_on_a_trainer_that_was_used_before_resumes_bit_equal(tmp_path: Path) -> None:
    def run(directory: Path, resume: Path | None) -> torch.nn.Module:
        L.seed_everything(3, verbose=False)
        made = trainer(directory, [qat(schedule=STEPS), Phases(), every_epoch(directory)], limit_val_batches=0)
        model = Net()
        if resume is None:
            made.fit(Net(), loader())
            made.fit_loop.max_epochs = 6
            torch.manual_seed(4)
            model = Net()
            made.fit(model, loader())
        else:
            made.fit_loop.max_epochs = 6
            made.fit(model, loader(), ckpt_path=resume, weights_only=True)
        return model

    whole = run(tmp_path, None)
    part = run(tmp_path / "part", tmp_path / "epoch=3.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, part.state_dict()[key]), key


def test_techniques_count_the_epochs_of_the_model_too(tmp_path: Path) -> None:
    bits: list[int] = []

    class Bits(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            bits.append(pl_module.second.weight_quantizer.bitwidth)

    made = made_with(tmp_path, lfq.PhaseSchedule(0, 1, 2), lfq.BitAnnealing({0: 8, 2: 4}), Bits())
    fit_again(made, Net(), 3)
    first = list(bits)
    fit_again(made, Net(), 3)
    assert bits == first + first
    assert set(bits) == {8, 4}
