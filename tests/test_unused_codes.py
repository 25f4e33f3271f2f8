"""Quantizers that leave next to all of their codes unused are named once, with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lfq_lightning as lfq
from lfq_lightning.placement.points import points
from lfq_lightning.records.measuring import measure_weights, probed, snapshot
from tests.runs import every_epoch, fit, images, loader, qat

pytestmark = pytest.mark.quick

INPUTS = lfq.QuantSpec(bits=4, symmetric=False, observer="minmax")  # the first layer has 8 bits


def with_outlier() -> DataLoader[Any]:
    x, labels = (tensor.clone() for tensor in images().tensors)
    x[20, 0, 0, 0] = 1000.0
    return DataLoader(TensorDataset(x, labels), batch_size=8)


def run(directory: Path, **options: Any) -> Any:
    settings = {"schedule": lfq.PhaseSchedule(0, 8, 10, unit="step"), "record_every_n_steps": 1, **options}
    known = {name: settings.pop(name) for name in ("callbacks", "ckpt_path", "data") if name in settings}
    callback = qat(activation=INPUTS, weight=None, **settings)
    return fit(directory, callback=callback, limit_val_batches=0, **{"data": with_outlier(), **known})


def test_an_outlier_that_min_max_took_in_is_told_once_with_the_remedy(tmp_path: Path) -> None:
    with pytest.warns(UserWarning) as caught:
        run(tmp_path)
    [message] = [str(w.message) for w in caught if "unused" in str(w.message)]
    assert message.startswith("Most codes of quantizers are unused: first.input_quantizer: 99.8% of what it is given")
    assert "fall into 3 of 256 codes" in message
    assert 'observer="mse" or "percentile" instead of "minmax"' in message


def test_it_ends_the_run_where_that_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"unused: first\.input_quantizer: .* fall into 3 of 256 codes"):
        run(tmp_path, on_collapse="raise")


def test_without_the_outlier_nothing_is_said(tmp_path: Path) -> None:
    run(tmp_path, data=loader())  # warnings are errors


def test_a_run_that_is_resumed_does_not_say_it_again(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="unused"):
        run(tmp_path / "whole", callbacks=[every_epoch(tmp_path)])
    run(tmp_path / "part", callbacks=[every_epoch(tmp_path / "part")], ckpt_path=tmp_path / "epoch=1.ckpt")


# ---- what is a fault, and what is none ------------------------------------------------------------------------------


def share(bits: int, seen: Tensor, given: Tensor, symmetric: bool = False) -> float:
    """The share of an input's values in few codes under a min-max range of what was seen; 0 where that is no fault."""
    model = nn.Sequential(nn.Linear(given.shape[1], 2))
    spec = lfq.QuantSpec(bits=bits, symmetric=symmetric, observer="minmax")
    lfq.attach(model, weight=None, activation=spec, rules=[lfq.Rule("0", activation=spec)])
    lfq.calibrate(model, [seen])
    lfq.set_phase(model, "learn")
    with probed(points(model)) as measured:
        model(given)
    return snapshot(points(model), measured).in_few_codes[0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_values_of_size_one_under_a_range_of_a_thousand_use_few_codes(bits: int, symmetric: bool) -> None:
    x = torch.randn(64, 32)
    assert share(bits, torch.cat([x, torch.full((1, 32), 1000.0)]), x, symmetric) >= 0.99


def sparse(x: Tensor) -> Tensor:
    return torch.where(torch.rand_like(x) < 0.995, 0.0, x.relu())


WELL = {
    "one-hot": lambda: torch.eye(32)[torch.randint(32, (64,))],
    "binary": lambda: torch.randint(2, (64, 32)).float(),
    "plus and minus one": lambda: torch.randint(2, (64, 32)) * 2.0 - 1,
    "sparse after a ReLU": lambda: sparse(torch.randn(64, 32)),
    "three values": lambda: torch.zeros(64, 32).index_put(
        (torch.arange(3), torch.arange(3)), torch.tensor([0.3, 1, 1])
    ),
    "all zeros": lambda: torch.zeros(64, 32),
    "nearly constant": lambda: 10 + 0.1 * torch.randn(64, 32),
    "heavy-tailed": lambda: torch.randn(64, 32) * torch.randn(64, 32).abs(),
    "not finite": lambda: torch.full((64, 32), torch.nan),
    "no values": lambda: torch.zeros(0, 32),
}


@pytest.mark.parametrize("kind", WELL)
@pytest.mark.parametrize("bits", [4, 8])
def test_what_few_codes_serve_is_no_fault(kind: str, bits: int) -> None:
    x = WELL[kind]()
    seen = x if x.any() and x.isfinite().all() else torch.randn(64, 32)
    assert share(bits, seen, x) == 0.0


def test_four_codes_have_none_to_spare() -> None:
    x = torch.randn(64, 32)
    assert share(2, 100 * x, x) == 0.0


def test_a_weight_with_one_huge_value_is_one_per_tensor_and_none_per_channel() -> None:
    found = {}
    for granularity in ("per_tensor", "per_channel"):
        model = nn.Sequential(nn.Linear(32, 32))
        model[0].weight.data[5, 5] = 1e4 * model[0].weight.detach().std()
        lfq.attach(model, weight=lfq.QuantSpec(bits=8, granularity=granularity, observer="minmax"), activation=None)
        lfq.calibrate(model, [torch.randn(4, 32)])
        lfq.set_phase(model, "learn")
        [found[granularity]] = snapshot(points(model), measure_weights(points(model))).in_few_codes
    assert found["per_tensor"] > 0.99
    assert found["per_channel"] == 0.0


def test_every_channel_is_among_the_values_that_are_looked_at() -> None:
    """A stride of as many values as there are channels would look at one channel alone."""
    x = torch.randn(1024, 64)
    x[:, 0] = 1000.0
    quantizer = lfq.LearnableFakeQuantize.from_spec(lfq.QuantSpec(bits=4))
    chosen = quantizer.measured(x)[2:]
    assert (chosen > 100).float().mean().item() == pytest.approx(1 / 64, rel=0.1)
