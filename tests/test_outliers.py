"""Ranges survive outliers, lose no heavy tail, and what observers keep for that goes when it has served."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.observers import OBSERVERS, MinMaxObserver, MSEObserver
from tests.assertions import assert_bit_equal


def batches(outlier: float | None = None, count: int = 20, size: int = 256) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(size, generator=generator) for _ in range(count)]
    if outlier is not None:
        found[3][0] = outlier
    return found


def scale_of(name: str, bits: int, seen: list[Tensor], symmetric: bool = False) -> float:
    codes = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    observer = OBSERVERS[name](*codes, symmetric)
    for batch in seen:
        observer(batch)
    return observer.calculate_qparams()[0].item()


@pytest.mark.parametrize(
    ("name", "bits"),
    [("mse", 2), ("mse", 4), ("mse", 8), ("lsq", 2), ("lsq", 8), ("lsq+", 8), ("percentile", 4), ("moving_average", 4)],
)
def test_a_range_survives_one_outlier_of_any_size_in_one_batch(name: str, bits: int) -> None:
    for symmetric in (False, True):
        clean = scale_of(name, bits, batches(), symmetric)
        for outlier in (100.0, -1000.0, 1e6):
            assert scale_of(name, bits, batches(outlier), symmetric) == pytest.approx(clean, rel=0.1)


@pytest.mark.parametrize("name", ["mse", "percentile"])
def test_a_range_survives_rare_outliers_of_every_batch(name: str) -> None:
    clean = batches(count=4, size=100_000)
    seen = [batch.clone() for batch in clean]
    for batch in seen:
        batch[:10] *= 1e4
    for bits in (2, 8):
        assert scale_of(name, bits, seen) == pytest.approx(scale_of(name, bits, clean), rel=0.1)


def test_min_max_is_all_that_was_seen() -> None:
    assert scale_of("minmax", 8, batches(1000.0)) * 255 > 1000


def test_what_follows_from_an_outlier_in_the_layers_behind_is_left_out_too() -> None:
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    lfq.attach(net, weight=4, activation=4)
    seen = [batch.view(32, 8) for batch in batches()]
    with_outlier = [batch.view(32, 8) for batch in batches(1000.0)]
    twin = copy.deepcopy(net)
    lfq.calibrate(net, seen)
    lfq.calibrate(twin, with_outlier)
    for name, quantizer in lfq.quantizers(net).items():
        torch.testing.assert_close(lfq.quantizers(twin)[name].scale, quantizer.scale, rtol=0.1, atol=0.0)


def error(x: Tensor, scale: Tensor, zero_point: Tensor, codes: tuple[int, int]) -> float:
    found = ((x / scale).round() + zero_point).clamp(*codes) - zero_point
    return float((found * scale - x).double().square().mean())


def heavy(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(128, 768, generator=generator)
    if kind == "channel":  # as inputs of GELU and attention have
        x[:, 5] *= 60
    elif kind == "laplace":
        x = x.abs().square() * x.sign()
    elif kind == "relu":
        x = x.relu()
    return x


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("kind", ["normal", "laplace", "relu", "channel"])
def test_a_histogram_gives_the_least_error_within_two_percent_and_loses_no_heavy_tail(kind: str, bits: int) -> None:
    x, codes = heavy(kind), (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    observer = MSEObserver(*codes, symmetric=True)
    for part in x.chunk(16):
        observer(part)
    scale, zero_point = observer.calculate_qparams()
    top = x.abs().max() / codes[1]
    least = min(error(x, top * 2 ** (-k / 16), zero_point, codes) for k in range(-8, 100))
    assert error(x, scale, zero_point, codes) <= 1.02 * least


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_weight_gets_the_least_error_of_a_fine_search_in_each_channel(symmetric: bool) -> None:
    x, codes = torch.randn(3, 1000), (-128, 127) if symmetric else (0, 255)
    observer = MSEObserver(*codes, symmetric, axis=0, channels=3, whole=True)
    observer(x)
    for row, scale, zero_point in zip(x, *observer.calculate_qparams(), strict=True):
        scales = [scale * (1 + k / 1000) for k in range(-60, 60, 2)]
        around = [zero_point] if symmetric else [zero_point + k for k in (-2, -1, 0, 1, 2)]
        least = min(error(row, s, z, codes) for s in scales for z in around)
        assert error(row, scale, zero_point, codes) <= 1.02 * least


def test_where_nothing_looks_at_the_counts_the_same_range_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, and in a compiled graph."""
    observer = MSEObserver(0, 15)
    observer(torch.randn(2000))
    expected = observer.calculate_qparams()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for found, wanted in zip(observer.calculate_qparams(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.0)


# ---- what is kept ---------------------------------------------------------------------------------------------------


def calibrated(observer: Any = "mse", granularity: Any = "per_tensor") -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(24, 48, 5, padding=2), nn.ReLU(), nn.Conv2d(48, 24, 5))
    activation = lfq.QuantSpec(bits=8, symmetric=False, observer=observer, granularity=granularity)
    lfq.attach(net, weight=8, activation=activation)
    lfq.calibrate(net, [torch.randn(2, 24, 6, 6) for _ in range(2)])
    return net


def size(state: dict[str, Any]) -> int:
    return sum(value.nbytes for value in state.values())


@pytest.mark.parametrize("phase", ["learn", "freeze"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_histograms_go_when_learning_begins_and_the_range_stays(granularity: str, phase: Any) -> None:
    net = calibrated(granularity=granularity)
    assert any(key.endswith("histogram") for key in net.state_dict())
    assert not any("histogram" in name for name, _ in net.named_buffers())  # which DDP broadcasts
    lfq.set_phase(net, phase)
    qparams = [p for q in lfq.quantizers(net).values() for p in (q.scale, q.zero_point)]
    floats = size({key: value for key, value in net.state_dict().items() if "quantizer" not in key})
    assert size(net.state_dict()) <= 1.05 * floats + sum(p.nbytes for p in qparams)
    for quantizer in lfq.quantizers(net).values():
        torch.testing.assert_close(quantizer.calculate_qparams()[0], quantizer.scale.detach(), rtol=1e-5, atol=0.0)


def test_a_file_that_holds_histograms_of_a_learned_model_loads_without_them() -> None:
    net = calibrated()
    prefix = "0.input_quantizer.observer."
    kept = {key: value.clone() for key, value in net.state_dict().items() if key.startswith(prefix)}
    del kept[prefix + "batches"]  # which earlier versions did not know
    lfq.set_phase(net, "learn")
    state = {**net.state_dict(), **kept}
    lfq.load_state_dict(net, state)
    assert not net[0].input_quantizer.observer.passing
    scale, _ = net[0].input_quantizer.calculate_qparams()
    torch.testing.assert_close(scale, net[0].input_quantizer.scale.detach(), rtol=0.01, atol=0.0)


@pytest.mark.parametrize("observer", ["mse", "percentile", "moving_average", "lsq"])
def test_observing_goes_on_from_a_state_dict_as_if_it_had_not_stopped(observer: str) -> None:
    whole, seen = calibrated(observer), [torch.randn(2, 24, 6, 6) for _ in range(2)]
    part = calibrated(observer)
    lfq.load_state_dict(part, copy.deepcopy(whole.state_dict()))
    for net in (whole, part):
        lfq.calibrate(net, seen)
    for key, value in whole.state_dict().items():
        assert_bit_equal(part.state_dict()[key].float(), value.float())


def test_an_observer_of_min_and_max_keeps_nothing_else() -> None:
    observer = MinMaxObserver(0, 15)
    observer(torch.randn(5))
    assert not observer.passing
