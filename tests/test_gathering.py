"""Many quantizers at once: a batch is taken in for all together, bit for bit, without a walk through the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.gathering import Gathered, estimate_weights, gathering
from lfq_lightning.observers import OBSERVERS, Together, calculate_all
from lfq_lightning.placement.points import points
from tests.runs import Net, fit, images, qat

X = images().tensors[0]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in (*model.named_parameters(), *model.named_buffers()) if "quantizer" in name}


@pytest.mark.quick
@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_quantizers_that_are_served_together_get_what_each_would_get_alone(observer: Any, granularity: Any) -> None:
    spec = lfq.QuantSpec(bits=4, symmetric=False, granularity=granularity, observer=observer)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3))
    lfq.attach(model, spec, spec)
    lfq.set_phase(model, "estimate")
    twin, gathered = copy.deepcopy(model), Gathered(points(model))
    for batch in (X[:16], 3 * X[16:32]):
        estimate_weights(points(model))
        with gathering(lfq.quantizers(model).values()):
            model(batch)
            gathered.merge()
        twin(batch)  # used alone, each observes and estimates by itself
    expected, found = state_of(twin), state_of(model)
    # The twin's second layer saw what its first made of the second batch before the merge; ranges of weights are equal.
    for name, value in found.items():
        if name.startswith("0.") or "weight_quantizer" in name:
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("kind", OBSERVERS)
def test_observers_together_come_to_what_each_comes_to_alone(kind: Any) -> None:
    """Batches with an outlier, one observer that misses some, and one with another setting."""
    channels = [1, 3, 1, 200, 1, 900, *[1] * 12]
    group = [
        OBSERVERS[kind](0, 15 if number else 255, axis=1 if count > 1 else None, channels=count)
        for number, count in enumerate(channels)
    ]
    alone, together = copy.deepcopy(group), Together(group)
    for step in range(6):
        seen = {}
        for number, observer in enumerate(group):
            if (step + number) % 4:
                size = 1000.0 if step == 4 and number == 2 else 1.0 + number
                seen[observer] = observer.statistics(size * torch.randn(4, observer.channels))
        together.update(seen)
        for own, other in zip(alone, group, strict=True):
            if other in seen:
                own.update(seen[other])
        for own, other in zip(alone, group, strict=True):
            assert own.state_dict().keys() == other.state_dict().keys()
            for name, value in own.state_dict().items():
                assert torch.equal(other.state_dict()[name], value), name
    for own, found in zip(alone, calculate_all(group), strict=True):
        assert all(map(torch.equal, own.calculate_qparams(), found))


class Walked(Net):
    """Counts the walks through itself."""

    walks = 0

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        self.walks += 1
        return super().named_modules(*args, **kwargs)


class Walks(L.Callback):
    """How many walks there were in each batch."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        pl_module.walks = 0

    def on_before_zero_grad(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.counts.append(pl_module.walks)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.counts[-1] = pl_module.walks


@pytest.mark.quick
def test_no_batch_in_any_phase_walks_through_the_model(tmp_path: Path) -> None:
    walks = Walks()
    schedule = lfq.PhaseSchedule(observe=1, estimate=3, learn=5, unit="step")
    callback = qat(schedule=schedule, record_every_n_steps=100)
    fit(tmp_path, Walked(), callback=callback, callbacks=[walks], max_epochs=1)
    switches_look_at_ranks = {1, 3, 5}
    assert [count for step, count in enumerate(walks.counts) if step not in switches_look_at_ranks] == [0] * 5
