"""The qparams' optimizer: which optimizer it follows, in which units it steps, and what it leaves alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lfq_lightning as lfq
from lfq_lightning.placement.quantized_layer import qparams
from lfq_lightning.training.hiding import hidden_qparams
from lfq_lightning.training.stepping.qparams import QParamOptimizer
from lfq_lightning.training.trainer.length import length_of
from tests.runs import Net, fit, images, qat

pytestmark = pytest.mark.quick

X = images().tensors[0]


def learned(model: nn.Module, x: Tensor = X, observer: str = "mse", domain: str = "linear") -> nn.Module:
    weight = lfq.QuantSpec(bits=4, granularity="per_channel", observer=observer, scale_domain=domain)
    lfq.attach(model, weight, lfq.QuantSpec(bits=4, symmetric=False, observer=observer, scale_domain=domain))
    lfq.calibrate(model, [x])
    lfq.set_phase(model, "learn")
    return model


def scales(model: nn.Module) -> dict[str, Tensor]:
    return {name: q.scale.detach().clone() for name, q in lfq.quantizers(model).items()}


def weights_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """What a user would make, at a learning rate of 0."""
    with hidden_qparams(model):
        return torch.optim.SGD(model.parameters(), lr=0.0)


def test_the_users_optimizer_never_sees_a_qparam(tmp_path: Path) -> None:
    seen: list[str] = []

    class Careful(Net):
        def configure_optimizers(self) -> Any:
            seen.extend(name for name, _ in self.named_parameters())
            decay = [p for p in self.parameters() if p.ndim >= 2]
            rest = [p for p in self.parameters() if p.ndim < 2]
            assert len(decay) + len(rest) == 8
            groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups, lr=1e-2)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda _: 0.5])
            return [optimizer], [schedule]

    model, _, _ = fit(tmp_path, Careful())
    assert seen
    assert not any("quantizer" in name for name in seen)
    assert [name for name, _ in model.named_parameters() if "quantizer" in name]


def test_hidden_qparams_come_back_as_they_were() -> None:
    model = learned(Net())
    before = list(model.named_parameters())
    with hidden_qparams(model):
        assert len(list(model.parameters())) == 8
        assert model.first.weight_quantizer.scale is dict(before)["first.weight_quantizer.scale"]
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(before, model.named_parameters(), strict=True))


# The bins of the default observer are the same after a power of two alone, and so are powers of two.
@pytest.mark.parametrize(
    ("observer", "factor", "domain"),
    [
        ("minmax", 1000.0, "linear"),
        ("lsq", 1000.0, "linear"),
        ("mse", 1024.0, "linear"),
        ("minmax", 1000.0, "log"),
        ("mse", 1024.0, "power_of_two"),
    ],
)
def test_learning_is_invariant_to_the_units_of_an_activation(observer: str, factor: float, domain: str) -> None:
    torch.manual_seed(0)
    target, moved = torch.randn(64, 3), []
    for unit in (1.0, factor):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 3))
        with torch.no_grad():
            model[0].weight.div_(unit)
        x = torch.randn(64, 5, generator=torch.Generator().manual_seed(2)) * unit
        learned(model, x, observer, domain)
        optimizer = weights_optimizer(model)
        QParamOptimizer(model, [optimizer])
        before = scales(model)
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), target).backward()
            optimizer.step()
        moved.append({name: scale / before[name] for name, scale in scales(model).items()})
    assert any((ratio - 1).abs().max() > 1e-3 for ratio in moved[0].values())
    for name, ratio in moved[0].items():
        torch.testing.assert_close(moved[1][name], ratio, rtol=1e-4, atol=0.0)


def overwritten(model: nn.Module) -> None:
    """Moves a module as XLA does: every parameter is another afterwards."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model._apply(torch.clone)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.parametrize("move", [lambda model: model._apply(torch.clone), overwritten])
@pytest.mark.parametrize("learns", [False, True])
def test_scales_go_on_learning_after_the_module_was_moved(move: Any, learns: bool) -> None:
    found = []
    for moved in (False, True):
        torch.manual_seed(1)
        model = learned(nn.Sequential(nn.Linear(5, 3)), torch.randn(64, 5))
        optimizer = weights_optimizer(model)
        QParamOptimizer(model, [optimizer])
        for step in range(4):
            if moved and step == 2 * learns:
                move(model)
            if step == 0:  # they begin to learn anew, from another scale
                for quantizer in lfq.quantizers(model).values():
                    quantizer.learned = False
                    quantizer.scale.data.mul_(1.5)
                lfq.set_phase(model, "learn")
            model.zero_grad()
            model(torch.ones(4, 5)).square().sum().backward()
            optimizer.step()
        found.append(scales(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_optimizers_state_follows_qparams_to_another_device() -> None:
    model = learned(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 3)), torch.randn(64, 5))
    optimizer = weights_optimizer(model)
    own = QParamOptimizer(model, [optimizer])
    for device in ("cpu", "meta"):
        model[1].to(device)  # a part alone
        for quantizer in lfq.quantizers(model).values():
            quantizer.scale.grad = torch.ones_like(quantizer.scale)
        own.step(0)
    places = {state["exp_avg"].device.type for state in own.optimizers[0].state.values()}
    assert places == {"cpu", "meta"}


