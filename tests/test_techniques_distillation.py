"""Distillation: the loss, the teacher, and what it can serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.techniques.distillation import distillation_loss
from tests.runs import Net, every_epoch, fit, loader, qat, trainer
from tests.test_resume import assert_same_run


@pytest.mark.quick
def test_the_loss_is_the_divergence_of_the_softened_distributions() -> None:
    student, teacher = torch.randn(5, 3, 4), torch.randn(5, 3, 4)
    p, q = (teacher / 2).softmax(-1).double(), (student / 2).softmax(-1).double()
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0).double(), expected, rtol=1e-5, atol=1e-6)


class Watch(L.Callback):
    """Keeps the loss of each step, and the teacher's outputs."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.distances: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self.distances.append(float(trainer.callback_metrics["lfq/distillation"]))


@pytest.mark.quick
def test_the_teacher_is_the_float_model_that_the_fit_began_with(tmp_path: Path) -> None:
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    distillation = lfq.Distillation(0.5)
    fit(tmp_path, model, callbacks=[distillation])
    teacher = distillation.state_dict()["teacher"]
    assert list(teacher) == list(before)
    assert all(torch.equal(teacher[k], v) for k, v in before.items())
    assert not any("teacher" in name or "copy" in name for name in model.state_dict())
    assert "training_step" not in model.__dict__
    assert not model._forward_hooks


@pytest.mark.quick
@pytest.mark.parametrize("first", [True, False])
def test_the_loss_is_shared_in_either_order_of_callbacks(tmp_path: Path, first: bool) -> None:
    class Plain(Net):
        def training_step(self, batch: list[Tensor]) -> dict[str, Tensor]:  # no batch_idx, and a mapping
            self.plain = nn.functional.cross_entropy(self(batch[0]), batch[1])
            return {"loss": self.plain, "more": self.plain.detach()}

    class Check(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            distance = trainer.callback_metrics["lfq/distillation"]
            torch.testing.assert_close(outputs["loss"], 0.7 * pl_module.plain.detach() + 0.3 * distance)
            assert "more" in outputs

    pair = [qat(), lfq.Distillation(0.3, temperature=2.0)]
    callbacks = pair[::-1] if first else pair
    fit(tmp_path, Plain(), callback=callbacks[0], callbacks=[callbacks[1], Check()])


def test_the_named_submodule_gives_the_same_as_the_forward_that_ends_with_it(tmp_path: Path) -> None:
    watched = []
    for name in (None, "head"):
        watch = Watch()
        fit(tmp_path / str(name), callbacks=[lfq.Distillation(output_of=name), watch])
        watched.append((watch.losses, watch.distances))
    assert watched[0] == watched[1]
    assert watched[0][1][-1] > 0


def test_a_step_that_calls_the_named_network_itself_is_served(tmp_path: Path) -> None:
    class Inner(Net):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1]) + 0 * self(batch[0]).sum() * 0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Direct(Inner):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
            return loss + 0 * sum(p.sum() for p in self.parameters())

    rules = [lfq.Rule(name, weight=None, activation=None) for name in ("first", "second", "head")]
    watch = Watch()
    fit(tmp_path, Direct(), callback=qat(rules=rules), callbacks=[lfq.Distillation(output_of="network"), watch])
    assert watch.distances[0] == pytest.approx(0.0, abs=1e-6)  # the student is its teacher in the first step
    assert watch.distances[-1] > 0


@pytest.mark.parametrize("source", ["state", "file"])
def test_a_resumed_run_has_the_same_teacher(tmp_path: Path, source: str) -> None:
    torch.manual_seed(7)
    start = trainer(tmp_path, [], max_epochs=1)
    start.fit(Net(), loader())
    start.save_checkpoint(tmp_path / "float.ckpt")
    teacher = tmp_path / "float.ckpt" if source == "file" else None

    def run(directory: Path, **more: Any) -> tuple[Any, ...]:
        callbacks = [lfq.Distillation(teacher=teacher), every_epoch(tmp_path)]
        return fit(directory, callbacks=callbacks, max_epochs=4, **more)

    whole = run(tmp_path)
    for epoch in (0, 2):
        assert_same_run(run(tmp_path / str(epoch), ckpt_path=tmp_path / f"epoch={epoch}.ckpt"), whole)
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)["callbacks"]
    assert any("Distillation" in key for key in saved) == (source == "state")


def test_a_second_fit_keeps_the_teacher_and_a_learned_model_needs_one(tmp_path: Path) -> None:
    distillation = lfq.Distillation()
    model, _, _ = fit(tmp_path, callbacks=[distillation])
    first = {k: v.clone() for k, v in distillation.state_dict()["teacher"].items()}
    fit(tmp_path / "more", model, callbacks=[distillation])
    assert all(torch.equal(first[k], v) for k, v in distillation.state_dict()["teacher"].items())
    with pytest.raises(ValueError, match="pass `teacher=`"):
        fit(tmp_path / "again", model, callbacks=[lfq.Distillation()])


def test_another_model_has_a_teacher_of_its_own(tmp_path: Path) -> None:
    distillation = lfq.Distillation()
    fit(tmp_path, callbacks=[distillation])
    torch.manual_seed(7)
    model = Net()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    fit(tmp_path, model, callbacks=[distillation])
    assert all(torch.equal(start[k], v) for k, v in distillation.state_dict()["teacher"].items())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_it_trains_in_lower_precision(tmp_path: Path, precision: Any) -> None:
    watch = Watch()
    fit(tmp_path, callbacks=[lfq.Distillation(), watch], precision=precision)
    assert all(loss == loss for loss in watch.losses)


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Twice(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) + self(batch[0])).sum()


class Never(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.forward(batch[0]).sum()


class Pair(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])[0].sum()


@pytest.mark.parametrize(
    ("module", "output_of", "found"),
    [
        (Manual, None, "Found manual"),
        (Twice, None, "Found 2 calls"),
        (Never, None, "Found no call"),
        (Pair, None, "type tuple"),
        (Never, "head", "features"),
        (Net, "tail", "Found 'tail'"),
    ],
)
def test_what_cannot_be_served_raises_before_any_weight_moves(
    tmp_path: Path, module: type[Net], output_of: str | None, found: str
) -> None:
    model = module()
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(ValueError, match=found):
        fit(tmp_path, model, callbacks=[lfq.Distillation(output_of=output_of)], num_sanity_val_steps=0)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    assert "training_step" not in model.__dict__


@pytest.mark.quick
@pytest.mark.parametrize("options", [{"weight": 0.0}, {"weight": 1.5}, {"temperature": 0.0}])
def test_wrong_arguments_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        lfq.Distillation(**options)
