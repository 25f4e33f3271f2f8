"""Quantizers that collapse are named once, with the remedy, and started over where that is asked for."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lfq_lightning as lfq
from lfq_lightning.placement.points import points
from lfq_lightning.records.symptoms import Symptoms
from lfq_lightning.records.trajectory import TrajectoryRow
from lfq_lightning.training.sentinel import Sentinel
from tests.runs import BATCHES, Net, every_epoch, fit, images, qat

pytestmark = pytest.mark.quick

HEALTHY = TrajectoryRow(1, 0, "learn", "second.input_quantizer", 0.1, 0.1, 0.1, 3.0, 3.0, 3.0, 0.01, 0.1)
FLOOR = torch.finfo(torch.float32).eps


def learned() -> Net:
    model = Net()
    lfq.attach(model, weight=4, activation=4)
    lfq.calibrate(model, [images().tensors[0]])
    lfq.set_phase(model, "learn")
    return model


def reasons(rows: list[TrajectoryRow]) -> list[str]:
    found, symptoms = points(learned()), Symptoms({})
    return [symptoms.collapsed([row], found).get(row.quantizer, "") for row in rows]


COLLAPSED = {
    "shrunk": ([HEALTHY, replace(HEALTHY, scale_min=0.0000999)], "fell from 0.1 to 9.99e-05"),
    "floor": ([HEALTHY, replace(HEALTHY, scale_min=FLOOR)], "fell from 0.1 to 1.19e-07"),
    "not finite": ([replace(HEALTHY, scale_max=math.inf)], "not finite"),
    "zero point not finite": ([replace(HEALTHY, zero_point_min=math.nan)], "not finite"),
    "saturated": ([replace(HEALTHY, saturation=0.97)] * 3, "clamps 97%"),
    "pinned": (
        [HEALTHY] + [replace(HEALTHY, zero_point_min=15, zero_point_mean=15, zero_point_max=15, saturation=0.4)] * 20,
        "15, an end",
    ),
}


@pytest.mark.parametrize("kind", COLLAPSED)
def test_each_kind_of_collapse_is_seen_when_it_is_certain(kind: str) -> None:
    rows, reason = COLLAPSED[kind]
    *before, last = reasons(rows)
    assert not any(before)
    assert reason in last


WELL = {
    "dead channel": [replace(HEALTHY, scale_min=FLOOR)] * 30,  # a channel of zeros, from the first row on
    "after relu": [replace(HEALTHY, zero_point_min=0, zero_point_mean=0, zero_point_max=0)] * 30,
    "moved there by a relu": [HEALTHY] + [replace(HEALTHY, zero_point_min=0, zero_point_mean=0, zero_point_max=0)] * 30,
    "one batch": [HEALTHY, replace(HEALTHY, saturation=0.97), HEALTHY] * 10,
    "nothing measured": [replace(HEALTHY, saturation=math.nan)] * 30,
    "not learning": [replace(HEALTHY, phase="observe", saturation=1.0)] * 30,
}


@pytest.mark.parametrize("kind", WELL)
def test_what_is_well_is_left_alone(kind: str) -> None:
    assert not any(reasons(WELL[kind]))


class Collapses(L.Callback):
    """Makes one scale a ten-thousandth of what it was, in the middle of learning."""

    def __init__(self, at: int = 2 * BATCHES + 2) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.at:
            pl_module.second.input_quantizer.scale.data.div_(1e4)


SETTINGS = {"record_every_n_steps": 1, "optimizer": partial(torch.optim.SGD, lr=0.0)}


def test_a_collapse_in_a_run_is_reported_once_by_name_with_the_remedy(tmp_path: Path) -> None:
    with pytest.warns(UserWarning) as caught:
        fit(tmp_path, callback=qat(**SETTINGS), callbacks=[Collapses()], limit_val_batches=0, max_epochs=4)
    [message] = [str(w.message) for w in caught if "collapsed" in str(w.message)]
    assert message.startswith("Quantizers collapsed: second.input_quantizer: its smallest scale fell")
    assert 'on_collapse="reinit"' in message


@pytest.mark.parametrize("optimizer", [SETTINGS["optimizer"], partial(torch.optim.Adam, lr=1e-9)])
def test_a_collapsed_quantizer_is_estimated_anew_where_that_is_asked_for(tmp_path: Path, optimizer: Any) -> None:
    callback = qat(**{**SETTINGS, "optimizer": optimizer}, on_collapse="reinit")
    with pytest.warns(UserWarning, match="collapsed"):
        model, _, _ = fit(tmp_path, callback=callback, callbacks=[Collapses()], limit_val_batches=0)
    quantizer = model.second.input_quantizer
    expected, _ = quantizer.calculate_qparams()
    torch.testing.assert_close(quantizer.scale.detach(), expected, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(quantizer.scale_reference, expected)


def test_a_collapse_ends_the_run_where_that_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"second\.input_quantizer: its smallest scale fell"):
        fit(tmp_path, callback=qat(**SETTINGS, on_collapse="raise"), callbacks=[Collapses()], limit_val_batches=0)


def test_a_weight_starts_over_from_itself() -> None:
    model, sentinel = learned(), Sentinel("reinit")
    quantizer = model.second.weight_quantizer
    expected = quantizer.scale.detach().clone()
    quantizer.scale.data.fill_(1e9)
    with pytest.warns(UserWarning, match="collapsed"):
        [found] = sentinel.react(model, {"second.weight_quantizer": "a reason"})
    assert found is quantizer
    assert torch.equal(quantizer.scale, expected)
    assert len(sentinel.react(model, {"second.weight_quantizer": "a reason"})) == 1  # again, without a word


def test_an_input_that_starts_over_at_an_end_of_its_range_is_not_suspicious_there() -> None:
    model, sentinel = learned(), Sentinel("reinit")
    at_end = replace(HEALTHY, zero_point_min=0, zero_point_mean=0, zero_point_max=0, saturation=0.4)
    with pytest.warns(UserWarning, match="an end of the range"):
        collapsed = (sentinel.symptoms.collapsed([row], points(model)) for row in [HEALTHY] + [at_end] * 60)
        started_over = [sentinel.react(model, found) for found in collapsed]
    assert [len(found) for found in started_over] == [0] * 20 + [1] + [0] * 40


def test_another_fit_of_the_same_callback_begins_without_a_memory(tmp_path: Path) -> None:
    callback = qat(**SETTINGS)
    for _ in range(2):
        with pytest.warns(UserWarning, match="second.input_quantizer: its smallest scale fell"):
            fit(tmp_path, callback=callback, callbacks=[Collapses()], limit_val_batches=0)


class Clamps(L.Callback):
    """Has one input clamped in the last two records of an epoch, and from there on."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 2 * BATCHES - 2:
            pl_module.first.input_quantizer.scale.data.mul_(0.01)


def test_a_run_that_resumes_in_the_middle_of_a_collapse_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    def run(directory: Path, **more: Any) -> Any:
        settings = {**SETTINGS, "schedule": lfq.PhaseSchedule(0, 0, 1), "on_collapse": "reinit"}
        callbacks = [Clamps(), every_epoch(directory)]
        with pytest.warns(UserWarning, match="it clamps"):
            return fit(directory, callback=qat(**settings), callbacks=callbacks, limit_val_batches=0, **more)[0]

    whole = run(tmp_path / "whole").state_dict()
    part = run(tmp_path / "part", ckpt_path=tmp_path / "whole/epoch=1.ckpt").state_dict()
    for key, value in whole.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(part[key], value), key


def test_an_ordinary_run_is_not_reported(tmp_path: Path) -> None:
    model, _, _ = fit(tmp_path, callback=qat(record_every_n_steps=1, weight=2, activation=2), max_epochs=5)
    assert model is not None  # warnings are errors


def test_a_reaction_without_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`on_collapse` must be one of warn, reinit, raise\. Found 'stop'"):
        qat(on_collapse="stop")
