"""Observers keep the range of the finite values they saw, per tensor, channel or group."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lfq_lightning.observers import OBSERVERS, MinMaxObserver, MovingAverageObserver, Observer
from tests import oracle
from tests.assertions import assert_bit_equal
from tests.samples import GRIDS, Case, adversarial, cases, scales_needed

pytestmark = pytest.mark.quick

EPS = torch.finfo(torch.float32).eps


def ranges(x: Tensor, axis: int | None = None, group_size: int | None = None) -> list[tuple[float, float] | None]:
    """By brute force: the smallest and largest finite value of each share of x, None where there is none."""
    kept: list[list[float]] = [[] for _ in range(scales_needed(x.shape, axis, group_size))]
    values = x.float().numpy()
    for index in np.ndindex(values.shape):
        if np.isfinite(values[index]):
            kept[oracle.scale_index(index, values.shape, axis, group_size)].append(float(values[index]))
    return [(min(share), max(share)) if share else None for share in kept]


def qparams(
    low_high: tuple[float, float] | None, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[float, float]:
    """By the formulas, in float64, of one range: the scale that covers it and 0, and the zero point."""
    if low_high is None:
        return 1.0, 0.0
    low, high = min(low_high[0], 0.0), max(low_high[1], 0.0)
    if symmetric:
        return max(high / quant_max, low / quant_min if quant_min < 0 else 0.0, EPS), 0.0
    scale = max((high - low) / (quant_max - quant_min), EPS)
    return scale, min(max(quant_min - low / scale, quant_min), quant_max)


def assert_qparams(observer: Observer, expected: list[tuple[float, float] | None]) -> None:
    scale, zero_point = observer.calculate_qparams()
    assert scale.dtype is zero_point.dtype is torch.float32
    assert scale.shape == zero_point.shape == (len(expected),)
    for found_scale, found_zero_point, low_high in zip(scale.tolist(), zero_point.tolist(), expected, strict=True):
        exact = qparams(low_high, observer.quant_min, observer.quant_max, observer.symmetric)
        assert found_scale == pytest.approx(exact[0], rel=1e-5)
        assert found_zero_point == round(found_zero_point)
        # Rounding moves it by half, float32 by a little more.
        assert abs(found_zero_point - exact[1]) <= 0.501 + 1e-6 * abs(exact[1])


def observer_for(kind: type[Observer], case: Case, symmetric: bool = False, **more: Any) -> Observer:
    axis, group_size = case.settings.get("axis"), case.settings.get("group_size")
    codes = (-8, 7) if symmetric else (0, 15)
    return kind(*codes, symmetric, axis, group_size, case.scale.numel(), **more)


@settings(max_examples=200)
@given(case=cases(), symmetric=st.booleans())
def test_min_max_is_the_brute_force_range_of_the_finite_values(case: Case, symmetric: bool) -> None:
    observer = observer_for(MinMaxObserver, case, symmetric)
    assert observer(case.x) is case.x
    expected = ranges(case.x, observer.axis, observer.group_size)
    assert_qparams(observer, expected)
    assert observer.saw_data() == any(share is not None for share in expected)


@settings(max_examples=100)
@given(case=cases())
def test_what_is_not_finite_is_left_out_and_reported_for_its_share(case: Case) -> None:
    observer = observer_for(MinMaxObserver, case)
    reported = observer.statistics(case.x).extremes[2]
    share = torch.zeros(case.scale.numel(), dtype=torch.bool)
    values = case.x.float().numpy()
    for index in np.ndindex(values.shape):
        if not np.isfinite(values[index]):
            share[oracle.scale_index(index, values.shape, observer.axis, observer.group_size)] = True
    assert torch.equal(reported.bool(), share)


@settings(max_examples=100)
@given(case=cases(), seed=st.integers(0, 2**31))
def test_merging_two_batches_is_observing_both(case: Case, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    other = torch.randn(case.x.shape, generator=generator).to(case.x.dtype) * 3
    merged, one_by_one = observer_for(MinMaxObserver, case), observer_for(MinMaxObserver, case)
    merged.update(merged.merge(merged.statistics(case.x), merged.statistics(other)))
    one_by_one(case.x)
    one_by_one(other)
    assert_bit_equal(merged.minimum, one_by_one.minimum)
    assert_bit_equal(merged.maximum, one_by_one.maximum)


def test_merging_with_nothing_changes_nothing_and_observing_nothing_is_not_seeing() -> None:
    observer = MinMaxObserver(0, 15, axis=1, channels=3)
    statistics = observer.statistics(torch.randn(4, 3))
    assert_bit_equal(observer.merge(statistics, observer.nothing()).extremes, statistics.extremes)
    observer.update(observer.nothing())
    observer(torch.empty(0, 3))
    assert not observer.saw_data()
    assert [p.tolist() for p in observer.calculate_qparams()] == [[1.0] * 3, [0.0] * 3]


@settings(max_examples=60)
@given(
    constant=st.floats(0.01, 1.0),
    batches=st.lists(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=4), min_size=1, max_size=6),
)
def test_a_moving_average_begins_with_the_first_batch_and_moves_by_the_constant(
    constant: float, batches: list[list[float]]
) -> None:
    observer = MovingAverageObserver(0, 255, averaging_constant=constant)
    low, high = min(batches[0]), max(batches[0])
    observer(torch.tensor(batches[0]))
    for batch in batches[1:]:
        low += constant * (min(batch) - low)
        high += constant * (max(batch) - high)
        observer(torch.tensor(batch))
    assert observer.minimum.item() == pytest.approx(low, rel=1e-5, abs=1e-4)
    assert observer.maximum.item() == pytest.approx(high, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("odd", [[], [math.nan], [math.inf, -math.inf]], ids=str)
def test_a_batch_without_a_finite_value_does_not_move_an_average(odd: list[float]) -> None:
    observer, plain = MovingAverageObserver(0, 15), MovingAverageObserver(0, 15)
    for values in ([-1.0, 3.0], [2.0, 5.0]):
        observer(torch.tensor(odd))
        observer(torch.tensor(values))
        plain(torch.tensor(values))
    observer(torch.tensor(odd))
    assert_bit_equal(observer.minimum, plain.minimum)
    assert_bit_equal(observer.maximum, plain.maximum)


def test_values_that_are_not_finite_do_not_move_an_average_either() -> None:
    observer, plain = MovingAverageObserver(0, 15), MovingAverageObserver(0, 15)
    for values in ([2.0, 3.0], [-5.0, -4.0]):
        observer(torch.tensor([*values, math.nan, -math.inf]))
        plain(torch.tensor(values))
    assert_bit_equal(observer.minimum, plain.minimum)
    assert_bit_equal(observer.maximum, plain.maximum)


def moved(
    old: tuple[float, float] | None, new: tuple[float, float] | None, constant: float
) -> tuple[float, float] | None:
    if old is None or new is None:
        return old or new
    return old[0] + constant * (new[0] - old[0]), old[1] + constant * (new[1] - old[1])


@settings(max_examples=100)
@given(case=cases(), constant=st.sampled_from([0.01, 0.5]))
def test_a_moving_average_of_channels_and_groups_is_the_brute_force_one(case: Case, constant: float) -> None:
    observer = observer_for(MovingAverageObserver, case, averaging_constant=constant)
    halves = (case.x, (case.x.float() * 0.5).to(case.x.dtype))
    first, second = (ranges(x, observer.axis, observer.group_size) for x in halves)
    for x in halves:
        observer(x)
    assert_qparams(observer, [moved(*pair, constant) for pair in zip(first, second, strict=True)])


# ---- from a range to qparams ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "symmetric", "values", "scale", "zero_point"),
    [
        ((0, 15), False, [0.0, 3.0], 0.2, 0.0),
        ((0, 15), False, [-1.0, 2.0], 0.2, 5.0),
        ((0, 255), False, [2.0, 5.1], 0.02, 0.0),  # 0 is always inside
        ((0, 255), False, [-5.1, -2.0], 0.02, 255.0),
        ((-8, 7), False, [-1.0, 2.0], 0.2, -3.0),
        ((3, 10), False, [0.0, 7.0], 1.0, 3.0),
        ((-8, 7), True, [-1.6, 0.7], 0.2, 0.0),
        ((-8, 7), True, [-0.8, 1.4], 0.2, 0.0),
        ((-7, 7), True, [-1.4, 0.7], 0.2, 0.0),
        ((0, 15), True, [0.5, 3.0], 0.2, 0.0),
        ((0, 15), True, [-9.0, 3.0], 0.2, 0.0),
        ((0, 15), False, [0.0, 0.0], EPS, 0.0),
        ((-8, 7), True, [0.0], EPS, 0.0),
    ],
)
def test_the_formulas_of_affine_and_symmetric_qparams(
    codes: tuple[int, int], symmetric: bool, values: list[float], scale: float, zero_point: float
) -> None:
    observer = MinMaxObserver(*codes, symmetric)
    observer(torch.tensor(values))
    found = [p.item() for p in observer.calculate_qparams()]
    assert found == [pytest.approx(scale), zero_point]


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_range_as_wide_as_float32_gives_a_finite_scale(symmetric: bool) -> None:
    observer = MinMaxObserver(-8, 7, symmetric)
    observer(torch.tensor([-3e38, 3e38]))
    scale, zero_point = observer.calculate_qparams()
    assert scale.isfinite().all()
    assert zero_point.isfinite().all()


@pytest.mark.parametrize("kind", OBSERVERS.values())
def test_a_range_that_was_reset_is_unseen(kind: type[Observer]) -> None:
    observer = kind(0, 15, axis=0, channels=2)
    observer(torch.randn(2, 5))
    assert observer.saw_data()
    observer.reset()
    assert not observer.saw_data()
    fresh = kind(0, 15, axis=0, channels=2)
    for one in (observer, fresh):
        one(torch.tensor([[0.0, 3.0], [0.0, 1.5]]))
    assert_bit_equal(observer.calculate_qparams()[0], fresh.calculate_qparams()[0])


def test_statistics_change_no_state_and_have_no_gradient() -> None:
    observer = MinMaxObserver(0, 15)
    statistics = observer.statistics(torch.randn(5, requires_grad=True))
    assert not statistics.extremes.requires_grad
    assert not observer.saw_data()


@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
def test_a_large_tensor_with_every_kind_of_value_is_observed(grid: Any) -> None:
    x = adversarial(grid, 100_000)
    observer = MinMaxObserver(-8, 7, symmetric=True)
    observer(x)
    finite = x[x.isfinite()]
    assert observer.minimum == finite.min()
    assert observer.maximum == finite.max()


@pytest.mark.parametrize("constant", [0.0, -0.1, 1.5, math.nan])
def test_an_averaging_constant_outside_its_range_is_refused(constant: float) -> None:
    with pytest.raises(ValueError, match=f"`averaging_constant` must be in \\(0, 1\\]. Found {constant}"):
        MovingAverageObserver(averaging_constant=constant)


def test_a_wrong_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`quant_min` must be less than `quant_max`\. Found 5 and 5"):
        MinMaxObserver(5, 5)


def test_an_observer_prints_its_range_and_channels() -> None:
    assert repr(MinMaxObserver(0, 15, channels=3)) == "MinMaxObserver(quant_min=0, quant_max=15, channels=3)"
