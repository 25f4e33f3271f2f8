"""Layers whose weight is frozen: their scales and zero points keep their estimates, or learn alone."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset

import lfq_lightning as lfq
from tests.assertions import assert_bit_equal
from tests.runs import Net, every_epoch, fit, qat
from tests.test_precision import scaled

pytestmark = pytest.mark.quick

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))


class Adapted(L.LightningModule):
    """A frozen base with a low-rank adapter beside its first layer."""

    def __init__(self, adapted: bool = True, all_parameters: bool = True) -> None:
        super().__init__()
        self.base = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)])
        self.base.requires_grad_(False)
        self.down, self.up = (nn.Linear(4, 1), nn.Linear(1, 4)) if adapted else (None, None)
        self.all_parameters = all_parameters

    def forward(self, x: Tensor) -> Tensor:
        h = self.base[0](x)
        h = h if self.down is None or self.up is None else h + self.up(self.down(x))
        return self.base[1](torch.relu(h))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - 1).square().mean()

    def configure_optimizers(self) -> Any:
        chosen = [p for p in self.parameters() if self.all_parameters or p.requires_grad]
        return torch.optim.Adam(chosen, lr=0.01)


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X), batch_size=8)


def moved(model: nn.Module) -> dict[str, bool]:
    """Which scales are not what they were on entering `learn`."""
    found = lfq.quantizers(model).items()
    return {name: not torch.equal(quantizer.scale, quantizer.scale_reference) for name, quantizer in found}


@pytest.mark.parametrize("optimizer", [None, "user"])
@pytest.mark.parametrize("all_parameters", [True, False])
def test_scales_of_a_frozen_base_learn_beside_its_adapters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, optimizer: Any, all_parameters: bool
) -> None:
    model = Adapted(all_parameters=all_parameters)
    before = model.base[0].weight.clone()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, model, callback=qat(frozen_layers="learn", optimizer=optimizer), data=data())
    assert "2 of 4 quantized layers have frozen weights: their scales and zero points learn alone" in caplog.text
    assert all(moved(model).values())
    assert_bit_equal(model.base[0].weight, before)


def test_they_keep_their_estimates_unless_they_are_told_to_learn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Adapted()
    fit(tmp_path / "a", model, callback=qat(frozen_layers="learn"), data=data())
    learned = model.base[0].weight_quantizer.scale.clone()
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path / "b", model, data=data())  # a second fit is not bound by the first
    assert "2 of 4 quantized layers have frozen weights: their scales and zero points keep" in caplog.text
    assert_bit_equal(model.base[0].weight_quantizer.scale, learned)


def test_where_every_layer_is_frozen_one_warning_says_that_nothing_learns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="3 of 3 quantized layers .* nothing that is quantized will learn"):
        fit(tmp_path, Wholly(), data=data())


class Wholly(Adapted):
    """No weight learns at all."""

    def __init__(self) -> None:
        super().__init__(adapted=False)
        self.base.insert(1, nn.Linear(4, 4).requires_grad_(False))

    def forward(self, x: Tensor) -> Tensor:
        return self.base[2](self.base[1](self.base[0](x)))


def test_scales_alone_learn_and_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def run(directory: Path, resume: Path | None = None) -> Wholly:
        callbacks = [every_epoch(directory)]
        callback = qat(frozen_layers="learn")
        return fit(
            directory, Wholly(), callback=callback, callbacks=callbacks, data=data(), max_epochs=4, ckpt_path=resume
        )[0]

    whole = run(tmp_path / "a")
    resumed = run(tmp_path / "b", tmp_path / "a" / "epoch=2.ckpt")
    assert all(moved(whole).values())
    for name, value in whole.state_dict().items():
        assert_bit_equal(resumed.state_dict()[name], value)


class Adversaries(L.LightningModule):
    """Two optimizers take turns, and the discriminator is frozen by hand while the generator steps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(4, 4), nn.Linear(4, 1)
        self.discriminator.requires_grad_(False)
        self.gradients: list[bool] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        first.zero_grad(), second.zero_grad()
        self.manual_backward(self.discriminator(self.generator(batch[0])).square().mean())
        gradient = self.discriminator.input_quantizer.scale.grad
        self.gradients.append(gradient is not None and bool(gradient.any()))
        first.step()
        self.discriminator.requires_grad_(True)
        second.zero_grad()
        self.manual_backward((self.discriminator(self.generator(batch[0]).detach()) - 1).square().mean())
        second.step()
        self.discriminator.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(each.parameters(), lr=0.01) for each in (self.generator, self.discriminator)]


