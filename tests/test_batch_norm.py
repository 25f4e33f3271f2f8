"""BatchNorm's statistics at few bits: estimated anew after the last step, where nobody says otherwise."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lfq_lightning as lfq
from lfq_lightning.training.batch_norm import reestimate_batch_norm
from tests.runs import Net, StatefulLoader, every_epoch, fit, loader, qat
from tests.test_resume import assert_same_run
from tests.test_techniques_batch_norm import by_hand


def few(**options: Any) -> lfq.QuantizationAwareTraining:
    return qat(weight=2, rules=[lfq.Rule("head", weight=8)], **options)


class Seen(L.Callback):
    """The running mean with which each validation begins."""

    def __init__(self) -> None:
        self.validated: list[Tensor] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: Net) -> None:
        if not trainer.sanity_checking:
            self.validated.append(pl_module.norm.running_mean.clone())


def assert_of_its_weights(model: Net) -> None:
    mean, variance = by_hand(model, 8)
    torch.testing.assert_close(model.norm.running_mean, mean)
    torch.testing.assert_close(model.norm.running_var, variance)


def made(kind: type[Net] = Net) -> Net:
    torch.manual_seed(0)
    return kind()


def left_by_training(tmp_path: Path, kind: type[Net] = Net, **options: Any) -> Tensor:
    return fit(tmp_path / "kept", made(kind), callback=few(batch_norm="keep"), **options)[0].norm.running_mean


@pytest.mark.quick
@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 21}])
def test_below_4_bits_they_are_those_of_the_last_weights_for_the_last_validation_and_checkpoint(
    tmp_path: Path, length: dict[str, Any]
) -> None:
    seen, saved = Seen(), L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=1)
    model, _, _ = fit(tmp_path, made(), callback=few(), callbacks=[seen, saved], val_check_interval=1, **length)
    assert model.norm.training
    assert_of_its_weights(model)
    assert not torch.equal(model.norm.running_mean, left_by_training(tmp_path, **length))
    assert len(seen.validated) > 1
    assert torch.equal(seen.validated[-1], model.norm.running_mean)
    state = torch.load(saved.best_model_path, weights_only=True)["state_dict"]
    assert torch.equal(state["norm.running_mean"], model.norm.running_mean)
    assert model.norm.momentum == 0.1


def test_where_a_fit_stops_early_they_are_estimated_at_its_end(tmp_path: Path) -> None:
    class Stops(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Net) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    model, run, _ = fit(tmp_path, callback=few(), callbacks=[Stops()], max_epochs=9)
    assert run.current_epoch == 3
    assert_of_its_weights(model)


@pytest.mark.quick
def test_weights_and_random_numbers_are_the_same_with_and_without(tmp_path: Path) -> None:
    class Noise(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step([batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]], batch_idx)

    ends = []
    for choice in ("auto", "keep"):
        model, _, _ = fit(tmp_path / choice, made(Noise), callback=few(batch_norm=choice))
        ends.append((model.first.weight.detach(), torch.rand(1), model.norm.running_mean))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert not torch.equal(ends[0][2], ends[1][2])


def frozen_by_user() -> Net:
    model = Net()
    model.norm.running_mean.fill_(0.5)
    model.norm.eval()
    return model


@pytest.mark.quick
@pytest.mark.parametrize(
    ("callback", "callbacks"),
    [
        (lambda: qat(), []),
        (lambda: few(batch_norm="keep"), []),
        (lambda: few(), [lfq.BatchNormStatistics(reestimate=0)]),
    ],
)
def test_from_4_bits_on_or_by_choice_they_are_as_training_leaves_them(
    tmp_path: Path, callback: Any, callbacks: list[L.Callback]
) -> None:
    model, _, _ = fit(tmp_path, callback=callback(), callbacks=callbacks)
    with pytest.raises(AssertionError):
        assert_of_its_weights(model)


def test_3_bits_are_fewer_than_4_and_a_dev_run_goes_through_it_too(tmp_path: Path) -> None:
    three = [lfq.Rule("second", weight=3)]
    assert_of_its_weights(fit(tmp_path, callback=qat(rules=three))[0])
    model, _, _ = fit(tmp_path, callback=qat(rules=three), fast_dev_run=True)
    torch.testing.assert_close(model.norm.running_mean, by_hand(model, 1)[0])


def test_at_any_width_they_are_estimated_where_that_is_asked_for(tmp_path: Path) -> None:
    assert_of_its_weights(fit(tmp_path, callback=qat(batch_norm="reestimate"))[0])


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
@pytest.mark.parametrize("options", [{}, {"learn": "scales"}])
def test_statistics_that_do_not_move_in_training_keep_still(tmp_path: Path, options: dict[str, Any]) -> None:
    model = Net() if options else frozen_by_user()
    before = model.norm.running_mean.clone()
    fit(tmp_path, model, callback=few(**options))
    assert torch.equal(model.norm.running_mean, before)


class Half(Net):
    """One of its BatchNorms normalizes by the statistics that it came with."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.BatchNorm2d(4).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(self.fixed(self.norm(self.first(x))))).flatten(1))


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
def test_of_two_layers_the_one_that_moves_in_training_is_estimated(tmp_path: Path) -> None:
    model, _, _ = fit(tmp_path, Half(), callback=few())
    assert torch.equal(model.fixed.running_mean, torch.zeros(4))
    assert_of_its_weights(model)


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    def run(directory: Path, **more: Any) -> tuple[Any, ...]:
        return fit(directory, callback=few(), callbacks=[every_epoch(tmp_path)], max_epochs=4, **more)

    whole = run(tmp_path)
    for epoch in (0, 2):
        assert_same_run(run(tmp_path / str(epoch), ckpt_path=tmp_path / f"epoch={epoch}.ckpt"), whole)


