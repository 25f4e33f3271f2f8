"""Observers that weigh what they see: against brute force, merged over parts, and in constant memory."""

from __future__ import annotations

import copy
import math
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.observers import OBSERVERS, LSQObserver, MSEObserver, PercentileObserver, ThreeSigmaObserver, mse
from lfq_lightning.records.summary import describe
from tests.assertions import assert_bit_equal

FITTING = ["percentile", "mse", "lsq", "lsq+"]
RANGES = {"affine": (0, 15, False), "symmetric": (-8, 7, True), "unsigned": (0, 15, True), "ternary": (-1, 1, True)}


def sample(seed: int, shape: tuple[int, ...], shift: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 3.0 ** torch.randn(shape, generator=generator) + shift


def error_of(x: Tensor, scale: float, zero_point: float, quant_min: int, quant_max: int) -> float:
    codes = ((x.double() / scale).round() + zero_point).clamp(quant_min, quant_max) - zero_point
    return float((codes * scale - x.double()).square().mean())


def least_error(x: Tensor, quant_min: int, quant_max: int, symmetric: bool) -> float:
    """Over a fine grid of scales, and every zero point."""
    top = float(x.abs().max()) * 2 / (quant_max - quant_min)
    zero_points = [0] if symmetric else range(quant_min, quant_max + 1)
    scales = [top * 2 ** (-k / 32) for k in range(-32, 160)]
    return min(error_of(x, scale, z, quant_min, quant_max) for scale in scales for z in zero_points)


@pytest.mark.quick
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", RANGES)
@given(seed=st.integers(0, 10_000), shift=st.sampled_from([0.0, 1.0, -5.0]))
@example(seed=14, shift=-5.0)  # many valleys
@example(seed=36, shift=-5.0)
@example(seed=1255, shift=-5.0)
@settings(max_examples=6)
def test_the_search_comes_near_the_least_mean_square_error(kind: str, whole: bool, seed: int, shift: float) -> None:
    quant_min, quant_max, symmetric = RANGES[kind]
    x = sample(seed, (500,), shift)
    if kind == "unsigned":
        x = x.abs()
    observer = MSEObserver(quant_min, quant_max, symmetric, whole=whole)
    observer(x)
    scale, zero_point = observer.calculate_qparams()
    found = error_of(x, scale.item(), zero_point.item(), quant_min, quant_max)
    # A histogram knows values to a sixteenth of an octave.
    assert found <= (1.05 if whole else 1.4) * least_error(x, quant_min, quant_max, symmetric)


@pytest.mark.quick
@given(seed=st.integers(0, 10_000), shift=st.sampled_from([0.0, 2.0]), percentile=st.sampled_from([90.0, 99.0, 100.0]))
@settings(max_examples=12)
def test_percentiles_lie_within_a_bin_of_those_of_the_data(seed: int, shift: float, percentile: float) -> None:
    x = sample(seed, (2000,), shift)
    observer = PercentileObserver(0, 255, percentile=percentile)
    observer(x)
    scale, _ = observer.calculate_qparams()
    high, low = (float(torch.quantile(x.double(), q)) for q in (percentile / 100, 1 - percentile / 100))
    assert scale.item() * 255 == pytest.approx(max(high, 0) - min(low, 0), rel=0.08)


SEEDS = st.integers(0, 10_000)
SHIFTS = st.sampled_from([0.0, 0.5, -3.0])


@pytest.mark.quick
@pytest.mark.parametrize("symmetric", [False, True])
@given(seed=SEEDS, shift=SHIFTS)
@settings(max_examples=15)
def test_lsq_starts_from_the_mean_magnitude(symmetric: bool, seed: int, shift: float) -> None:
    x = sample(seed, (4, 50), shift)
    observer = LSQObserver(-8, 7, symmetric, axis=0, channels=4)
    for batch in x.split(20, dim=1):
        observer(batch)
    expected = 2 * x.double().abs().mean(1) / math.sqrt(7 if symmetric else 15)
    torch.testing.assert_close(observer.calculate_qparams()[0].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.quick
@given(seed=SEEDS, shift=SHIFTS)
@settings(max_examples=15)
def test_lsq_plus_starts_weights_three_sigma_wide(seed: int, shift: float) -> None:
    x = sample(seed, (4, 50), shift)
    observer = OBSERVERS["lsq+"](-8, 7, symmetric=True, axis=0, channels=4)
    assert isinstance(observer, ThreeSigmaObserver)
    for batch in x.split(20, dim=1):
        observer(batch)
    mean, sigma = x.double().mean(1), x.double().std(1, correction=0)
    expected = torch.maximum((mean - 3 * sigma).abs(), (mean + 3 * sigma).abs()) / 8
    torch.testing.assert_close(observer.calculate_qparams()[0].double(), expected, rtol=1e-4, atol=0)
    assert isinstance(OBSERVERS["lsq+"](0, 15), MSEObserver)


@pytest.mark.parametrize("layout", ["tensor", "channel", "group"])
@pytest.mark.parametrize("name", FITTING)
@given(seed=SEEDS, shift=SHIFTS)
@settings(max_examples=5)
def test_parts_merged_equal_the_whole(name: str, layout: str, seed: int, shift: float) -> None:
    x = sample(seed, (6, 10), shift)
    x[0, 3], x[5, 9] = torch.nan, torch.inf
    # A group's remainder is part of every batch.
    settings = {"tensor": {}, "channel": {"axis": 1, "channels": 10}, "group": {"group_size": 4, "channels": 9}}[layout]
    rows = (x[:3], x[3:]) if layout != "group" else (x[:3], x[:3] * 2)
    merged, one_by_one = (OBSERVERS[name](-8, 7, symmetric=True, **settings) for _ in range(2))
    merged.update(merged.merge(*(merged.statistics(part) for part in rows)))
    for part in rows:
        one_by_one(part)
    if layout != "group":
        whole = OBSERVERS[name](-8, 7, symmetric=True, **settings)
        whole(x)
        torch.testing.assert_close(whole.calculate_qparams()[0], merged.calculate_qparams()[0])
    torch.testing.assert_close(one_by_one.calculate_qparams()[0], merged.calculate_qparams()[0])


@pytest.mark.parametrize("name", FITTING)
def test_a_remainder_group_is_fitted_to_its_own_values_alone(name: str) -> None:
    x = sample(3, (2, 10), 0.0)
    grouped = OBSERVERS[name](-8, 7, symmetric=True, group_size=4, channels=6, whole=True)
    alone = OBSERVERS[name](-8, 7, symmetric=True, whole=True)
    grouped(x)
    alone(x[1, 8:])
    torch.testing.assert_close(grouped.calculate_qparams()[0][5:], alone.calculate_qparams()[0])


@pytest.mark.parametrize("name", OBSERVERS)
def test_ten_thousand_batches_hold_constant_memory(name: str) -> None:
    def held() -> int:
        return sum(tensor.nbytes for tensor in observer.state_dict().values())

    observer = OBSERVERS[name](0, 15)
    batch = observer.statistics(torch.rand(16))
    observer.update(batch)
    before = held()
    for _ in range(10_000):
        observer.update(batch)
    assert held() == before
    assert before <= 2**17


@pytest.mark.parametrize("name", ["percentile", "mse", "lsq+"])
def test_units_of_a_power_of_two_change_the_scale_alone(name: str) -> None:
    x = sample(4, (300,), 1.0)
    scales = []
    for unit in (1.0, 1024.0):
        observer = OBSERVERS[name](0, 15)
        observer(x * unit)
        scales.append(observer.calculate_qparams()[0] / unit)
    assert_bit_equal(*scales)


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def learned(model: nn.Module, x: Tensor, weight: lfq.QuantSpec, activation: lfq.QuantSpec) -> dict[str, Any]:
    """What a model's quantizers go through from attaching to a first gradient."""
    lfq.attach(model, weight, activation)
    lfq.calibrate(model, [x[:8], x[8:]])
    lfq.set_phase(model, "learn")
    model(x).square().sum().backward()
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    share = lfq.quantizers(model)["0.input_quantizer"].saturation(x)
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {**state, **gradients, "share": share, "rows": describe(model, x).rows}


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.bfloat16, "cpu"), (torch.float64, "cpu"), (torch.float32, "meta")]
)
@pytest.mark.parametrize("domain", ["linear", "power_of_two"])
@pytest.mark.parametrize("name", OBSERVERS)
def test_the_default_dtype_and_device_have_no_say(name: Any, domain: Any, dtype: torch.dtype, device: str) -> None:
    model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6))
    x = torch.randn(3000, 6)
    kept = {"observer": name, "scale_domain": domain}
    weight = lfq.QuantSpec(bits=4, granularity="per_group", group_size=4, **kept)
    activation = lfq.QuantSpec(bits=4, symmetric=False, **kept)
    expected = learned(copy.deepcopy(model), x, weight, activation)
    with defaults(dtype, device):
        found = learned(copy.deepcopy(model), x, weight, activation)
    assert found.pop("rows") == expected.pop("rows")
    for key, value in expected.items():
        assert found[key].dtype is value.dtype, key
        assert_bit_equal(found[key], value)


