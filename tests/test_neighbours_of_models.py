"""Models as users write them, and the Trainer's options: compiled, lazy, tied, frozen, calibrated, cut short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torchmetrics
from torch import Tensor, nn

import lfq_lightning as lfq
from tests.runs import BATCHES, Net, every_epoch, fit, images, loader, qat, trainer

X = images().tensors[0]


def assert_learned(model: nn.Module) -> None:
    assert {q.phase for q in lfq.quantizers(model).values()} == {"learn"}
    for name, quantizer in lfq.quantizers(model).items():
        assert not torch.equal(quantizer.scale, quantizer.scale_reference), name


# ---- torch.compile ------------------------------------------------------------------------------------------------


class InnerCompiled(Net):
    """The net with a compiled module inside; `eager` keeps the names and costs no compilation."""

    compiled = True

    def __init__(self) -> None:
        super().__init__()
        body = nn.Sequential(self.first, self.norm, nn.ReLU(), self.second)
        del self.first, self.norm, self.second
        self.body = torch.compile(body, backend="eager") if self.compiled else body

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)).flatten(1))


class InnerPlain(InnerCompiled):
    compiled = False


def names_in(directory: Path, model: nn.Module, callback: Any) -> set[str]:
    quantizers = {line.split(",")[3] for line in (directory / "trajectory.csv").read_text().splitlines()[1:]}
    return quantizers | set(lfq.quantizers(model)) | {layer.name for layer in callback.placement.layers}


@pytest.mark.parametrize(("first", "second"), [(InnerCompiled, InnerPlain), (InnerPlain, InnerCompiled)])
def test_checkpoints_of_compiled_and_plain_modules_load_into_each_other(
    tmp_path: Path, first: type[Net], second: type[Net]
) -> None:
    rule = lfq.Rule("body.3", weight=3)
    keep = {"callback": qat(rules=[rule]), "callbacks": [every_epoch(tmp_path)]}
    model, _, callback = fit(tmp_path, first(), **keep)
    assert "body.3.weight_quantizer" in names_in(tmp_path, model, callback)
    assert not any("_orig_mod" in name for name in names_in(tmp_path, model, callback))
    keep = {"callback": qat(rules=[rule]), "callbacks": [every_epoch(tmp_path)]}
    other, made, _ = fit(tmp_path / "b", second(), ckpt_path=tmp_path / "epoch=2.ckpt", max_epochs=4, **keep)
    assert made.current_epoch == 4
    lfq.load_state_dict(other, model.state_dict())
    assert torch.equal(other.eval()(X), model.eval()(X))


# ---- layers -------------------------------------------------------------------------------------------------------


class Lazy(Net):
    """The net with a head whose shape the first batch decides."""

    materialise = True

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(10)

    def configure_model(self) -> None:
        if self.materialise and isinstance(self.head, nn.LazyLinear):
            with torch.no_grad():
                self(torch.zeros(2, 1, 8, 8))


def test_a_lazy_layer_is_quantized_once_it_has_a_shape(tmp_path: Path) -> None:
    model, _, _ = fit(tmp_path, Lazy())
    assert model.head.weight_quantizer.scale.shape == (10,)
    assert_learned(model)


def test_a_lazy_layer_without_a_shape_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = Lazy()
    model.materialise = False
    with pytest.raises(ValueError, match=r"head.*(batch|input|forward)"):
        fit(tmp_path, model)


class Tied(L.LightningModule):
    """An embedding and the head that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        logits = self.head(torch.relu(self.middle(self.middle(self.embed(batch[1])))))
        return nn.functional.cross_entropy(logits, batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("optimizer", [None, "user"])
def test_tied_weights_have_one_quantizer_and_a_layer_used_twice_one_scale(tmp_path: Path, optimizer: Any) -> None:
    model, made, _ = fit(tmp_path, Tied(), callback=qat(optimizer=optimizer))
    assert model.head.weight_quantizer is model.embed.weight_quantizer
    assert model.head.weight is model.embed.weight
    assert_learned(model)
    made.save_checkpoint(tmp_path / "x.ckpt")
    again = lfq.load_from_checkpoint(Tied, tmp_path / "x.ckpt")
    assert torch.equal(again.head.weight_quantizer.scale, model.head.weight_quantizer.scale)


class FrozenBody(Net):
    """A pretrained body in eval mode without gradients, and a head that trains."""

    def __init__(self) -> None:
        super().__init__()
        for layer in (self.first, self.norm, self.second):
            layer.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        for layer in (self.first, self.norm, self.second):
            layer.eval()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=1e-2)


@pytest.mark.parametrize("optimizer", [None, "user"])
def test_a_frozen_body_in_eval_mode_is_calibrated_and_keeps_its_estimates(tmp_path: Path, optimizer: Any) -> None:
    model, _, _ = fit(tmp_path, FrozenBody(), callback=qat(optimizer=optimizer))
    for quantizer in (model.second.weight_quantizer, model.second.input_quantizer):
        assert quantizer.observer.saw_data()
        assert torch.equal(quantizer.scale, quantizer.scale_reference)
        assert not torch.equal(quantizer.scale, torch.ones_like(quantizer.scale))
    assert not torch.equal(model.head.input_quantizer.scale, model.head.input_quantizer.scale_reference)


