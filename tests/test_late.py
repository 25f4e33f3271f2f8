"""Quantizers that had no data when the others began to learn: they observe on, end no run, and join."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lfq_lightning as lfq
from lfq_lightning.gathering import Gathered, gathering
from lfq_lightning.phases import join, model_phase
from lfq_lightning.placement.points import Point, points
from lfq_lightning.records.trajectory import read_trajectory
from tests.assertions import assert_bit_equal
from tests.runs import every_epoch, fit, qat

NAME = "experts.1.input_quantizer"
NEVER = r"experts\.1\.input_quantizer never saw data"


class Experts(L.LightningModule):
    """Positive samples go to one expert, negative ones to another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.last = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = torch.zeros_like(h)
        for chosen, expert in zip((x[:, 0] >= 0, x[:, 0] < 0), self.experts, strict=True):
            at = chosen.nonzero()[:, 0]
            y = y.index_add(0, at, expert(h[at]))
        return self.last(y)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def samples(signs: list[int]) -> DataLoader[Any]:
    """A batch of four for each sign."""
    x = torch.randn(4 * len(signs), 4, generator=torch.Generator().manual_seed(0))
    x[:, 0] = x[:, 0].abs() * torch.tensor(signs).repeat_interleave(4)
    return DataLoader(TensorDataset(x), batch_size=4)


def learned(model: nn.Module) -> dict[str, str]:
    return {name: quantizer.phase for name, quantizer in lfq.quantizers(model).items()}


STEPS = lfq.PhaseSchedule(observe=0, estimate=1, learn=2, unit="step")


@pytest.mark.quick
def test_an_expert_without_tokens_joins_in_the_step_after_its_first_ones(tmp_path: Path) -> None:
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            quantizer = pl_module.experts[1].input_quantizer
            seen.append((quantizer.phase, quantizer.quantizes, model_phase(pl_module)))

    with pytest.warns(UserWarning, match=NEVER) as said:
        model, _, _ = fit(
            tmp_path,
            Experts(),
            callback=qat(schedule=STEPS, record_every_n_steps=1),
            callbacks=[Watch()],
            data=samples([1, 1, 1, 1, -1, -1]),
            max_epochs=1,
        )
    assert len([w for w in said if "never saw data" in str(w.message)]) == 1
    assert [phase for phase, _, _ in seen] == ["observe", "estimate", "observe", "observe", "learn", "learn"]
    assert [quantizes for _, quantizes, _ in seen] == [False, False, False, False, True, True]
    assert [phase for _, _, phase in seen[2:]] == ["learn"] * 4  # of those that have data
    quantizer = model.experts[1].input_quantizer
    assert quantizer.learned
    assert quantizer.scale != quantizer.scale_reference  # it has moved since
    assert quantizer.scale.grad is None or quantizer.scale.grad.isfinite().all()
    rows = [row for row in read_trajectory(tmp_path / "trajectory.csv") if row.quantizer == NAME]
    assert [row.phase for row in rows] == ["observe", "estimate", "observe", "observe", "learn", "learn"]


def test_a_run_that_is_resumed_before_it_joins_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    class Later(Experts):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            sign = 1.0 if self.current_epoch < 3 else -1.0
            return self(batch[0] * torch.tensor([sign, 1.0, 1.0, 1.0])).square().mean()

    run: Any = {"data": samples([1, 1]), "max_epochs": 5}
    with pytest.warns(UserWarning, match=NEVER):
        whole, _, _ = fit(tmp_path / "a", Later(), callbacks=[every_epoch(tmp_path / "a")], **run)
    again = {"callbacks": [every_epoch(tmp_path / "b")], "ckpt_path": tmp_path / "a" / "epoch=2.ckpt"}
    resumed, _, _ = fit(tmp_path / "b", Later(), **again, **run)
    assert set(learned(resumed).values()) == {"learn"}
    for name, value in whole.state_dict().items():
        assert_bit_equal(resumed.state_dict()[name], value)


def test_a_short_second_fit_goes_on_although_an_expert_never_had_data(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=NEVER):
        model, _, _ = fit(tmp_path, Experts(), data=samples([1]))
    again, _, _ = fit(tmp_path / "again", model, data=samples([1, -1]), max_epochs=1)
    assert set(learned(again).values()) == {"learn"}


def test_it_joins_frozen_where_the_others_are_frozen(tmp_path: Path) -> None:
    schedule = lfq.PhaseSchedule(observe=0, estimate=1, learn=2, freeze=3, unit="step")
    run: Any = {"data": samples([1, 1, 1, 1, -1, -1]), "max_epochs": 1}
    with pytest.warns(UserWarning, match=NEVER):
        model, _, _ = fit(tmp_path, Experts(), callback=qat(schedule=schedule), **run)
    assert set(learned(model).values()) == {"freeze"}
    assert model.experts[1].input_quantizer.estimated


