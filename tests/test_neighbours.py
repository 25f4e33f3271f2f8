"""Beside Lightning's other callbacks, plugins and options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    RichProgressBar,
    StochasticWeightAveraging,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lfq_lightning as lfq
from lfq_lightning.state_dicts import descriptions
from tests.runs import BATCHES, Net, every_epoch, fit, images, loader, qat, trainer

X = images().tensors[0]


def assert_learned(model: nn.Module) -> None:
    assert {q.phase for q in lfq.quantizers(model).values()} == {"learn"}
    for name, quantizer in lfq.quantizers(model).items():
        assert not torch.equal(quantizer.scale, quantizer.scale_reference), name


class Rising(Net):
    """Logs a validation loss that is best in float and rises from then on."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch))


# ---- checkpoints and stopping -------------------------------------------------------------------------------------


def test_best_is_the_best_of_the_epochs_that_learn_where_it_is_asked_for(tmp_path: Path) -> None:
    kept = {}
    for name, wrap in (("plain", lambda checkpoint: checkpoint), ("learned", lfq.while_learning)):
        kept[name] = wrap(ModelCheckpoint(tmp_path / name, "{epoch}", monitor="val_loss"))
        fit(tmp_path, Rising(), callbacks=[kept[name]], max_epochs=4)
    assert Path(kept["plain"].best_model_path).name == "epoch=0.ckpt"
    assert [p.name for p in (tmp_path / "learned").iterdir()] == ["epoch=2.ckpt"]
    best = lfq.load_from_checkpoint(Net, kept["learned"].best_model_path)
    assert {q.phase for q in lfq.quantizers(best).values()} == {"learn"}


def test_early_stopping_waits_for_learning_where_it_is_asked_to(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ended in phase 'estimate'"):
        _, made, _ = fit(tmp_path, Rising(), callbacks=[EarlyStopping("val_loss", patience=1)], max_epochs=6)
    assert made.current_epoch == 2
    patient = lfq.while_learning(EarlyStopping("val_loss", patience=1))
    model, made, _ = fit(tmp_path / "patient", Rising(), callbacks=[patient], max_epochs=6)
    assert made.current_epoch == 4
    assert_learned(model)


@pytest.mark.parametrize("path", ["last", "best", "hpc"])
def test_a_run_resumes_from_a_checkpoint_that_lightning_finds(tmp_path: Path, path: str) -> None:
    def options() -> dict[str, Any]:
        keep = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_last=True)
        return {"callbacks": [keep], "callback": qat()}

    model, made, _ = fit(tmp_path, **options())
    if path == "hpc":
        made.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
    if path == "best":
        for parameter in model.parameters():
            parameter.data.zero_()
        made.fit_loop.max_epochs = 4
        made.fit(model, loader(), loader(), ckpt_path=path, weights_only=True)
    else:
        model, made, _ = fit(tmp_path, ckpt_path=path, max_epochs=4, **options())
    assert made.current_epoch == 4
    assert_learned(model)


# ---- averages -----------------------------------------------------------------------------------------------------

AVERAGING = {
    "EMAWeightAveraging": lambda: EMAWeightAveraging(decay=0.5),
    "StochasticWeightAveraging": lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=3, annealing_epochs=1),
}
EXPECTED = ["ignore:.*sharding model layers:UserWarning", "ignore:Swapping scheduler:UserWarning"]


@pytest.mark.filterwarnings(*EXPECTED)
@pytest.mark.parametrize("kind", AVERAGING)
def test_averages_listed_after_ours_hold_quantizers_that_learned(tmp_path: Path, kind: str) -> None:
    averaging = AVERAGING[kind]()
    model, made, _ = fit(tmp_path, callbacks=[averaging], max_epochs=5)
    assert_learned(model)
    average = getattr(averaging._average_model, "module", averaging._average_model)
    for name, quantizer in lfq.quantizers(model).items():
        assert torch.equal(lfq.quantizers(average)[name].scale, quantizer.scale)
        assert quantizer.observer.minimum.isfinite().all()
    made.save_checkpoint(tmp_path / "x.ckpt")
    again = lfq.load_from_checkpoint(Net, tmp_path / "x.ckpt")
    assert torch.equal(again.eval()(X), model.eval()(X))