def test_one_step_changes_a_scale_by_at_most_two_and_keeps_zero_points_in_range() -> None:
    model = learned(Net())
    optimizer = weights_optimizer(model)
    QParamOptimizer(model, [optimizer], partial(torch.optim.SGD, lr=1e9))
    before = scales(model)
    model(X).square().sum().backward()
    optimizer.step()
    for name, scale in scales(model).items():
        assert (scale >= before[name] / 2).all()
        assert (scale <= before[name] * 2).all()
        quantizer = lfq.quantizers(model)[name]
        assert (quantizer.zero_point >= quantizer.quant_min).all()
        assert (quantizer.zero_point <= quantizer.quant_max).all()


def test_a_gradient_that_is_not_finite_moves_nothing_despite_momentum() -> None:
    model = learned(Net())
    optimizer = weights_optimizer(model)
    QParamOptimizer(model, [optimizer])
    model(X).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    (model(X) * torch.nan).sum().backward()
    before = scales(model)
    optimizer.step()
    assert all(torch.equal(scale, before[name]) for name, scale in scales(model).items())


def test_a_layer_that_took_no_part_keeps_still_despite_momentum() -> None:
    pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    learned(pair, torch.randn(8, 4))
    optimizer = weights_optimizer(pair)
    QParamOptimizer(pair, [optimizer])
    pair(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    before = scales(pair)
    pair[0](torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    after = scales(pair)
    assert torch.equal(after["1.weight_quantizer"], before["1.weight_quantizer"])
    assert not torch.equal(after["0.weight_quantizer"], before["0.weight_quantizer"])


class Operations(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return operation(*args, **(kwargs or {}))


def test_a_step_takes_no_more_operations_for_many_quantizers_than_for_few() -> None:
    counts = []
    for layers in (2, 9):
        stack = learned(nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)]), torch.randn(8, 4))
        owner = QParamOptimizer(stack, [weights_optimizer(stack)], partial(torch.optim.SGD, lr=0.1, foreach=True))
        stack(torch.randn(8, 4)).square().sum().backward()
        with Operations() as operations:
            owner.step(0)
        counts.append(operations.count)
    assert counts[0] == counts[1] < 60


@pytest.mark.parametrize(("domain", "rtol"), [("linear", 0.0), ("log", 1e-6), ("power_of_two", 1e-6)])
def test_qparams_that_step_together_step_as_those_of_each_layer_alone(domain: str, rtol: float) -> None:
    after = []
    for apart in (False, True):
        torch.manual_seed(1)
        stack = nn.Sequential(nn.Linear(5, 9), nn.Linear(9, 17), nn.Linear(17, 3))
        learned(stack, torch.randn(8, 5), domain=domain)
        groups = [list(layer.parameters(recurse=False)) for layer in stack]
        optimizers = [
            torch.optim.SGD(group, lr=0.0) for group in (groups if apart else [[p for group in groups for p in group]])
        ]
        QParamOptimizer(stack, optimizers, partial(torch.optim.Adam, lr=1e-2))
        for step in range(12):
            for optimizer in optimizers:
                optimizer.zero_grad()
            stack(torch.randn(8, 5)).square().mean().backward()
            if step % 3 == 1:
                stack[0].weight_quantizer.scale.grad[4] = torch.nan
                stack[1].input_quantizer.zero_point.grad.fill_(torch.inf)
                stack[2].input_quantizer.scale.grad = None
            stack[1].weight.requires_grad_(step != 5)
            for optimizer in optimizers:
                optimizer.step()
        after.append(torch.cat([p.detach() for p in qparams(stack)]))
    assert after[0].isfinite().all()
    torch.testing.assert_close(after[0], after[1], rtol=rtol, atol=0.0)


