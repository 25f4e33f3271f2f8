"""PhaseSchedule: a pure function from the epoch or step to the phase."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any, get_args

import pytest
import yaml
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lfq_lightning import PhaseSchedule
from lfq_lightning.schedule import PHASES, Phase, check_phase

pytestmark = pytest.mark.quick


@st.composite
def schedules(draw: st.DrawFn) -> PhaseSchedule:
    observe, estimate, learn, freeze = sorted(draw(st.lists(st.integers(0, 1000), min_size=4, max_size=4)))
    return PhaseSchedule(
        observe, estimate, learn, draw(st.sampled_from([freeze, None])), draw(st.sampled_from(["epoch", "step"]))
    )


def test_by_default_each_phase_lasts_an_epoch_and_learning_goes_on() -> None:
    schedule = PhaseSchedule()
    assert [schedule.phase(epoch, 10**6) for epoch in range(5)] == ["observe", "estimate", "learn", "learn", "learn"]


def test_every_phase_comes_in_its_turn_and_starts_when_the_schedule_says() -> None:
    schedule = PhaseSchedule(observe=2, estimate=4, learn=5, freeze=8)
    phases = [schedule.phase(epoch, 0) for epoch in range(10)]
    assert phases == ["off"] * 2 + ["observe"] * 2 + ["estimate"] + ["learn"] * 3 + ["freeze"] * 2


def test_phases_that_start_together_are_skipped() -> None:
    assert PhaseSchedule(observe=0, estimate=0, learn=0).phase(0, 0) == "learn"
    assert PhaseSchedule(observe=0, estimate=3, learn=3, freeze=3).phase(3, 0) == "freeze"


def test_the_unit_chooses_what_counts() -> None:
    by_epoch, by_step = (PhaseSchedule(0, 10, 20, unit=unit) for unit in ("epoch", "step"))
    assert by_epoch.phase(epoch=15, step=0) == by_step.phase(epoch=0, step=15) == "estimate"
    assert by_epoch.phase(epoch=0, step=25) == by_step.phase(epoch=25, step=0) == "observe"


@given(schedules(), st.integers(0, 1100))
def test_phases_only_move_forward(schedule: PhaseSchedule, now: int) -> None:
    here, next_ = (PHASES.index(schedule.phase(n, n)) for n in (now, now + 1))
    assert next_ >= here


@given(schedules())
def test_a_schedule_prints_as_the_call_that_makes_it_and_survives_configuration(schedule: PhaseSchedule) -> None:
    assert eval(repr(schedule)) == schedule
    values = schedule.to_dict()
    assert all(type(value) in (int, str, type(None)) for value in values.values())
    assert PhaseSchedule(**yaml.safe_load(yaml.safe_dump(values))) == schedule
    assert instantiate(OmegaConf.create({"_target_": "lfq_lightning.PhaseSchedule", **values})) == schedule
    assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        ({"unit": "batch"}, ValueError, "`unit` must be one of epoch, step. Found 'batch'"),
        ({"unit": None}, ValueError, "`unit` must be one of epoch, step. Found None"),
        ({"observe": -1}, ValueError, "at epoch 0 or later. Found observe=-1"),
        ({"observe": 2, "estimate": 1}, ValueError, "Found observe=2 and estimate=1: exchange or correct them"),
        ({"estimate": 5, "learn": 4}, ValueError, "Found estimate=5 and learn=4"),
        ({"learn": 4, "freeze": 3}, ValueError, "Found learn=4 and freeze=3"),
        ({"learn": 2.0}, TypeError, "`learn` must be a whole number of epochs. Found 2.0"),
        ({"observe": True}, TypeError, "`observe` must be a whole number of epochs. Found True"),
        ({"estimate": "1", "unit": "step"}, TypeError, "`estimate` must be a whole number of steps. Found '1'"),
        ({"learn": None}, TypeError, "`learn` must be a whole number of epochs. Found None"),
        ({"warmup": 1}, TypeError, "unexpected keyword argument 'warmup'"),
    ],
    ids=str,
)
def test_a_wrong_schedule_raises_with_the_rule_and_what_was_found(
    wrong: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        PhaseSchedule(**wrong)


def test_a_schedule_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PhaseSchedule().learn = 4


def test_a_run_that_ends_before_learning_starts_is_refused_with_the_remedy() -> None:
    PhaseSchedule().check_reaches_learn(epochs=3, steps=1)
    PhaseSchedule().check_reaches_learn(epochs=math.inf, steps=1)
    with pytest.raises(ValueError, match=r"learn at epoch 2, and the run ends after 2 epochs.*Start `learn` earlier"):
        PhaseSchedule().check_reaches_learn(epochs=2, steps=10**6)
    with pytest.raises(ValueError, match="learn at step 100, and the run ends after 100 steps"):
        PhaseSchedule(0, 50, 100, unit="step").check_reaches_learn(epochs=10, steps=100)


@given(st.integers(1, 300), st.integers(1, 400))
def test_the_schedule_derived_for_a_run_reaches_learning_and_leaves_it_four_fifths(epochs: int, batches: int) -> None:
    steps = epochs * batches
    schedule = PhaseSchedule.for_run(epochs, steps)
    length = epochs if schedule.unit == "epoch" else steps
    assert schedule.observe == 0
    assert schedule.freeze is None
    if steps > 1:
        schedule.check_reaches_learn(epochs, steps)
        assert schedule.learn <= max(1, 0.2 * length + 0.5)
    if steps > 2:
        assert schedule.phase(0, 0) == "observe"


@pytest.mark.parametrize(
    ("epochs", "steps", "schedule"),
    [
        (20, 280, PhaseSchedule(estimate=6, learn=11, unit="step")),
        (10, 5000, PhaseSchedule(estimate=100, learn=200, unit="step")),
        (3, 24, PhaseSchedule(estimate=2, learn=5, unit="step")),
        (90, 450_000, PhaseSchedule(estimate=1, learn=2)),
    ],
)
def test_a_fiftieth_of_the_run_is_observed_and_estimated_each(epochs: int, steps: int, schedule: PhaseSchedule) -> None:
    assert PhaseSchedule.for_run(epochs, steps) == schedule


@pytest.mark.parametrize("epochs", [1, 2, 5, 100, math.inf])
def test_a_schedule_is_derived_for_a_run_of_unknown_length(epochs: float) -> None:
    PhaseSchedule.for_run(epochs, math.inf).check_reaches_learn(epochs, math.inf)


@pytest.mark.parametrize("steps", [10, 1000])
def test_a_run_bounded_by_steps_alone_learns_within_them(steps: int) -> None:
    schedule = PhaseSchedule.for_run(math.inf, steps)
    assert schedule.unit == "step"
    schedule.check_reaches_learn(math.inf, steps)


def test_a_word_that_is_no_phase_is_refused() -> None:
    assert get_args(Phase) == PHASES == ("off", "observe", "estimate", "learn", "freeze")
    with pytest.raises(ValueError, match=r"A phase is one of off, observe, .* Found 'train'"):
        check_phase("train")
