"""Under torch.compile: no graph break, one compilation a phase and mode, the values of eager execution."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lfq_lightning as lfq
from lfq_lightning.gathering import Gathered, gathering, set_gathering
from lfq_lightning.placement.points import points
from lfq_lightning.records.trajectory import read_trajectory
from tests.operation_networks import ACTIVATIONS, WEIGHTS
from tests.operation_networks import attached as attached_for
from tests.runs import Net, fit, images, qat

X = images().tensors[0]
PHASES = ("off", "observe", "estimate", "learn", "freeze")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def attached(model: nn.Module, x: Tensor, weight: Any = 4, activation: Any = 4) -> nn.Module:
    lfq.attach(model, weight, activation)
    lfq.calibrate(model, [x])
    return model


# Compiling takes all of the time: one network goes through every phase and mode, and has the search for the least
# error. Where others differ from it, in how layers are called, in granularity and in what observes, two phases show.
def networks() -> dict[str, tuple[nn.Module, Tensor, tuple[Any, Any]]]:
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    groups = nn.Sequential(nn.Linear(40, 16), nn.ReLU(), nn.Linear(16, 16))
    by_range = lfq.QuantSpec(bits=4, symmetric=False, observer="minmax")
    grouped = lfq.QuantSpec(bits=4, granularity="per_group", group_size=16, observer="lsq")
    return {
        "convolution": (plain, X, (4, 4)),
        "transformer": (layer, torch.randn(4, 6, 16), (by_range, by_range)),
        "groups": (groups, torch.randn(8, 40), (grouped, by_range)),
    }


@pytest.mark.parametrize(
    ("kind", "phases"),
    [("convolution", PHASES), ("transformer", ("observe", "learn")), ("groups", ("observe", "learn"))],
)
def test_each_phase_and_mode_is_compiled_once_and_computes_what_eager_does(kind: str, phases: tuple[Any, ...]) -> None:
    model, x, specs = networks()[kind]
    attached(model, x, *specs)
    for phase in phases:
        lfq.set_phase(model, phase)
        eager = copy.deepcopy(model)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for training in (True, False) if kind == "convolution" or phase == "learn" else (True,):
            for net in (compiled, eager):
                net.train(training)
            for _ in range(2):
                outputs = [net(x) for net in (compiled, eager)]
                torch.testing.assert_close(*outputs)
                if training:
                    outputs[0].sum().backward()
        assert 1 <= counter.frame_count <= 2, phase


def test_gathering_under_the_callback_is_compiled_once_too() -> None:
    model = attached(Net(), X)
    lfq.set_phase(model, "observe")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(3):
        set_gathering(lfq.quantizers(model).values(), True)
        compiled(X)
        set_gathering(lfq.quantizers(model).values(), False)
        Gathered(points(model)).merge()
    assert counter.frame_count == 1
    assert model.second.input_quantizer.observer.saw_data()


def test_quantizers_alone_give_the_bits_of_eager_execution_from_the_inductor() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    attached(model, torch.randn(16, 8))
    lfq.set_phase(model, "learn")
    x = torch.randn(16, 8) * 3
    for quantizer in lfq.quantizers(model).values():
        value = model[0].weight if quantizer.role == "weight" else x
        assert torch.equal(torch.compile(quantizer, fullgraph=True)(value), quantizer(value))


@pytest.mark.parametrize("inner", [False, True])
def test_a_compiled_module_is_trained_recorded_and_loaded_with_plain_names(tmp_path: Path, inner: bool) -> None:
    class Wrapped(Net):
        def __init__(self) -> None:
            super().__init__()
            if inner:
                self.second = torch.compile(self.second, backend="eager")

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])  # Dynamo cannot trace Lightning's `log`

        validation_step = L.LightningModule.validation_step

    model = Wrapped() if inner else torch.compile(Wrapped(), backend="eager")
    model, made, callback = fit(tmp_path, model, callback=qat(record_every_n_steps=5))
    rows = read_trajectory(tmp_path / "trajectory.csv")
    assert {r.quantizer.split(".")[0] for r in rows} == {"first", "second", "head"}
    names = [row.quantizer for row in rows] + [layer.name for layer in callback.placement.layers]
    assert not any("_orig_mod" in name for name in [*names, *lfq.quantizers(model)])
    assert not any(math.isnan(r.saturation) for r in rows)
    made.save_checkpoint(tmp_path / "x.ckpt")
    again: Any = lfq.load_from_checkpoint(Wrapped, tmp_path / "x.ckpt")
    assert {q.phase for q in lfq.quantizers(again).values()} == {"learn"}
    assert torch.equal(again.eval()(X), made.lightning_module.eval()(X))


class Masked(nn.Module):
    """A head for those rows alone that a mask names, as for masked words, experts and key points."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.hidden(self.body(x)[mask]).relu())


@pytest.mark.parametrize("phase", ["off", "learn", "freeze"])
def test_a_length_that_depends_on_data_breaks_no_graph(phase: str) -> None:
    model, x, mask = Masked(), torch.randn(16, 8), torch.arange(16) % 3 > 0
    lfq.attach(model, weight=4, activation=4)
    lfq.calibrate(model, [x], lambda model, x: model(x, mask))
    lfq.set_phase(model, phase)
    eager, counter = copy.deepcopy(model), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for chosen in (mask, ~mask, torch.zeros_like(mask)):
        for net in (model, eager):
            net.zero_grad()
        outputs = [net(x, chosen) for net in (compiled, eager)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().sum().backward()
        for (name, one), other in zip(model.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert counter.frame_count == 1


@pytest.mark.parametrize("observer", ["mse", "moving_average", "lsq"])
def test_a_length_that_depends_on_data_is_observed_without_a_graph_break(observer: Any) -> None:
    model, x, mask = Masked(), torch.randn(16, 8), torch.arange(16) % 3 > 0
    lfq.attach(model, weight=4, activation=lfq.QuantSpec(bits=4, symmetric=False, observer=observer))
    lfq.set_phase(model, "observe")
    eager = copy.deepcopy(model)
    nets = torch.compile(model, fullgraph=True, backend="aot_eager"), eager
    for chosen in (mask, torch.zeros_like(mask)):
        for net, own in zip(nets, (model, eager), strict=True):
            with gathering(lfq.quantizers(own).values()):
                net(x, chosen)
                Gathered(points(own)).merge()
    for name, one in lfq.quantizers(model).items():
        found, expected = one.calculate_qparams(), lfq.quantizers(eager)[name].calculate_qparams()
        torch.testing.assert_close(found, expected, msg=name)


# ---- operations ---------------------------------------------------------------------------------------------------

EVERY_PRODUCT = lfq.Rule("*/scaled*", activation=8)


@pytest.mark.parametrize(
    ("kind", "rules"),
    [("slices", []), ("experts", []), ("residual", [lfq.Rule("/*", activation=8)]), ("attention", [EVERY_PRODUCT])],
)
def test_compiled_operations_compute_and_learn_what_eager_ones_do(kind: str, rules: Any) -> None:
    case = {**WEIGHTS, **ACTIVATIONS}[kind]
    model = attached_for(case, weight=4, activation=8, rules=rules)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    found, expected = compiled(*case.inputs), model(*case.inputs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for output in (found, expected):
        output.square().sum().backward()
    other = lfq.quantizers(compiled)
    for name, quantizer in lfq.quantizers(model).items():
        torch.testing.assert_close(other[name].scale.grad, quantizer.scale.grad, rtol=1e-3, atol=1e-5)