@pytest.mark.parametrize("kind", AVERAGING)
def test_averages_listed_before_ours_are_refused_with_the_order(tmp_path: Path, kind: str) -> None:
    model = Net()
    with pytest.raises(ValueError, match=rf"QuantizationAwareTraining\(\.\.\.\), {kind}\(\.\.\.\)"):
        fit(tmp_path, model, callback=AVERAGING[kind](), callbacks=[qat()])
    assert not lfq.quantizers(model)


@pytest.mark.filterwarnings(*EXPECTED)
def test_a_checkpoint_of_averages_holds_the_phase_and_the_estimates_of_the_run(tmp_path: Path) -> None:
    more = {"callback": qat(schedule=lfq.PhaseSchedule(0, 1, 3)), "max_epochs": 4}
    averaging = [EMAWeightAveraging(decay=0.999), every_epoch(tmp_path)]
    whole, _, _ = fit(tmp_path, callbacks=averaging, **more)
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    name = "second.input_quantizer"
    assert descriptions(saved["state_dict"])[name].switches == (True, True, False)
    learned = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    current, average = (learned[key][f"{name}.scale"] for key in ("current_model_state", "state_dict"))
    assert average == pytest.approx(float(current), rel=0.05)
    more = {"callback": qat(schedule=lfq.PhaseSchedule(0, 1, 3)), "max_epochs": 4}
    averaging = [EMAWeightAveraging(decay=0.999), every_epoch(tmp_path)]
    part, _, _ = fit(tmp_path / "b", callbacks=averaging, ckpt_path=tmp_path / "epoch=2.ckpt", **more)
    assert torch.equal(part.second.input_quantizer.scale, whole.second.input_quantizer.scale)


