"""Whatever `configure_optimizers` does, the qparams learn, undecayed, and the user's own parameters do as ever."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim import SGD, Adam, AdamW
from torch.optim import lr_scheduler as lrs

import lfq_lightning as lfq
from tests.runs import BATCHES, Net, every_epoch, fit, qat

STEPS = 3 * BATCHES


class Configured(Net):
    """The net with another `configure_optimizers`."""

    configure: Callable[[Net], Any]

    def configure_optimizers(self) -> Any:
        return self.configure(self)


def net_with(configure: Callable[[Net], Any]) -> Configured:
    net = Configured()
    net.configure = configure
    return net


def split_by_dimensions(net: Net) -> Any:
    decay, rest = ([p for p in net.parameters() if (p.ndim >= 2) is wide] for wide in (True, False))
    return AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-3)


def split_by_name_as_mingpt(net: Net) -> Any:
    decay = {n for n, _ in net.named_parameters() if n.endswith("weight") and "norm" not in n}
    rest = {n for n, _ in net.named_parameters() if n.endswith("bias") or "norm" in n}
    named = dict(net.named_parameters())
    assert decay | rest == named.keys()
    assert not decay & rest
    groups = [{"params": [named[n] for n in sorted(names)]} for names in (decay, rest)]
    return AdamW(groups, lr=1e-3)


def one_cycle(net: Net) -> Any:
    optimizer = AdamW(net.parameters(), lr=1e-3)
    return [optimizer], [{"scheduler": lrs.OneCycleLR(optimizer, 1e-2, total_steps=STEPS), "interval": "step"}]


def plateau(net: Net) -> Any:
    optimizer = SGD(net.parameters(), lr=1e-2)
    return {"optimizer": optimizer, "lr_scheduler": lrs.ReduceLROnPlateau(optimizer, patience=0), "monitor": "val_loss"}


def sequence(net: Net) -> Any:
    optimizer = SGD(net.parameters(), lr=1e-2)
    parts = [lrs.LinearLR(optimizer), lrs.CosineAnnealingLR(optimizer, 3)]
    return {"optimizer": optimizer, "lr_scheduler": lrs.SequentialLR(optimizer, parts, [1])}


def groups_of_layers(net: Net) -> list[dict[str, Any]]:
    return [{"params": m.parameters()} for m in (net.first, net.norm, net.second, net.head)]


def rate_for_each_group(net: Net) -> Any:
    optimizer = SGD(groups_of_layers(net), lr=1e-2)
    return [optimizer], [lrs.LambdaLR(optimizer, [lambda _: 1.0, lambda _: 0.5, lambda _: 0.5, lambda _: 0.1])]


def plateau_for_each_group(net: Net) -> Any:
    optimizer = SGD(groups_of_layers(net), lr=1e-2)
    schedule = lrs.ReduceLROnPlateau(optimizer, patience=0, min_lr=[1e-3, 1e-3, 1e-3, 1e-4])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


def one_cycle_for_each_group(net: Net) -> Any:
    optimizer = SGD(groups_of_layers(net), lr=1e-2, momentum=0.9)
    schedule = lrs.OneCycleLR(optimizer, [1e-2, 1e-2, 1e-2, 1e-3], total_steps=STEPS)
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def scheduled(optimizer: Any) -> Any:
    return [optimizer], [lrs.StepLR(optimizer, 1, gamma=0.5)]


SCALAR = [split_by_dimensions, split_by_name_as_mingpt, one_cycle, plateau, sequence]
BY_GROUP = [rate_for_each_group, plateau_for_each_group, one_cycle_for_each_group]
OTHERS = {
    "bare": lambda net: SGD(net.parameters(), lr=1e-2),
    "a list": lambda net: [SGD(net.parameters(), lr=1e-2)],
    "named": lambda net: AdamW(net.named_parameters(), lr=1e-3),
    "fused": lambda net: AdamW(net.parameters(), lr=1e-3, fused=True),
    "tensor rate": lambda net: SGD(net.parameters(), lr=torch.tensor(1e-2)),
    "tensor rate, scheduled": lambda net: scheduled(AdamW(net.parameters(), lr=torch.tensor(1e-3))),
    "layers": lambda net: SGD([*net.second.parameters(), *net.head.parameters()], lr=1e-2),
}


def assert_all_learned(model: Any) -> None:
    for name, quantizer in lfq.quantizers(model).items():
        assert not torch.equal(quantizer.scale, quantizer.scale_reference), name


@pytest.mark.parametrize("configure", [*SCALAR, *BY_GROUP, *OTHERS.values()])
def test_qparams_learn_whatever_configure_optimizers_returns(tmp_path: Path, configure: Any) -> None:
    model, made, callback = fit(tmp_path, net_with(configure))
    assert_all_learned(model)
    users = {id(p) for o in made.optimizers for g in o.param_groups for p in g["params"]}
    assert not any(id(p) in users for q in lfq.quantizers(model).values() for p in q.parameters())
    [rate] = callback.qparam_optimizer.learning_rates
    assert 0 < rate <= 1e-3


def test_the_rate_of_scales_keeps_in_proportion_to_that_of_the_weights(tmp_path: Path) -> None:
    shares, rates, taken = [], [], []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            weights = trainer.optimizers[0].param_groups[0]
            shares.append(weights["lr"] / weights["initial_lr"])
            rates.append(callback.qparam_optimizer.learning_rates[0])

        def on_train_batch_end(self, *_: Any) -> None:
            taken.append(callback.qparam_optimizer.optimizers[0].param_groups[0]["lr"])

    def configure(model: L.LightningModule) -> Any:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    callback = qat()
    fit(tmp_path, net_with(configure), callback=callback, callbacks=[Watch()])
    assert rates == pytest.approx([1e-3 * share for share in shares])
    assert taken[-BATCHES:] == rates[-BATCHES:]  # of the epoch that learns


@pytest.mark.parametrize("configure", [*SCALAR, *BY_GROUP])
def test_the_users_learning_rates_are_those_of_a_float_run(tmp_path: Path, configure: Any) -> None:
    def rates(directory: Path, **options: Any) -> list[list[float]]:
        seen: list[list[float]] = []

        class Watch(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
                seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

        fit(directory, net_with(configure), callbacks=[Watch()], limit_val_batches=1, **options)
        return seen

    # The plateau looks at the loss, which no quantization changes here.
    same = qat(weight=None, activation=None, rules=[lfq.Rule("head", weight=8)], schedule=lfq.PhaseSchedule(1, 1, 2))
    assert rates(tmp_path / "qat", callback=same) == rates(tmp_path / "float", callback=L.Callback())


def test_each_qparam_resumes_with_its_own_momentum_and_schedule(tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        own = qat(optimizer=partial(SGD, lr=0.1, momentum=0.9), lr_schedule=partial(lrs.StepLR, step_size=3))
        return {"callback": own, "callbacks": [every_epoch(tmp_path)], "max_epochs": 5}

    whole, _, first = fit(tmp_path / "whole", net_with(one_cycle_long), **options())
    part, _, second = fit(tmp_path / "part", net_with(one_cycle_long), ckpt_path=tmp_path / "epoch=3.ckpt", **options())
    assert first.qparam_optimizer.learning_rates == second.qparam_optimizer.learning_rates
    for name, quantizer in lfq.quantizers(whole).items():
        assert torch.equal(quantizer.scale, lfq.quantizers(part)[name].scale)


def one_cycle_long(net: Net) -> Any:
    optimizer = AdamW(net.parameters(), lr=1e-3)
    return [optimizer], [{"scheduler": lrs.OneCycleLR(optimizer, 1e-2, total_steps=99), "interval": "step"}]


def test_the_learning_rate_of_qparams_is_in_the_logs(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    _, made, _ = fit(tmp_path, logger=logger, callbacks=[LearningRateMonitor()], log_every_n_steps=1)
    assert made.logged_metrics["lfq/lr"] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 2 / 10)) / 2)


def test_the_learning_rate_monitor_shows_the_rate_of_qparams_in_the_users_optimizer(tmp_path: Path) -> None:
    monitor = LearningRateMonitor()
    logger = CSVLogger(tmp_path)
    configure = OTHERS["bare"]
    _, made, _ = fit(tmp_path, net_with(configure), callback=qat(optimizer="user"), logger=logger, callbacks=[monitor])
    assert list(monitor.lrs) == ["lr-SGD/pg1", "lr-SGD/pg2"]
    assert made.logged_metrics["lfq/lr"] == monitor.lrs["lr-SGD/pg2"][-1] == pytest.approx(1e-2)


def test_an_optimizer_that_hydra_completes_later_steps_the_qparams(tmp_path: Path) -> None:
    settings = {
        "_target_": "lfq_lightning.QuantizationAwareTraining",
        "schedule": {"observe": 0, "estimate": 1, "learn": 2},
        "optimizer": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.25},
        "lr_schedule": {"_target_": "torch.optim.lr_scheduler.StepLR", "_partial_": True, "step_size": 100},
    }
    model, _, callback = fit(tmp_path, callback=hydra.utils.instantiate(settings))
    assert_all_learned(model)
    assert type(callback.qparam_optimizer.optimizers[0]) is SGD
    assert callback.qparam_optimizer.learning_rates == [0.25]


def test_gradient_clipping_does_not_count_qparams(tmp_path: Path) -> None:
    norms: dict[str, list[float]] = {}

    class Clipped(Net):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            held = [p for group in optimizer.param_groups for p in group["params"]]
            norms.setdefault("held", []).append(float(torch.nn.utils.clip_grad_norm_(held, 0.01)))
            own = [p.grad for n, p in self.named_parameters() if "quantizer" not in n]
            norms.setdefault("clipped", []).append(float(torch.nn.utils.get_total_norm(own)))

    model, _, _ = fit(tmp_path, Clipped())
    assert_all_learned(model)
    assert max(norms["clipped"]) == pytest.approx(0.01, rel=1e-3)
    assert len(norms["held"]) == STEPS


@pytest.mark.parametrize("optimizer", [None, "user"])
def test_hooks_that_take_every_gradient_for_given_work_as_in_float(tmp_path: Path, optimizer: Any) -> None:
    met: dict[str, set[int]] = {}

    class Loops(Net):
        def look(self, hook: str) -> None:
            met.setdefault(hook, set()).add(sum(p.grad.norm().isfinite().item() for p in self.parameters()))

        def on_after_backward(self) -> None:
            self.look("backward")

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.look("step")

        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            self.look("clipping")

    model, _, _ = fit(tmp_path, Loops(), callback=qat(optimizer=optimizer))
    assert_all_learned(model)
    assert met == {"backward": {8, 17}, "step": {8, 17}, "clipping": {8} if optimizer is None else {8, 17}}
    assert not {"on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping"} & set(vars(model))


@pytest.mark.parametrize("options", [{"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 3}, {"max_steps": 20}])
def test_qparams_learn_under_the_trainers_own_options(tmp_path: Path, options: dict[str, Any]) -> None:
    model, made, callback = fit(tmp_path, **options)
    assert_all_learned(model)
    [own] = callback.qparam_optimizer.optimizers
    [steps] = {int(state["step"]) for state in own.state.values()}
    learned = made.global_step - (6 if "accumulate_grad_batches" in options else 2 * BATCHES)
    assert steps == learned


def test_lbfgs_steps_qparams_once_for_all_its_closures(tmp_path: Path) -> None:
    calls: list[int] = []

    class Closures(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            calls.append(batch_idx)
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=1e-3, max_iter=3)

    model, made, callback = fit(tmp_path, Closures())
    assert_all_learned(model)
    assert len(calls) > made.global_step == STEPS
    [own] = callback.qparam_optimizer.optimizers
    assert {int(state["step"]) for state in own.state.values()} == {BATCHES}


@pytest.mark.filterwarnings("ignore:.*returned `None`:UserWarning")
@pytest.mark.parametrize("optimizer", [None, "user"])
def test_a_training_step_that_returns_none_moves_no_qparam(tmp_path: Path, optimizer: Any) -> None:
    scales: list[Tensor] = []

    class Skips(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 2 else loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            scales.append(self.second.input_quantizer.scale.detach().clone())

    fit(tmp_path, Skips(), callback=qat(optimizer=optimizer))
    last = scales[2 * BATCHES :]
    moved = [not torch.equal(a, b) for a, b in pairwise(last)]
    assert moved == [False, True] * (BATCHES // 2 - 1) + [False]


@pytest.mark.filterwarnings("ignore:.*returned `None`:UserWarning")
def test_qparams_learn_where_the_module_makes_no_optimizer(tmp_path: Path) -> None:
    model, _, _ = fit(tmp_path, net_with(lambda net: None))
    assert_all_learned(model)


def test_the_rate_of_a_tensor_that_is_changed_in_place_is_followed(tmp_path: Path) -> None:
    own = partial(SGD, lr=torch.tensor(0.2))
    configure = OTHERS["tensor rate, scheduled"]
    _, made, callback = fit(tmp_path, net_with(configure), callback=qat(optimizer=own))
    assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 / 8)
    assert callback.qparam_optimizer.learning_rates == pytest.approx([0.2 / 8])
    assert callback.qparam_optimizer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.2 / 4)  # of the last epoch


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021), as most implementations have it."""

    def __init__(self, params: Any, rho: float = 0.05) -> None:
        super().__init__(params, {"rho": rho, "lr": 1e-2})
        self.base_optimizer = SGD(self.param_groups, lr=1e-2)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state[p]["before"] = p.clone()
            p.add_(p.grad, alpha=self.param_groups[0]["rho"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in (p for group in self.param_groups for p in group["params"] if p in self.state):
            p.copy_(self.state[p]["before"])
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        self.second_step() if self.state else self.first_step()
        return loss


class ByTwoSteps(Net):
    """Trains with SAM by hand; keeps what the weight of the head was before and after each of its steps."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        before = self.head.weight.detach().clone()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.first_step()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.gradient = self.head.weight.grad.clone()
        optimizer.second_step()
        self.step = self.head.weight.detach() - before

    def configure_optimizers(self) -> Any:
        return Sam(self.parameters())


@pytest.mark.parametrize("optimizer", [None, "user"])
def test_the_two_steps_of_sam_take_qparams_along_and_lengthen_once(tmp_path: Path, optimizer: Any) -> None:
    rules = [lfq.Rule("head", weight=lfq.QuantSpec(bits=2, granularity="per_channel", lr_factor=8))]
    model, _, callback = fit(tmp_path, ByTwoSteps(), callback=qat(optimizer=optimizer, rules=rules))
    assert_all_learned(model)
    torch.testing.assert_close(model.step, -8e-2 * model.gradient, rtol=1e-3, atol=1e-6)
    if optimizer is None:
        [own] = callback.qparam_optimizer.optimizers
        assert {int(state["step"]) for state in own.state.values()} == {BATCHES}


class CallsItsParent(SGD):
    """A step within a step, both of which torch's hooks see."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class LooksLikeOne:
    """What Lightning takes for an optimizer, without torch's hooks."""

    def __init__(self, params: Any) -> None:
        self.inner = SGD(params, lr=1e-2)
        self.param_groups, self.defaults, self.state = self.inner.param_groups, {}, self.inner.state

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad()

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)


@pytest.mark.parametrize("make", [partial(CallsItsParent, lr=1e-2), LooksLikeOne])
def test_steps_within_steps_are_one(tmp_path: Path, make: Any) -> None:
    SGD([torch.zeros(1)])  # torch hooks the step of a class where one is made
    model, _, callback = fit(tmp_path, net_with(lambda net: make(net.parameters())))
    assert_all_learned(model)
    [own] = callback.qparam_optimizer.optimizers
    assert {int(state["step"]) for state in own.state.values()} == {BATCHES}


class ByRawUpdates(Net):
    """Moves weights without an optimizer's step."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for p in self.parameters():
            p.data.sub_(1e-2 * p.grad)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("optimizer", [None, "user"])
def test_updates_that_no_hook_sees_are_told_after_the_first_epoch_in_learn(tmp_path: Path, optimizer: Any) -> None:
    with pytest.warns(UserWarning, match=r"Found no call of `step\(\)` of SGD so far: none has moved") as said:
        fit(tmp_path, ByRawUpdates(), callback=qat(optimizer=optimizer), max_epochs=5, limit_val_batches=0)
    assert sum("Found no call" in str(warning.message) for warning in said) == 1


def test_a_schedule_of_steps_that_lightning_does_not_count_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning) as said:
        fit(tmp_path, ByRawUpdates(), callback=qat(schedule=None), max_epochs=2, limit_val_batches=0)
    found = [str(warning.message) for warning in said]
    assert sum("give the schedule in epochs" in message for message in found) == 1


class ByHand(Net):
    """Two optimizers stepped by hand, one raw and one as Lightning wraps it, every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        body, head = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        if batch_idx % 2:
            for optimizer in (body.optimizer, head):
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        body = SGD([*self.first.parameters(), *self.norm.parameters(), *self.second.parameters()], lr=1e-2)
        return body, Adam(self.head.parameters(), lr=1e-3)


@pytest.mark.parametrize("optimizer", [None, "user"])
def test_optimizers_stepped_by_hand_take_the_qparams_along(tmp_path: Path, optimizer: Any) -> None:
    model, _, callback = fit(tmp_path, ByHand(), callback=qat(optimizer=optimizer))
    assert_all_learned(model)
    assert len(callback.qparam_optimizer.optimizers) == 2


# ---- optimizer="user" ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("configure", [*SCALAR, OTHERS["bare"], OTHERS["named"], OTHERS["fused"], OTHERS["layers"]])
def test_in_the_users_optimizer_qparams_have_a_group_that_does_not_decay(tmp_path: Path, configure: Any) -> None:
    model, made, callback = fit(tmp_path, net_with(configure), callback=qat(optimizer="user"))
    [optimizer] = made.optimizers
    expected = {id(p) for q in lfq.quantizers(model).values() for p in q.parameters()}
    own = [group for group in optimizer.param_groups if any(id(p) in expected for p in group["params"])]
    assert {id(p) for group in own for p in group["params"]} == expected
    assert optimizer.param_groups[-1] is own[-1]
    assert sum(len(g["params"]) for g in optimizer.param_groups) - len(expected) in (4, 8)
    assert {group["weight_decay"] for group in own} == {0}
    assert_all_learned(model)
    assert callback.qparam_optimizer.learning_rates == [group["lr"] for group in own]


@pytest.mark.parametrize("configure", BY_GROUP)
def test_a_scheduler_with_a_list_for_each_group_is_refused_with_the_remedy(tmp_path: Path, configure: Any) -> None:
    with pytest.raises(ValueError, match=r"lr_lambdas|min_lrs?|max_lr") as refused:
        fit(tmp_path, net_with(configure), callback=qat(optimizer="user"))
    assert "one entry more" in refused.value.__notes__[0]
    assert torch.optim.Optimizer.__init__.__name__ == "__init__"


@pytest.mark.filterwarnings("ignore:.*returned `None`:UserWarning")
def test_without_an_optimizer_of_the_user_there_is_none_to_hold_qparams(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Found none: leave `optimizer` out"):
        fit(tmp_path, net_with(lambda net: None), callback=qat(optimizer="user"))


def test_an_optimizer_of_a_single_group_cannot_hold_qparams_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LBFGS") as refused:
        fit(tmp_path, net_with(lambda net: torch.optim.LBFGS(net.parameters())), callback=qat(optimizer="user"))
    assert "allows a single group" in refused.value.__notes__[0]


def test_layers_that_no_optimizer_holds_are_refused_where_a_scheduler_forbids_another_group(tmp_path: Path) -> None:
    def head_alone(net: Net) -> Any:
        optimizer = SGD(net.head.parameters(), lr=1e-2)
        return [optimizer], [lrs.StepLR(optimizer, 1)]

    with pytest.raises(ValueError, match="must find the weights of quantized layers in an optimizer"):
        fit(tmp_path, net_with(head_alone), callback=qat(optimizer="user"))


def test_the_users_optimizer_moves_qparams_in_learn_alone_and_keeps_them_legal(tmp_path: Path) -> None:
    scales: list[float] = []

    class Watched(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            assert all((q.scale > 0).all() for q in lfq.quantizers(self).values())
            assert all((q.zero_point <= q.quant_max).all() for q in lfq.quantizers(self).values())
            scales.append(sum(q.scale.detach().double().sum().item() for q in lfq.quantizers(self).values()))

        def configure_optimizers(self) -> Any:
            return Adam(self.parameters(), lr=0.3)  # steps far larger than a scale

    schedule = lfq.PhaseSchedule(observe=0, estimate=0, learn=1, freeze=2)
    fit(tmp_path, Watched(), callback=qat(optimizer="user", schedule=schedule, on_collapse="warn"), limit_val_batches=0)
    assert len(set(scales[BATCHES - 1 :])) > 2
    assert len(set(scales[2 * BATCHES - 1 :])) == 1


@pytest.mark.parametrize("raw", [False, True])
def test_momentum_moves_no_frozen_qparam_where_missing_gradients_are_zeros(tmp_path: Path, raw: bool) -> None:
    scales: list[float] = []

    class ByHand(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer: Any = self.optimizers(use_pl_optimizer=not raw)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            scales.append(sum(q.scale.detach().double().sum().item() for q in lfq.quantizers(self).values()))

        def configure_optimizers(self) -> Any:
            return Adam(self.parameters(), lr=1e-3)

    schedule = lfq.PhaseSchedule(observe=0, estimate=0, learn=1, freeze=2)
    callback = qat(optimizer="user", schedule=schedule, example=False)  # else a step is run without values first
    fit(tmp_path, ByHand(), callback=callback, limit_val_batches=0)
    assert len(set(scales[BATCHES : 2 * BATCHES])) == BATCHES
    assert len(set(scales[2 * BATCHES - 1 :])) == 1


def test_a_run_with_qparams_in_the_users_optimizer_resumes_bit_equal(tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        return {"callback": qat(optimizer="user"), "callbacks": [every_epoch(tmp_path)], "max_epochs": 5}

    whole, _, first = fit(tmp_path / "whole", **options())
    part, _, second = fit(tmp_path / "part", ckpt_path=tmp_path / "epoch=3.ckpt", **options())
    assert first.qparam_optimizer.learning_rates == second.qparam_optimizer.learning_rates
    for key, value in whole.state_dict().items():
        assert not isinstance(value, Tensor) or torch.equal(part.state_dict()[key], value), key


@pytest.mark.parametrize(("first", "second"), [(None, "user"), ("user", None)])
def test_a_resumed_run_must_say_again_whose_optimizer_it_is(tmp_path: Path, first: Any, second: Any) -> None:
    fit(tmp_path, callback=qat(optimizer=first), callbacks=[every_epoch(tmp_path)])
    with pytest.raises(ValueError, match="resume with the `optimizer`"):
        more = {"callbacks": [every_epoch(tmp_path)], "max_epochs": 4}
        fit(tmp_path / "b", callback=qat(optimizer=second), ckpt_path=tmp_path / "epoch=2.ckpt", **more)


def test_a_schedule_for_an_optimizer_of_the_user_is_refused() -> None:
    with pytest.raises(ValueError, match="the user's schedulers apply"):
        qat(optimizer="user", lr_schedule=partial(lrs.StepLR, step_size=1))


@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_an_optimizer_that_saw_the_qparams_is_refused_where_they_have_their_own(tmp_path: Path, optimizer: Any) -> None:
    class MadeInSetup(Net):
        def setup(self, stage: str) -> None:
            self.made = optimizer(self.parameters(), lr=1.0)

        def configure_optimizers(self) -> Any:
            return self.made

    with pytest.raises(ValueError, match=r"would step twice\. Found 9 of them .* make it in `configure_optimizers`"):
        fit(tmp_path, MadeInSetup())