def test_what_only_waits_for_its_turn_is_not_frozen(tmp_path: Path) -> None:
    model, _, _ = fit(tmp_path, Adversaries(), callback=qat(frozen_layers="learn"), data=data())
    assert not any(model.gradients)  # the generator's steps leave the discriminator's scales alone
    assert all(moved(model).values())


@pytest.mark.parametrize("choice", ["keep", "learn"])
def test_without_lightning_attach_takes_the_same_choice(choice: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).requires_grad_(False)
    lfq.attach(model, weight=4, activation=4, frozen_layers=choice)
    lfq.calibrate(model, [X])
    lfq.set_phase(model, "learn")
    model.train()(X).square().sum().backward()
    gradients = [q.scale.grad for q in lfq.quantizers(model).values()]
    assert all((g is not None and bool(g.any())) == (choice == "learn") for g in gradients)
    assert all(layer.weight.grad is None for layer in (model[0], model[2]))


def test_another_choice_is_refused() -> None:
    for make in (lfq.QuantizationAwareTraining, lambda **options: lfq.attach(nn.Linear(2, 2), **options)):
        with pytest.raises(ValueError, match=r"`frozen_layers` must be one of keep, learn\. Found 'both'"):
            make(frozen_layers="both")


# ---- learn="scales": all that the module would train keeps still ----------------------------------------------------


def others(model: nn.Module) -> dict[str, Tensor]:
    """All of a state dict but the quantizers."""
    return {name: value.clone() for name, value in model.state_dict().items() if "quantizer" not in name}


class Whole(Net):
    """Its optimizer holds what requires a gradient, decays it, and has no scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.head.bias.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        own = [p for p in self.parameters() if p.requires_grad]
        self.held = len(own)
        return torch.optim.AdamW(own, lr=1e-2, weight_decay=0.1)

    def on_train_batch_end(self, *_: Any) -> None:
        self.rates = [*getattr(self, "rates", []), self.trainer.callbacks[0].qparam_optimizer.learning_rates[0]]


@pytest.mark.parametrize("optimizer", [None, "user"])
def test_scales_alone_leave_every_weight_and_statistic_and_the_module_as_it_was(tmp_path: Path, optimizer: Any) -> None:
    model = Whole()
    before, required = others(model), {name: p.requires_grad for name, p in model.named_parameters()}
    fit(tmp_path, model, callback=qat(learn="scales", optimizer=optimizer))
    assert model.held == 7  # as in float: all but the frozen bias
    assert sum(moved(model).values()) >= 5
    for name, value in before.items():
        assert_bit_equal(others(model)[name], value)
    assert {n: p.requires_grad for n, p in model.named_parameters() if "quantizer" not in n} == required
    assert model.norm.training


def test_the_rate_of_scales_alone_falls_to_zero_by_the_end_and_stays_where_somebody_drives_it(tmp_path: Path) -> None:
    model, _, _ = fit(tmp_path / "a", Whole(), callback=qat(learn="scales"))
    learning = model.rates[16:]  # from the third epoch on
    assert model.rates[:16] == [3e-4] * 16
    assert learning == pytest.approx([3e-4 * 0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(1, 9)], abs=1e-12)
    freezing = lfq.PhaseSchedule(0, 1, 2, freeze=20, unit="step")
    assert fit(tmp_path / "b", Whole(), callback=qat(learn="scales", schedule=freezing))[0].rates[19] == pytest.approx(
        0
    )
    constant = partial(torch.optim.lr_scheduler.ConstantLR, factor=0.5, total_iters=1000)
    given = fit(tmp_path / "c", Whole(), callback=qat(learn="scales", lr_schedule=constant))[0]
    assert given.rates == [1.5e-4] * 24

    class Scheduled(Whole):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": LinearLR(optimizer, 1.0, 0.5, 24), "interval": "step"}]

    followed = fit(tmp_path / "e", Scheduled(), callback=qat(learn="scales"))[0].rates
    assert followed == pytest.approx([3e-4 * (1 - 0.5 * k / 24) for k in range(1, 25)])
    unknown = fit(tmp_path / "d", Whole(), callback=qat(learn="scales"), max_epochs=-1, max_time={"seconds": 1})[0]
    assert set(unknown.rates) == {3e-4}


def test_scales_alone_resume_to_the_bit(tmp_path: Path) -> None:
    def run(directory: Path, resume: Path | None = None) -> nn.Module:
        options = {"callback": qat(learn="scales"), "callbacks": [every_epoch(directory)], "max_epochs": 4}
        return fit(directory, Whole(), **options, ckpt_path=resume)[0]

    whole = run(tmp_path / "a").state_dict()
    for epoch in (0, 2):
        resumed = run(tmp_path / "b", tmp_path / "a" / f"epoch={epoch}.ckpt").state_dict()
        for name, value in whole.items():
            assert_bit_equal(resumed[name], value)


class Uneven(Net):
    """Two optimizers by hand, of which the second steps every third time."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=1e-2) for layer in (self.second, self.head)]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        for index, optimizer in enumerate(self.optimizers()):
            if not index or batch_idx % 3 == 0:
                optimizer.step()
            optimizer.zero_grad()


