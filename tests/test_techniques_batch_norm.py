"""BatchNorm's statistics: frozen from a point on, or estimated anew, on one rank and on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lfq_lightning as lfq
from lfq_lightning.running import batch_norms
from lfq_lightning.training.batch_norm import reestimate_batch_norm
from tests.ranks import start_two
from tests.runs import Net, StatefulLoader, every_epoch, fit, images, loader, qat, trainer
from tests.test_resume import assert_same_run


def by_hand(model: Net, count: int) -> tuple[Tensor, Tensor]:
    """Mean over batches of the mean and the variance that BatchNorm meets."""
    met: list[Tensor] = []
    with torch.no_grad(), model.norm.register_forward_pre_hook(lambda _, args: met.append(args[0])):
        model.eval()
        for batch in list(loader())[:count]:
            model(batch[0])
    parts = [m.transpose(0, 1).flatten(1) for m in met]
    return torch.stack([p.mean(1) for p in parts]).mean(0), torch.stack([p.var(1) for p in parts]).mean(0)


@pytest.mark.quick
def test_statistics_are_the_mean_of_the_batches_of_the_quantized_model(tmp_path: Path) -> None:
    model, _, _ = fit(tmp_path)
    model.train()
    affine = model.norm.weight.clone()
    qparams = {k: v.clone() for k, v in model.state_dict().items() if "quantizer" in k and isinstance(v, Tensor)}
    reestimate_batch_norm(model, list(loader())[:5])
    assert all(module.training for module in model.modules())
    assert model.norm.momentum == 0.1
    mean, variance = by_hand(model, 5)
    torch.testing.assert_close(model.norm.running_mean, mean)
    torch.testing.assert_close(model.norm.running_var, variance)
    assert torch.equal(model.norm.weight, affine)
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in qparams.items())


def test_without_batches_statistics_stay_and_it_raises() -> None:
    model = Net()
    model.norm.running_mean.fill_(3.0)
    with pytest.raises(ValueError, match="at least one batch"):
        reestimate_batch_norm(model, [])
    assert (model.norm.running_mean == 3.0).all()


class Means(L.Callback):
    """The running mean and the mode of BatchNorm after each epoch's first and last batch."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []
        self.modes: list[bool] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Net, *_: Any) -> None:
        self.means.append(pl_module.norm.running_mean.clone())
        self.modes.append(pl_module.norm.training)


@pytest.mark.quick
@pytest.mark.parametrize("moment", ["learn", 2])
def test_statistics_are_frozen_from_a_phase_or_epoch_on_while_affine_parameters_learn(
    tmp_path: Path, moment: Any
) -> None:
    means = Means()
    model, _, _ = fit(tmp_path, callbacks=[lfq.BatchNormStatistics(freeze=moment), means], max_epochs=4)
    assert means.modes == [True] * 16 + [False] * 16
    assert not torch.equal(means.means[14], means.means[15])
    assert all(torch.equal(mean, means.means[15]) for mean in means.means[16:])
    assert model.norm.training
    assert not torch.equal(model.norm.weight, torch.ones(4))


@pytest.mark.quick
def test_estimating_at_the_end_uses_the_trained_weights(tmp_path: Path) -> None:
    technique = lfq.BatchNormStatistics(reestimate="end", batches=4)
    model, _, _ = fit(tmp_path, callbacks=[technique])
    mean, variance = by_hand(model, 4)
    torch.testing.assert_close(model.norm.running_mean, mean)
    torch.testing.assert_close(model.norm.running_var, variance)


@pytest.mark.parametrize("moment", ["learn", 2])
def test_estimating_once_at_a_phase_or_epoch_then_freezing(tmp_path: Path, moment: Any) -> None:
    means = Means()
    technique = lfq.BatchNormStatistics(freeze="learn", reestimate=moment, loader=loader())
    fit(tmp_path, callbacks=[technique, means], max_epochs=4)
    assert not torch.equal(means.means[15], means.means[16])
    assert all(torch.equal(mean, means.means[16]) for mean in means.means[16:])


def test_another_model_is_estimated_too(tmp_path: Path) -> None:
    technique = lfq.BatchNormStatistics(freeze="learn", reestimate="learn")
    for _ in range(2):
        means = Means()
        fit(tmp_path, callbacks=[technique, means])
        assert not torch.equal(means.means[15], means.means[16])


def test_the_random_numbers_of_the_run_stay_as_they_are(tmp_path: Path) -> None:
    weights = []
    for technique in ([], [lfq.BatchNormStatistics(reestimate="learn")]):
        data = DataLoader(images(), batch_size=8, shuffle=True)
        model, _, _ = fit(tmp_path / str(len(technique)), callbacks=technique, data=data)
        weights.append(model.head.weight.detach())  # running statistics take no part in training
    assert torch.equal(*weights)


@pytest.mark.parametrize("options", [{"freeze": "learn"}, {"freeze": 3, "reestimate": "learn"}, {"reestimate": 2}])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, options: dict[str, Any]) -> None:
    def run(directory: Path, **more: Any) -> tuple[Any, ...]:
        technique = lfq.BatchNormStatistics(**options)
        return fit(directory, callbacks=[technique, every_epoch(tmp_path)], max_epochs=5, **more)

    whole = run(tmp_path)
    for epoch in (1, 2, 3):
        assert_same_run(run(tmp_path / str(epoch), ckpt_path=tmp_path / f"epoch={epoch}.ckpt"), whole)