def test_a_calibrated_model_learns_from_the_first_step(tmp_path: Path) -> None:
    model = Net()
    lfq.attach(model, weight=4, activation=4)
    lfq.calibrate(model, loader())
    estimates = {name: q.scale.detach().clone() for name, q in lfq.quantizers(model).items()}
    fit(tmp_path, model, callback=qat(schedule=lfq.PhaseSchedule(0, 0, 0)), max_epochs=1)
    assert_learned(model)
    for name, quantizer in lfq.quantizers(model).items():
        assert torch.equal(quantizer.scale_reference, estimates[name])


def test_without_calibration_learning_from_the_first_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lfq_lightning\.calibrate"):
        fit(tmp_path, callback=qat(schedule=lfq.PhaseSchedule(0, 0, 0)), max_epochs=1)


# ---- the Trainer's options ----------------------------------------------------------------------------------------

STEPS = {
    "overfit_batches": ({"overfit_batches": 2}, 2 * 3),
    "limit_train_batches": ({"limit_train_batches": 3}, 3 * 3),
    "limit_train_share": ({"limit_train_batches": 0.5}, BATCHES // 2 * 3),
    "limit_val_batches": ({"limit_val_batches": 0}, BATCHES * 3),
    "val_check_interval": ({"val_check_interval": 2}, BATCHES * 3),
    "no_sanity_check": ({"num_sanity_val_steps": 0}, BATCHES * 3),
    "no_inference_mode": ({"inference_mode": False}, BATCHES * 3),
    "detect_anomaly": ({"detect_anomaly": True}, BATCHES * 3),
    "deterministic": ({"deterministic": True}, BATCHES * 3),
    "benchmark": ({"benchmark": True}, BATCHES * 3),
    "reload": ({"reload_dataloaders_every_n_epochs": 1}, BATCHES * 3),
    "barebones": ({"barebones": True, "logger": None, "enable_checkpointing": None}, BATCHES * 3),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("name", STEPS)
def test_quantizers_learn_under_the_trainers_options(tmp_path: Path, name: str) -> None:
    options, steps = STEPS[name]
    model, made, _ = fit(tmp_path, **options)
    assert made.global_step == steps
    assert_learned(model)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_evaluation_between_fits_changes_nothing(tmp_path: Path, inference_mode: bool) -> None:
    model, made, _ = fit(tmp_path, inference_mode=inference_mode)
    before = {name: value.clone() for name, value in model.named_parameters()}
    made.validate(model, loader(), verbose=False)
    made.test(model, loader(), verbose=False)
    expected = model.eval()(X)
    assert torch.equal(torch.cat(made.predict(model, DataLoaderOfX())), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    made.fit_loop.max_epochs = 4
    made.fit(model.train(), loader(), loader())
    assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters())


def DataLoaderOfX() -> Any:
    return torch.utils.data.DataLoader(images(), batch_size=len(X))


def test_one_callback_serves_several_fits_and_models(tmp_path: Path) -> None:
    callback = qat()
    first, _, _ = fit(tmp_path, callback=callback)
    scales = {name: q.scale.detach().clone() for name, q in lfq.quantizers(first).items()}
    second, _, _ = fit(tmp_path / "b", callback=callback)
    for model in (first, second):
        assert all(torch.equal(q.scale, scales[name]) for name, q in lfq.quantizers(model).items())


def test_fit_goes_on_in_the_same_trainer(tmp_path: Path) -> None:
    L.seed_everything(3, verbose=False)
    model, made = Net(), trainer(tmp_path, [qat()], max_epochs=3)
    made.fit(model, loader(), loader())
    made.fit_loop.max_epochs = 5
    made.fit(model, loader(), loader())
    assert made.current_epoch == 5
    assert_learned(model)


# ---- placements that are refused, and layers that stay as they are --------------------------------------------------


@pytest.mark.parametrize("second", [False, True])
def test_a_rule_that_matches_nothing_leaves_the_model_as_the_fit_found_it(tmp_path: Path, second: bool) -> None:
    model = Net()
    if second:
        fit(tmp_path, model=model)
    before = lfq.quantizers(model)
    model.norm.extra = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="no module has that name"):
        fit(tmp_path, model=model, callback=qat(rules=[lfq.Rule("haed", weight=8)]))
    assert lfq.quantizers(model) == before
    assert type(model.norm.extra) is nn.Linear


def test_a_metric_with_layers_is_left_alone(tmp_path: Path) -> None:
    class Judge(torchmetrics.Metric):
        def __init__(self) -> None:
            super().__init__()
            self.judge = nn.Linear(10, 1)
            self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

        def update(self, x: Tensor) -> None:
            self.total += self.judge(x).sum()

        def compute(self) -> Tensor:
            return self.total

    class Judged(Net):
        def __init__(self) -> None:
            super().__init__()
            self.judge = Judge()

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.log("judged", self.judge(self(batch[0])))

    model, _, callback = fit(tmp_path, model=Judged())
    assert_learned(model)
    assert "judge.judge" in dict(callback.placement.left_in_float)