def test_the_observer_is_the_same_wherever_it_is_imported() -> None:
    with defaults(torch.bfloat16, "meta"):
        imported = runpy.run_path(mse.__file__)["MSEObserver"]
    x = torch.randn(500)
    found, expected = (kind(-8, 7, True, whole=True) for kind in (imported, MSEObserver))
    found(x)
    expected(x)
    assert_bit_equal(found.calculate_qparams()[0], expected.calculate_qparams()[0])


@pytest.mark.parametrize("size", [2.0**-18, 2.0**60, 2.0**120])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", OBSERVERS)
def test_scales_are_found_at_any_size(name: str, whole: bool, size: float) -> None:
    x = torch.randn(500)
    found, same = OBSERVERS[name](-8, 7, True, whole=whole), OBSERVERS[name](-8, 7, True, whole=whole)
    found(x * size)
    same(x)
    assert_bit_equal(found.calculate_qparams()[0], same.calculate_qparams()[0] * size)


@pytest.mark.parametrize("name", ["mse", "percentile"])
def test_values_that_were_clipped_at_the_end_of_the_range_count(name: str) -> None:
    observer = OBSERVERS[name](0, 255)
    for _ in range(10):
        observer.observe((8 * torch.randn(1000)).clamp(0.0, 6.0))  # an eighth or so lies at 6, where a bin begins
    scale, zero_point = observer.calculate_qparams()
    torch.testing.assert_close((255 - zero_point) * scale, torch.tensor([6.0]))
    observer = OBSERVERS[name](0, 255)
    observer.observe(torch.zeros(10))
    assert all(found.isfinite().all() for found in observer.calculate_qparams())