def test_an_input_of_nothing_but_zeros_is_no_range_to_learn_from() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(model[0].bias, -100.0)
    lfq.attach(model)
    lfq.calibrate(model, [torch.randn(8, 4)])
    with pytest.warns(UserWarning, match=r"2\.input_quantizer"):
        lfq.set_phase(model, "learn")
    assert model[2].input_quantizer.phase == "observe"


def test_what_no_data_reached_is_exported_in_float_with_a_warning(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(model[0].bias, -100.0)
    lfq.attach(model)
    x = torch.randn(8, 4)
    lfq.calibrate(model, [x])
    with pytest.warns(UserWarning, match=r"2\.input_quantizer"):
        lfq.set_phase(model, "learn")
    with pytest.warns(UserWarning, match=r"exported in float. Found no range for 2\.input_quantizer"):
        frozen = lfq.freeze(model)
    assert torch.equal(frozen(x), model.eval()(x))
    with pytest.warns(UserWarning, match=r"exported in float. Found no range for 2\.input_quantizer"):
        parity = lfq.export_onnx(model, (x,), tmp_path / "x.onnx")
    assert parity.agrees
    assert model[2].input_quantizer.late  # the model is as it was


@pytest.mark.quick
def test_by_hand_it_stays_in_float_until_the_next_call_takes_it_along() -> None:
    model = Experts()
    lfq.attach(model, weight=4, activation=4)
    positive, negative = (batch[0] for batch in samples([1, -1]))
    lfq.calibrate(model, [positive])
    quantizer = model.experts[1].input_quantizer
    assert torch.equal(quantizer.eval()(negative), negative)  # it has no scale to quantize with
    quantizer.train()
    with pytest.warns(UserWarning, match=NEVER):
        lfq.set_phase(model, "learn")
    lfq.set_phase(model, "learn")  # it was named
    model(negative).sum().backward()
    assert quantizer.phase == "observe"
    lfq.set_phase(model, "learn")
    assert set(learned(model).values()) == {"learn"}
    assert not torch.equal(quantizer(negative), negative)


def test_on_several_ranks_it_joins_everywhere_where_any_rank_had_data() -> None:
    ranks = [Experts()]
    ranks.append(copy.deepcopy(ranks[0]))
    positive, negative = (batch[0] for batch in samples([1, -1]))
    parts: list[Tensor] = []
    for model in ranks:
        lfq.attach(model, weight=4, activation=4)
        lfq.calibrate(model, [positive])
        with pytest.warns(UserWarning, match=NEVER):
            lfq.set_phase(model, "learn")

    def late(model: nn.Module) -> dict[str, Point]:
        return {name: point for name, point in points(model).items() if point.quantizer.late}

    def late_quantizers(model: nn.Module) -> list[lfq.LearnableFakeQuantize]:
        return [point.quantizer for point in late(model).values()]

    def keep(flat: Tensor, operation: str) -> Tensor:
        parts.append(flat)
        return flat

    def other(flat: Tensor, operation: str) -> Tensor:
        found = parts.pop(0)
        return torch.maximum(flat, found) if operation == "max" else flat + found

    for model, batch, reduce in zip(ranks, (negative, positive), (keep, other), strict=True):
        with gathering(late_quantizers(model)):
            model(batch)
            Gathered(late(model)).merge(reduce)
        assert join(late_quantizers(model), "learn") == [model.experts[1].input_quantizer]
    assert_bit_equal(ranks[1].experts[1].input_quantizer.scale, ranks[0].experts[1].input_quantizer.scale)


@pytest.mark.quick
def test_where_no_input_saw_data_nothing_can_learn() -> None:
    model = Experts()
    lfq.attach(model)
    with pytest.raises(ValueError, match=r"Found none for first\.input_quantizer, experts\.0\.input_quantizer"):
        lfq.set_phase(model, "learn")


def test_a_late_quantizer_is_late_in_its_state_dict_too() -> None:
    model, other = Experts(), Experts()
    for each in (model, other):
        lfq.attach(each, weight=4, activation=4)
    lfq.calibrate(model, [next(iter(samples([1])))[0]])
    with pytest.warns(UserWarning, match=NEVER):
        lfq.set_phase(model, "learn")
    other.load_state_dict(model.state_dict())
    assert other.experts[1].input_quantizer.late
    assert model_phase(other) == "learn"