def test_each_qparam_follows_the_optimizer_of_its_layers_weight() -> None:
    pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    learned(pair, torch.randn(8, 4))
    first, second = (torch.optim.SGD(layer.parameters(recurse=False), lr=0.0) for layer in pair)
    owner = QParamOptimizer(pair, [first, second])
    pair(torch.randn(8, 4)).square().sum().backward()
    before = scales(pair)
    second.step()
    after = scales(pair)
    assert torch.equal(after["0.weight_quantizer"], before["0.weight_quantizer"])
    assert not torch.equal(after["1.weight_quantizer"], before["1.weight_quantizer"])
    second.zero_grad()
    assert pair[1].weight_quantizer.scale.grad is None
    assert pair[0].weight_quantizer.scale.grad is not None
    owner.remove()
    before = scales(pair)
    first.step()
    assert all(torch.equal(scale, before[name]) for name, scale in scales(pair).items())


class Gan(L.LightningModule):
    """Two networks and two optimizers, stepped by hand."""

    def __init__(self, toggle: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
        self.toggle = toggle
        self.leaked: list[bool] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real = batch[0].flatten(1)[:, :6]
        for index, optimizer in enumerate(self.optimizers()):
            if self.toggle:
                self.toggle_optimizer(optimizer)
            fake = self.generator(real[:, :4])
            scores = self.discriminator(fake if index == 0 else torch.cat([real, fake.detach()]))
            optimizer.zero_grad()
            own = (self.generator, self.discriminator)[index]
            self.leaked += [q.scale.grad is not None for q in lfq.quantizers(own).values()]
            self.manual_backward(scores.square().mean())
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=1e-3) for net in (self.generator, self.discriminator)]


@pytest.mark.parametrize("toggle", [False, True])
def test_in_a_gan_no_qparam_learns_from_the_other_networks_step(tmp_path: Path, toggle: bool) -> None:
    schedule = lfq.PhaseSchedule(observe=0, estimate=4, learn=8, unit="step")
    model, made, callback = fit(tmp_path, Gan(toggle), callback=qat(schedule=schedule))
    assert not any(model.leaked)
    assert len(callback.qparam_optimizer.optimizers) == 2
    assert length_of(made)[1] == made.global_step  # the Trainer counts the steps of both
    for quantizer in lfq.quantizers(model).values():
        assert not torch.equal(quantizer.scale, quantizer.scale_reference)


def test_optimizer_and_schedule_are_arguments(tmp_path: Path) -> None:
    callback = qat(
        optimizer=partial(torch.optim.SGD, lr=0.5),
        lr_schedule=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
    )
    fit(tmp_path, callback=callback)
    [own] = callback.qparam_optimizer.optimizers
    assert type(own) is torch.optim.SGD
    assert callback.qparam_optimizer.learning_rates == [0.5 * 0.5**8]


def test_under_one_cycle_qparams_come_to_their_own_rate_at_its_peak() -> None:
    model = learned(Net())
    with hidden_qparams(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    qparams_optimizer, rates = QParamOptimizer(model, [optimizer]), []
    [own] = qparams_optimizer.optimizers
    for _ in range(10):
        rates += qparams_optimizer.learning_rates
        model(torch.randn(4, 1, 8, 8)).sum().backward()
        optimizer.step()
        assert own.param_groups[0]["lr"] == rates[-1], "what is announced is what the step takes"
        schedule.step()
    assert rates[0] == pytest.approx(1e-3 / 25)
    assert max(rates) == pytest.approx(1e-3)


def test_a_factory_that_makes_no_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be a callable that makes a torch optimizer"):
        fit(tmp_path, callback=qat(optimizer=list))
    with pytest.raises(TypeError, match="must be a callable"):
        qat(optimizer="adam")


@pytest.mark.parametrize("failing", ["optimizer", "schedule"])
def test_a_factory_that_fails_for_the_second_optimizer_leaves_nothing_on_the_first(failing: str) -> None:
    pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    learned(pair, torch.randn(8, 4))
    followed = [torch.optim.SGD(layer.parameters(recurse=False), lr=0.1) for layer in pair]
    made: list[Any] = []

    def once(make: Any, argument: Any) -> Any:
        made.append(argument)
        if len(made) == 2:
            raise ValueError("no second one")
        return make(argument)

    optimizer, schedule = partial(torch.optim.SGD, lr=0.1), partial(torch.optim.lr_scheduler.StepLR, step_size=1)
    factories = (partial(once, optimizer), schedule) if failing == "optimizer" else (optimizer, partial(once, schedule))
    with pytest.raises(ValueError, match="no second one"):
        QParamOptimizer(pair, followed, *factories)
    for left in followed:
        assert not left._optimizer_step_post_hooks
        assert "zero_grad" not in left.__dict__
