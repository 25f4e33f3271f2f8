"""Tells whether a quantizer spends next to all of its codes on nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

_NEARLY_ALL = 0.99
# One-hot vectors, constants and learned levels share few codes too, and stay what they are.
_OFF, _HALF = 0.1, 0.5
# Of a few values, as in very sparse inputs, any number of codes would be few.
_LEAST = 32
_GLANCE = 64


def few_codes(quant_min: int, quant_max: int) -> int:
    """How many of a range's codes are few: two, and three of 128 or more, where zero has a neighbour on each side."""
    return 3 if quant_max - quant_min + 1 >= 128 else 2


def in_few_codes(each: Sequence[Array], ranges: Sequence[tuple[int, int]]) -> tuple[float, ...]:
    """For each quantizer the share of its values that falls into few codes, where that is a fault, else 0.

    It is one where few codes hold 99 % of the values and at least half of the values are off by more than a tenth of
    their own magnitude. Zeros do not count, as after a ReLU or in a pruned weight, nor does what is not finite;
    a few values tell nothing, and ranges of at most four codes have none to spare.

    Args:
        each: of each quantizer values over the scale, float32 of shape (values,).
        ranges: of each quantizer the smallest and the largest integer code.
    """
    # All at once, as every record asks it of every quantizer; few are left to look at closely.
    u = np.concatenate([*each, np.ones(1, np.float32)])
    counts = np.isfinite(u) & (u != 0)
    r = np.rint(u)
    with np.errstate(invalid="ignore"):
        off = counts & (np.abs(r - u) > _OFF * np.abs(u))
    ends = np.cumsum([len(values) for values in each])
    begins = ends - [len(values) for values in each]
    totals = [np.concatenate([[0], np.cumsum(found)]) for found in (counts, off)]
    sizes, far = (total[ends] - total[begins] for total in totals)
    shares = [0.0] * len(each)
    for index in np.flatnonzero((sizes >= _LEAST) & (far >= _HALF * sizes)).tolist():
        quant_min, quant_max = ranges[index]
        if quant_max - quant_min + 1 > 4:
            part = slice(begins[index], ends[index])
            shares[index] = _share(r[part][counts[part]], few_codes(quant_min, quant_max))
    return tuple(shares)


def _share(r: Array, few: int) -> float:
    """The share of rounded values in as many codes as are few, where it is nearly all, else 0."""
    # What is spread over many codes shows that at once.
    for part in (r[:_GLANCE], r):
        inside = np.sort(np.unique(part, return_counts=True)[1])[-few:].sum()
        if len(part) - inside > (1 - _NEARLY_ALL) * len(r):
            return 0.0
    share = float(inside / len(r))
    return share if share >= _NEARLY_ALL else 0.0