def test_a_loader_that_estimating_would_disturb_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass another as `loader`"):
        fit(tmp_path, callbacks=[lfq.BatchNormStatistics(reestimate=1)], data=StatefulLoader())


class Several(Net):
    """Trains on batches of several loaders at once."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["few"], batch_idx)


def test_several_training_loaders_are_run_as_they_are_trained_on(tmp_path: Path) -> None:
    data = {"few": loader(), "many": loader(4)}
    model = Several()
    with pytest.raises(ValueError, match="Found training loaders in a dict"):
        fit(tmp_path, model, callbacks=[lfq.BatchNormStatistics(reestimate="end")], data=data)
    technique = lfq.BatchNormStatistics(reestimate="end", batches=4, forward=lambda m, batch: m(batch["few"][0]))
    fit(tmp_path, model, callbacks=[technique], data=data)
    torch.testing.assert_close(model.norm.running_mean, by_hand(model, 4)[0])


@pytest.mark.quick
def test_a_guess_at_how_to_run_the_module_that_is_wrong_is_said(tmp_path: Path) -> None:
    class Normalizes(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step([(batch[0] - 0.5) / 0.25, batch[1]], batch_idx)

    with pytest.warns(UserWarning, match="estimates from wrong batches: .* Found that 'norm' meets means"):
        fit(tmp_path, Normalizes(), callbacks=[lfq.BatchNormStatistics(reestimate="end")])


def test_statistics_survive_a_batch_that_fails() -> None:
    model = Net()
    model(next(iter(loader()))[0])
    before = {name: buffer.clone() for name, buffer in model.norm.named_buffers()}
    with pytest.raises(RuntimeError, match="channels"):
        reestimate_batch_norm(model, [*loader(), torch.zeros(2, 3, 8, 8)])
    assert all(torch.equal(model.norm.get_buffer(name), buffer) for name, buffer in before.items())


def test_a_module_without_forward_is_refused_before_it_trains_unless_told_how_to_run_it(tmp_path: Path) -> None:
    class Inner(Net):
        forward = L.LightningModule.forward

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(Net.forward(self, batch[0]), batch[1])

        validation_step = L.LightningModule.validation_step

    def run(**options: Any) -> Any:
        made = trainer(tmp_path, [lfq.BatchNormStatistics(reestimate="end", **options)], max_epochs=1)
        made.fit(model, loader())
        return made

    model = Inner()
    before = model.first.weight.detach().clone()
    with pytest.raises(ValueError, match="Found no `forward` in Inner"):
        run()
    assert torch.equal(model.first.weight, before)
    assert run(forward=lambda module, batch: Net.forward(module, batch[0])).global_step > 0


def test_a_module_without_batch_norm_is_named(tmp_path: Path) -> None:
    class Normless(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Identity()

    with pytest.warns(UserWarning, match="BatchNormStatistics has nothing to do: Normless has no BatchNorm"):
        fit(tmp_path, Normless(), callbacks=[lfq.BatchNormStatistics(freeze=1)])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "Give `freeze` or `reestimate` an epoch or a phase"),
        ({"freeze": "end"}, "`freeze` must be an epoch, counted from 0, or one of off, .*, freeze. Found 'end'"),
        ({"reestimate": "ends"}, "`reestimate` must be an epoch, .* freeze, end. Found 'ends'"),
        ({"reestimate": -1}, "`reestimate` must be an epoch, .* Found -1"),
        ({"freeze": True}, "`freeze` must be an epoch, .* Found True"),
        ({"freeze": 1, "batches": 0}, "`batches` must be at least 1. Found 0"),
        ({"freeze": 1, "loader": {}}, "`loader` must give batches. Found a mapping"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lfq.BatchNormStatistics(**options)


def test_the_wrong_order_of_callbacks_is_refused_with_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"QuantizationAwareTraining\(...\), BatchNormStatistics"):
        fit(tmp_path, callback=lfq.BatchNormStatistics(freeze=1), callbacks=[qat()])


def test_after_an_error_batch_norm_has_its_mode_back(tmp_path: Path) -> None:
    class Fails(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if self.current_epoch == 1:
                raise RuntimeError("stop")
            return super().training_step(batch, batch_idx)

    model = Fails()
    with pytest.raises(RuntimeError, match="stop"):
        trainer(tmp_path, [lfq.BatchNormStatistics(freeze=0)]).fit(model, loader())
    assert model.norm.training


def test_layers_without_running_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(2))
    assert batch_norms(model) == [model[0]]
    assert batch_norms(nn.SyncBatchNorm.convert_sync_batchnorm(model))  # it needs a GPU to run


def test_two_ranks_end_with_the_same_statistics(tmp_path: Path) -> None:
    assert start_two(tmp_path, "techniques") == {}
    one, two = (torch.load(tmp_path / f"batch norm/rank{rank}.pt") for rank in (0, 1))
    own = torch.load(tmp_path / "batch norm/mean.pt")
    for key in ("running_mean", "running_var"):
        assert torch.equal(one[key], two[key])
        torch.testing.assert_close(one[key], own[key])
    assert not torch.equal(one["running_mean"], torch.zeros(4))
