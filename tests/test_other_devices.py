"""What another device than the CPU would do, without one: nothing waits for it, and its branches find the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lfq_lightning as lfq
from lfq_lightning.gathering import Gathered, estimate_weights, set_gathering
from lfq_lightning.observers import OBSERVERS
from lfq_lightning.placement.points import points
from lfq_lightning.schedule import PHASES, Phase
from lfq_lightning.training.hiding import hidden_qparams
from lfq_lightning.training.stepping.qparams import QParamOptimizer
from tests.runs import BATCHES, Net, loader, qat, trainer


def on_meta(observer: str = "mse") -> Net:
    """The net where tensors have no values: whatever wants to look at one raises."""
    model = Net().to("meta")
    weight = lfq.QuantSpec(bits=4, granularity="per_channel", observer=observer)
    lfq.attach(model, weight, lfq.QuantSpec(bits=4, symmetric=False, observer=observer))
    for quantizer in lfq.quantizers(model).values():
        quantizer.estimated = True  # the first estimate of a run decides the sign, and waits
    return model


class NothingIsBroughtThere(TorchDispatchMode):
    """Refuses copies from the CPU to the device that wait for each other."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if isinstance(result, Tensor) and result.is_meta and name in ("_to_copy", "copy_", "lift_fresh"):
            source = args[1] if name == "copy_" else args[0]
            asynchronous = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
            assert source.is_meta != (name == "lift_fresh") or asynchronous, f"{name}: use non_blocking=True"
        return result


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu")])
@pytest.mark.parametrize("phase", PHASES)
def test_no_step_of_any_phase_looks_at_a_value(phase: Phase, scaler: Any) -> None:
    for observer in OBSERVERS if (phase, scaler) == ("estimate", None) else ["mse"]:
        model = on_meta(observer)
        with hidden_qparams(model):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        QParamOptimizer(model, [optimizer], scaler=scaler)
        for quantizer in lfq.quantizers(model).values():
            quantizer.phase = phase
        for _ in range(2):
            set_gathering(lfq.quantizers(model).values(), True)
            x, target = torch.randn(8, 1, 8, 8, device="meta"), torch.zeros(8, dtype=torch.long, device="meta")
            with NothingIsBroughtThere():
                nn.functional.cross_entropy(model(x), target).backward()
                optimizer.step()
                optimizer.zero_grad()
                set_gathering(lfq.quantizers(model).values(), False)
                Gathered(points(model)).merge(lambda flat, _: flat)
                estimate_weights(points(model), cheap=True)


class Meta(CPUAccelerator):
    """The device without values."""

    def setup_device(self, device: torch.device) -> None:
        assert device.type == "meta"


class OnMeta(SingleDeviceStrategy):
    """Trains there, and leaves the model there."""

    def __init__(self) -> None:
        super().__init__(device=torch.device("meta"), accelerator=Meta())

    def teardown(self) -> None:
        self.accelerator.teardown()


class Unsized:
    """Batches whose number Lightning does not know, and so does not ask the device about."""

    def __iter__(self) -> Any:
        return iter(loader())


class Silent(Net):
    """The net without metrics of its own, which are looked at when an epoch ends."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class Guard(L.Callback):
    """Refuses them in batches: one that begins to stands first of all callbacks, one that ends it last."""

    def __init__(self, mode: NothingIsBroughtThere, begins: bool) -> None:
        self.mode, self.begins = mode, begins

    def on_train_batch_start(self, *_: Any) -> None:
        if self.begins:
            self.mode.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        if not self.begins:
            self.mode.__exit__(None, None, None)


@pytest.mark.parametrize("optimizer", [None, "user"])
def test_no_step_of_a_run_between_two_records_looks_at_a_value(tmp_path: Path, optimizer: Any) -> None:
    model = Silent()
    lfq.attach(model, weight=4, activation=4)
    for quantizer in lfq.quantizers(model).values():
        quantizer.learned = True
    callback = qat(schedule=lfq.PhaseSchedule(0, 0, 0), record_every_n_steps=1000, optimizer=optimizer)
    made = trainer(tmp_path, [callback], accelerator="auto", strategy=OnMeta(), max_epochs=1)
    mode = NothingIsBroughtThere()
    made.callbacks = [Guard(mode, begins=True), *made.callbacks, Guard(mode, begins=False)]
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # its metrics, in the end
        made.fit(model, Unsized())
    assert made.global_step == BATCHES
    assert {q.phase for q in lfq.quantizers(model).values()} == {"learn"}
    assert model.second.weight_quantizer.scale.is_meta


class NoFloat64(TorchDispatchMode):
    """A device such as Metal, which has none."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        assert all(x.dtype is not torch.float64 for x in tree_leaves(result) if isinstance(x, Tensor)), function
        return result


@pytest.mark.parametrize("observer", ["minmax", "moving_average"])
def test_observers_of_ranges_need_no_float64(observer: Any) -> None:
    model = Net()
    weight = lfq.QuantSpec(bits=4, granularity="per_channel")
    with NoFloat64():
        lfq.attach(model, weight, lfq.QuantSpec(bits=4, symmetric=False, observer=observer))
        lfq.calibrate(model, [batch[0] for batch in loader()])
        lfq.set_phase(model, "learn")
        model(next(iter(loader()))[0]).sum().backward()


# A graph knows no values either, and takes the branches of other devices.
@pytest.mark.parametrize("layout", ["tensor", "channel"])
@pytest.mark.parametrize("name", OBSERVERS)
def test_observers_find_on_other_devices_what_they_find_on_the_cpu(name: str, layout: str) -> None:
    x = torch.randn(6, 5, 7) * 3.0 ** torch.randn(6, 5, 7)
    x[0, 0, 0], x[1, 0, 1], x[2, 0, 4] = torch.nan, torch.inf, -torch.inf
    x[:, 1], x[:, 2] = 0.0, torch.nan
    settings: dict[str, Any] = {"axis": 1, "channels": 5} if layout == "channel" else {}
    here, there = (OBSERVERS[name](-8, 7, symmetric=name == "lsq+", **settings) for _ in range(2))
    here.observe(x)
    torch.compile(there.observe, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(there.state_dict(), here.state_dict())
    found = torch.compile(there.calculate_qparams, backend="eager", fullgraph=True)()
    torch.testing.assert_close(found, here.calculate_qparams())
    torch.compiler.reset()
