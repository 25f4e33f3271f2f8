"""Tells whether a quantizer spends next to all of its codes on nothing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_NEARLY_ALL = 0.99
# One-hot vectors, constants and learned levels share few codes too, and stay what they are.
_OFF, _HALF = 0.1, 0.5
# Of a few values, as in very sparse inputs, any number of codes would be few.
_LEAST = 32


def few_codes(quant_min: int, quant_max: int) -> int:
    """How many of a range's codes are few: two, and three of 128 or more, where zero has a neighbour on each side."""
    return 3 if quant_max - quant_min + 1 >= 128 else 2


def in_few_codes(u: npt.NDArray[np.float32], quant_min: int, quant_max: int) -> float:
    """The share of the values that falls into few codes, where that is a fault, else 0.

    It is one where few codes hold 99 % of the values and at least half of the values are off by more than a tenth of
    their own magnitude. Zeros do not count, as after a ReLU or in a pruned weight, nor does what is not finite;
    a few values tell nothing, and ranges of at most four codes have none to spare.

    Args:
        u: values over the scale, float32 of shape (values,).
        quant_min: smallest integer code.
        quant_max: largest integer code.
    """
    if quant_max - quant_min + 1 <= 4:
        return 0.0
    u = u[np.isfinite(u) & (u != 0)]
    r = np.rint(u)
    if u.size < _LEAST or np.count_nonzero(np.abs(r - u) > _OFF * np.abs(u)) < _HALF * u.size:
        return 0.0
    _, each = np.unique(r, return_counts=True)
    share = float(np.sort(each)[-few_codes(quant_min, quant_max) :].sum() / u.size)
    return share if share >= _NEARLY_ALL else 0.0