@pytest.mark.quick
def test_what_cannot_be_estimated_is_said_before_training_and_refused_where_it_was_asked_for(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cannot be estimated anew .* or a state: pass another as `loader`"):
        model, _, _ = fit(tmp_path, made(), callback=few(), data=StatefulLoader())
    assert torch.equal(model.norm.running_mean, left_by_training(tmp_path, data=StatefulLoader()))
    model = Net()
    before = model.first.weight.detach().clone()
    with pytest.raises(ValueError, match="must not disturb the training loader"):
        fit(tmp_path, model, callback=few(batch_norm="reestimate"), data=StatefulLoader())
    assert torch.equal(model.first.weight, before)


class Scales(Net):
    """Its `forward` takes another input than a batch has in its place, which broadcasts."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return Net.forward(self, x * scale.view(-1, 1, 1, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0], torch.ones(1)), batch[1])

    validation_step = L.LightningModule.validation_step


class Normalizes(Net):
    """Prepares what a batch holds in `training_step`."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([(batch[0] - 0.5) / 0.25, batch[1]], batch_idx)


class Shifts(Net):
    """Prepares it otherwise, with the spread that it has."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([batch[0] + 1.0, batch[1]], batch_idx)


class Wraps(Net):
    """Its `forward` cannot be run on a batch."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 5:
            raise RuntimeError("give videos")
        return super().forward(x[0])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0][None]), batch[1])

    validation_step = L.LightningModule.validation_step


@pytest.mark.quick
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Scales, "'norm' meets means .* and .* times the variance"),
        (Normalizes, "'norm' meets means .* and .* times the variance"),
        (Shifts, "'norm' meets means .* standard deviations apart, and 1.* times the variance"),
        (Wraps, "RuntimeError: give videos Wraps must take the inputs of a batch"),
    ],
)
def test_where_forward_does_not_do_what_training_does_it_is_said_and_nothing_is_estimated(
    tmp_path: Path, kind: type[Net], why: str
) -> None:
    with pytest.warns(UserWarning, match=f"is not what `training_step` does with it. Found that {why}") as said:
        model, _, _ = fit(tmp_path, made(kind), callback=few(example=False))
    assert sum("BatchNorm" in str(each.message) for each in said) == 1
    kept = left_by_training(tmp_path, kind)
    assert torch.equal(model.norm.running_mean, kept)


