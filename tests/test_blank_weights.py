"""Weights that are all zeros when their scale is set: it follows them once they grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lfq_lightning as lfq
from tests.runs import every_epoch, fit, qat

pytestmark = pytest.mark.quick


class Adapted(L.LightningModule):
    """A frozen layer with a low-rank adapter whose second half begins at zero (Hu et al. 2021, LoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self(batch) - self.base(batch) - 0.3 * batch.roll(1, dims=1)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([*self.down.parameters(), *self.up.parameters()], lr=0.03)


def batches(count: int = 10) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader([torch.randn(32, 8, generator=generator) for _ in range(count)], batch_size=None)


def trained(directory: Path, schedule: lfq.PhaseSchedule, observer: Any = "mse", **options: Any) -> Adapted:
    weight = lfq.QuantSpec(bits=8, granularity="per_channel", observer=observer)
    callback = qat(weight=weight, activation=8, schedule=schedule)
    settings = {"max_epochs": 2, "callbacks": [], **options}
    return fit(directory, Adapted(), callback=callback, data=batches(), **settings)[0]


@pytest.mark.parametrize(("observer", "learn"), [("mse", 1), ("minmax", 1), ("mse", 4)])
def test_a_weight_that_began_at_zero_gets_away_from_it(tmp_path: Path, observer: Any, learn: int) -> None:
    model = trained(tmp_path, lfq.PhaseSchedule(0, 0, learn, unit="step"), observer, max_epochs=1)
    weight, quantizer = model.up.weight.detach(), model.up.weight_quantizer
    assert weight.abs().amax() > 0.1
    assert (quantizer(weight) - weight).norm() < 0.2 * weight.norm()


def test_single_channels_of_zeros_follow_and_the_others_keep_what_they_learned() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    nn.init.zeros_(model[0].weight[1].detach())
    lfq.attach(model)
    lfq.calibrate(model, [torch.randn(8, 4)])
    lfq.set_phase(model, "learn")
    quantizer = model[0].weight_quantizer
    assert quantizer.blank.tolist() == [False, True, False]
    assert not quantizer.follow(model[0].weight.detach())
    with torch.no_grad():
        quantizer.scale.mul_(1.5)
        before = quantizer.scale.clone()
        model[0].weight.mul_(5)
        model[0].weight[1] = torch.tensor([0.5, -1.27, 0.1, 0.0])
    assert quantizer.follow(model[0].weight.detach())
    assert torch.equal(quantizer.scale[::2], before[::2])
    assert quantizer.scale[1].item() == pytest.approx(1.27 / 127, rel=0.1)
    assert quantizer.scale_reference[1] == quantizer.scale[1]
    assert not quantizer.follow(model[0].weight.detach())


def test_a_run_that_resumes_while_a_weight_grows_from_zero_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    schedule = lfq.PhaseSchedule(0, 1, 2, unit="step")

    def run(directory: Path, **more: Any) -> dict[str, Any]:
        more = {"callbacks": [every_epoch(directory)], "max_epochs": 2, **more}
        return trained(directory, schedule, **more).state_dict()

    whole = run(tmp_path / "whole")
    part = run(tmp_path / "part", ckpt_path=tmp_path / "whole/epoch=0.ckpt")
    assert any(key.endswith("observer.blank") for key in whole)
    assert all(torch.equal(part[key], value) for key, value in whole.items())