def test_rates_of_optimizers_that_step_unevenly_resume_to_the_bit(tmp_path: Path) -> None:
    def run(directory: Path, resume: Path | None = None) -> nn.Module:
        options = {"callback": qat(learn="scales"), "callbacks": [every_epoch(directory)], "max_epochs": 5}
        return fit(directory, Uneven(), **options, ckpt_path=resume)[0]

    whole = run(tmp_path / "a").state_dict()
    resumed = run(tmp_path / "b", tmp_path / "a/epoch=3.ckpt").state_dict()
    for name, value in whole.items():
        assert_bit_equal(resumed[name], value)


def test_what_sets_weights_free_meanwhile_does_not_move_them_and_the_next_fit_does(tmp_path: Path) -> None:
    class Unfreezes(Whole):
        def on_train_epoch_start(self) -> None:
            self.second.requires_grad_(True)

    model = Unfreezes()
    before = others(model)
    fit(tmp_path / "a", model, callback=qat(learn="scales"))
    assert_bit_equal(others(model)["second.weight"], before["second.weight"])
    fit(tmp_path / "b", model, callback=qat(), max_epochs=4)
    assert not torch.equal(others(model)["second.weight"], before["second.weight"])
    assert not torch.equal(others(model)["norm.running_mean"], before["norm.running_mean"])


def test_a_fit_of_scales_alone_that_fails_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    class Fails(Whole):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if self.trainer.global_step == 18:
                raise RuntimeError("enough")
            return super().training_step(batch, batch_idx)

    model = Fails()
    with pytest.raises(RuntimeError, match="enough"):
        fit(tmp_path, model, callback=qat(learn="scales"))
    assert all(p.requires_grad for n, p in model.named_parameters() if n != "head.bias")
    assert model.norm.training


@pytest.mark.parametrize("optimizer", [None, "user"])
def test_a_gradient_scaler_which_would_find_no_gradient_is_refused_before_anything_moves(
    tmp_path: Path, optimizer: Any
) -> None:
    model = Whole()
    before = others(model)
    with pytest.raises(ValueError, match=r'A gradient scaler asks.*Found none.*precision="bf16-mixed"'):
        fit(tmp_path, model, callback=qat(learn="scales", optimizer=optimizer), **scaled())
    assert all(torch.equal(others(model)[name], value) for name, value in before.items())
    fit(tmp_path, model, callback=qat(learn="scales", optimizer=optimizer), precision="bf16-mixed")
    assert sum(moved(model).values()) >= 5


def test_another_word_for_what_learns_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`learn` must be one of all, scales\. Found 'weights'"):
        lfq.QuantizationAwareTraining(learn="weights")