class Siamese(Net):
    """Two passes of a batch, with dropout between."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = nn.functional.dropout(batch[0], 0.1)
        return nn.functional.cross_entropy(self(x) + self(batch[0].flip(-1)), batch[1])


def test_augmentation_and_several_passes_are_no_difference(tmp_path: Path) -> None:
    assert_of_its_weights(fit(tmp_path, Siamese(), callback=few())[0])


class Moves(Net):
    """Has a batch normalized on its way to the device, before and after."""

    def on_before_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return [batch[0] - 0.5, batch[1]]

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return [batch[0] / 0.25, batch[1]]


def test_a_batch_goes_through_the_hooks_of_its_transfer(tmp_path: Path) -> None:
    model, _, _ = fit(tmp_path, Moves(), callback=few())
    model.eval()
    with torch.no_grad():
        parts = [model.first((x - 0.5) / 0.25).transpose(0, 1).flatten(1) for x, _ in loader()]
    torch.testing.assert_close(model.norm.running_mean, torch.stack([part.mean(1) for part in parts]).mean(0))


def test_estimating_compiles_nothing(tmp_path: Path) -> None:
    class Silent(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])  # Dynamo cannot trace Lightning's `log`

        validation_step = L.LightningModule.validation_step

    graphs = []
    for choice in ("auto", "keep"):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("eager")
        model: Any = torch.compile(made(Silent), backend=counter)
        fit(tmp_path / choice, model, callback=few(batch_norm=choice))
        graphs.append(counter.frame_count)
    torch.compiler.reset()
    assert graphs[0] == graphs[1] > 0


def test_a_failure_after_the_last_step_costs_nobody_the_fit(tmp_path: Path) -> None:
    class Tires(Net):
        """Cannot be run any more when all is trained."""

        def forward(self, x: Tensor) -> Tensor:
            if not self.training and self.trainer.global_step == 24:
                raise RuntimeError("out of memory")
            return super().forward(x)

        validation_step = L.LightningModule.validation_step

    with pytest.warns(UserWarning, match="stay as training has left them.* Found RuntimeError: out of memory"):
        model, run, _ = fit(tmp_path, made(Tires), callback=few())
    assert run.state.finished
    assert torch.equal(model.norm.running_mean, left_by_training(tmp_path))


@pytest.mark.quick
def test_a_layer_that_no_batch_reaches_keeps_its_statistics() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.judge = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.generator(x)

    model = Two()
    model.judge.running_mean.fill_(3.0)
    model.judge.num_batches_tracked.fill_(7)
    reestimate_batch_norm(model, [torch.ones(4, 2)])
    assert model.generator.running_mean.tolist() == [1.0, 1.0]
    assert model.judge.running_mean.tolist() == [3.0, 3.0]
    assert model.judge.num_batches_tracked == 7


@pytest.mark.parametrize(("batches", "epochs", "told"), [(8, 3, 20), (64, 5, 32)])
def test_as_many_batches_as_a_tenth_of_the_run_and_20_at_least(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, batches: int, epochs: int, told: int
) -> None:
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    ran: list[int] = []

    class Counts(Net):
        def forward(self, x: Tensor) -> Tensor:
            ran.append(len(x))
            return super().forward(x)

        validation_step = L.LightningModule.validation_step

    fit(tmp_path, Counts(), callback=few(example=False), data=loader(64 // batches), max_epochs=epochs)
    assert f"after the last step, from {told} batches or all there are" in caplog.text
    assert len(ran) == batches * epochs + min(told, batches) + 1  # a rehearsal of the first


def test_a_wrong_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`batch_norm` must be one of auto, reestimate, keep\. Found 'freeze'"):
        lfq.QuantizationAwareTraining(batch_norm="freeze")  # type: ignore[arg-type]


def test_a_network_without_batch_norm_hears_nothing_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Normless(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Identity()

    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*BatchNorm")
        fit(tmp_path, Normless(), callback=few(), data=StatefulLoader())
    assert "BatchNorm" not in caplog.text
