"""Copies of callbacks in the middle of a run: by deepcopy and by pickle, without a handle on it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelSummary

import lfq_lightning as lfq
from tests.runs import BATCHES, Net, fit, loader, qat, trainer

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


class Copies(L.Callback):
    """Copies everything in the middle of learning."""

    made: Any = None

    def __init__(self, way: str) -> None:
        self.way = way

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 2 * BATCHES + 3:
            Copies.made = COPIES[self.way]((trainer.callbacks, pl_module.cpu()))


def run(directory: Path, *more: L.Callback) -> tuple[Any, L.Trainer, Any]:
    techniques = [
        lfq.BatchNormStatistics(freeze=2),
        lfq.OscillationControl(dampen=0.1, freeze=0.02),
        lfq.Distillation(0.5),
        ModelSummary(),
        lfq.while_learning(EarlyStopping("val_loss", patience=9)),
    ]
    return fit(directory, callback=qat(export=None), callbacks=[*techniques, *more], enable_model_summary=True)


@pytest.mark.parametrize("way", COPIES)
def test_callbacks_and_module_are_copied_in_mid_run_without_a_handle_on_it(tmp_path: Path, way: str) -> None:
    expected, _, _ = run(tmp_path / "alone")
    found, made, original = run(tmp_path / "copied", Copies(way))
    for key, value in expected.state_dict().items():  # the original run is not disturbed
        assert torch.equal(value, found.state_dict()[key]), key

    callbacks, model = Copies.made
    [own] = (callback for callback in callbacks if isinstance(callback, lfq.QuantizationAwareTraining))
    assert repr(own) == repr(original)
    assert own.placement == original.placement
    assert own.qparam_optimizer is None
    ours = [callback for callback in callbacks if type(callback).__module__.startswith("lfq_lightning.")]
    assert len(ours) == 4
    assert len(pickle.dumps(ours)) < 10_000  # arguments and results, and no model
    assert model.training_step.__func__ is Net.training_step
    assert model.training_step.__self__ is model

    other = Net()
    trainer(tmp_path / "again", callbacks[: len(made.callbacks) - 1]).fit(other, loader(), loader())
    assert {q.phase for q in lfq.quantizers(other).values()} == {"learn"}
    assert {q.phase for q in lfq.quantizers(found).values()} == {"learn"}
