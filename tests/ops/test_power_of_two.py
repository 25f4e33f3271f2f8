"""Powers of two near a scale, against the definition in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lfq_lightning.ops import nearest_power_of_two, power_of_two_above

pytestmark = pytest.mark.quick

EPS = torch.finfo(torch.float32).eps
SCALES = st.floats(EPS, 2.0**90, width=32) | st.integers(-23, 90).map(lambda n: math.ldexp(1.0, n))


@given(SCALES)
def test_the_nearest_is_within_half_an_octave_and_the_one_above_within_a_whole(scale: float) -> None:
    nearest, above = (f(torch.tensor([scale])).item() for f in (nearest_power_of_two, power_of_two_above))
    for found in (nearest, above):
        assert math.frexp(found)[0] == 0.5
    assert Fraction(1, 2) <= (Fraction(scale) / Fraction(nearest)) ** 2 < 2
    assert Fraction(1, 2) < Fraction(scale) / Fraction(above) <= 1


@pytest.mark.parametrize("power", [-23, -8, -1, 0, 5, 60])
def test_the_border_is_the_square_root_of_two_to_the_last_bit(power: int) -> None:
    unit = math.ldexp(1.0, power)
    below = torch.tensor([math.sqrt(2)]).item()
    above = torch.nextafter(torch.tensor(below), torch.tensor(2.0)).item()
    assert below < math.sqrt(2) < above
    found = nearest_power_of_two(torch.tensor([below * unit, above * unit]))
    assert found.tolist() == [unit, 2 * unit]


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-30])
def test_what_is_not_positive_counts_as_the_least_scale(scale: float) -> None:
    for function in (nearest_power_of_two, power_of_two_above):
        assert function(torch.tensor([scale])).item() == EPS


@given(SCALES)
def test_the_gradient_is_that_of_the_logarithm(scale: float) -> None:
    s = torch.tensor([scale], requires_grad=True)
    nearest = nearest_power_of_two(s)
    nearest.backward(torch.tensor([3.0]))
    by_log = 3.0 * nearest.item() * math.log(2)
    assert s.grad is not None
    assert s.grad.item() * scale * math.log(2) == pytest.approx(by_log, rel=1e-5)