@pytest.mark.filterwarnings(*EXPECTED)
def test_a_float_run_with_averages_goes_on_quantized_from_its_weights_and_its_averages(tmp_path: Path) -> None:
    averaging = EMAWeightAveraging(decay=0.9)
    fit(tmp_path, callback=averaging, callbacks=[every_epoch(tmp_path)], max_epochs=2)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    found: dict[str, Tensor] = {}

    class Note(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            found["current"] = pl_module.second.weight.detach().clone()
            found["average"] = again._average_model.module.second.weight.detach().clone()

    again = EMAWeightAveraging(decay=0.9)
    more = {"callback": qat(schedule=lfq.PhaseSchedule(2, 3, 4)), "max_epochs": 5}
    more |= {"callbacks": [again, Note(), every_epoch(tmp_path)], "ckpt_path": tmp_path / "epoch=1.ckpt"}
    model, _, _ = fit(tmp_path / "b", **more)
    assert torch.equal(found["current"], saved["current_model_state"]["second.weight"])
    assert torch.equal(found["average"], saved["state_dict"]["second.weight"])
    assert_learned(model)


# ---- callbacks that change the model ------------------------------------------------------------------------------


@pytest.mark.parametrize("ours_first", [True, False])
def test_pruned_weights_stay_pruned_and_quantized_in_either_order(tmp_path: Path, ours_first: bool) -> None:
    pruning = ModelPruning("l1_unstructured", parameter_names=["weight"], amount=0.3)
    both = [qat(), pruning] if ours_first else [pruning, qat()]
    model, _, _ = fit(tmp_path, callback=both[0], callbacks=[both[1], every_epoch(tmp_path)])
    assert_learned(model)
    assert (model.second.weight == 0).float().mean() > 0.2
    assert lfq.load_from_checkpoint(Net, tmp_path / "epoch=1.ckpt").second.weight.isfinite().all()


class Backbone(Net):
    """The net with its body in `backbone`, as BackboneFinetuning wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(self.first, self.norm, nn.ReLU(), self.second)
        del self.first, self.norm, self.second

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.backbone(x)).flatten(1))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen:UserWarning")  # BatchNorm's, kept trainable
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("again", [False, True])
def test_a_finetuning_callback_neither_freezes_qparams_nor_adopts_them(
    tmp_path: Path, ours_first: bool, again: bool
) -> None:
    frozen: list[Tensor] = []

    class Watch(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert all(p.requires_grad for q in lfq.quantizers(pl_module).values() for p in q.parameters())
            frozen.append(pl_module.backbone[3].weight_quantizer.scale.detach().clone())

    model = Backbone()
    if again:
        lfq.attach(model, weight=4, activation=4)
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=4, verbose=False)
    both = [qat(), finetuning] if ours_first else [finetuning, qat()]
    _, made, _ = fit(tmp_path, model, callback=both[0], callbacks=[both[1], Watch()], max_epochs=6)
    assert torch.equal(frozen[2], frozen[3])
    assert not torch.equal(frozen[3], frozen[5])
    users = {id(p) for o in made.optimizers for g in o.param_groups for p in g["params"]}
    assert id(model.backbone[3].weight) in users
    assert not any(id(p) in users for q in lfq.quantizers(model).values() for p in q.parameters())


# ---- tuners -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*Failed to compute suggestion:UserWarning")
@pytest.mark.parametrize("ours_first", [True, False])
def test_the_learning_rate_finder_leaves_quantizers_as_they_were(tmp_path: Path, ours_first: bool) -> None:
    class Tuned(Net):
        lr = 1e-2

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    finder = LearningRateFinder(num_training_steps=10, update_attr=True)
    both = [qat(), finder] if ours_first else [finder, qat()]
    model, made, _ = fit(tmp_path, Tuned(), callback=both[0], callbacks=[both[1]])
    assert made.global_step == 3 * BATCHES
    assert_learned(model)


@pytest.mark.parametrize("ours_first", [True, False])
def test_the_batch_size_finder_leaves_quantizers_as_they_were(tmp_path: Path, ours_first: bool) -> None:
    class Sized(Net):
        batch_size = 1

        def train_dataloader(self) -> Any:
            return DataLoader(images(), batch_size=self.batch_size)

        def val_dataloader(self) -> Any:
            return loader()

    model = Sized()
    finder = BatchSizeFinder(steps_per_trial=1, max_trials=2)
    both = [qat(), finder] if ours_first else [finder, qat()]
    L.seed_everything(3, verbose=False)
    trainer(tmp_path, both, limit_val_batches=0, limit_train_batches=4).fit(model)
    assert model.batch_size == 4
    assert_learned(model)


def test_accumulation_may_change_during_the_run(tmp_path: Path) -> None:
    model, made, _ = fit(tmp_path, callbacks=[GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})])
    assert made.global_step == 8 + 4 + 2
    assert_learned(model)


# ---- what is shown ------------------------------------------------------------------------------------------------


class Kept(ModelSummary):
    """Keeps the summary in place of printing it."""

    names: list[str]
    total: int

    def summarize(self, summary_data: Any, total_parameters: int, *args: Any, **kwargs: Any) -> None:
        type(self).names, type(self).total = dict(summary_data)["Name"], total_parameters


@pytest.mark.parametrize("depth", [1, -1])
def test_the_models_summary_shows_the_users_layers(tmp_path: Path, depth: int) -> None:
    model, _, _ = fit(tmp_path, callbacks=[Kept(max_depth=depth)], enable_model_summary=True)
    assert Kept.names == ["first", "norm", "second", "head"]
    assert Kept.total == sum(p.numel() for p in Net().parameters())
    assert_learned(model)


def test_an_example_input_is_run_through_without_being_observed(tmp_path: Path) -> None:
    class Example(Net):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = 1e6 * torch.ones(1, 1, 8, 8)

    kept = Kept(max_depth=-1)
    model, _, _ = fit(tmp_path, Example(), callbacks=[kept], enable_model_summary=True)
    assert model.first.input_quantizer.observer.maximum < 100
    assert_learned(model)


def test_the_rich_progress_bar_shows_the_phase(tmp_path: Path) -> None:
    shown: list[Any] = []

    class Bar(RichProgressBar):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            shown.append(self.get_metrics(trainer, pl_module)["phase"])
            super().on_train_epoch_end(trainer, pl_module)

    fit(tmp_path, callbacks=[Bar()], enable_progress_bar=True)
    assert shown == ["observe", "estimate", "learn"]


@pytest.mark.parametrize("profiler", ["simple", "advanced"])
def test_a_profiled_run_learns(tmp_path: Path, profiler: str) -> None:
    model, _, _ = fit(tmp_path, profiler=profiler, limit_train_batches=2, limit_val_batches=1)
    assert_learned(model)
