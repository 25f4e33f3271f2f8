"""What of the values seen is an outlier: rare, and apart from the rest."""

from __future__ import annotations

import torch
from torch import Tensor

# A range of 4 times the rest's costs 2 bits. A heavy tail that thins out has not half of its rare values beyond that.
_OCTAVES_APART = 2
_SHARE = 1e-4
_BATCHES, _FEWEST = 20, 8

# Magnitudes of batches are kept by the half octave, from 2^-64 to 2^64; what lies beyond counts as lying at the end.
_PER_OCTAVE = 2
MAGNITUDES = 64 * 2 * _PER_OCTAVE
_SHIFT = 22
_LOWEST = (127 - 64) * _PER_OCTAVE


def magnitude_bin(bits: Tensor) -> Tensor:
    """The bin of each magnitude, of MAGNITUDES, from the bits of its float32; the first holds 0."""
    return ((bits >> _SHIFT) - _LOWEST).clamp(0, MAGNITUDES - 1)


def bin_of_range(low: Tensor, high: Tensor) -> Tensor:
    """The bin of the greatest magnitude of each range, int64 of shape (channels, 1); a range of nothing has none."""
    greatest = torch.maximum(-low, high).clamp(min=0.0)
    return magnitude_bin(greatest.view(torch.int32)).long()[:, None]


def apart(counts: Tensor, rare: Tensor, per_octave: int) -> Tensor:
    """The bins of magnitudes that hold outliers.

    They begin where no more than so many are left, and at least half of these lie another 4 times further out. In a
    tail that thins out, as those of activations do, fewer do.

    Args:
        counts: how many lie in each bin, from the smallest magnitude on, of shape (channels, bins).
        rare: the most that may be outliers, of shape (channels,).
        per_octave: bins for each factor of two.

    Returns:
        A mask of the shape of `counts`.
    """
    reach = counts.flip(1).cumsum(1).flip(1)
    further = torch.zeros_like(reach)
    shift = _OCTAVES_APART * per_octave
    further[:, :-shift] = reach[:, shift:]
    begins = (reach > 0) & (reach <= rare[:, None]) & (2 * further >= reach)
    return begins.cumsum(1) > 0


def rare_values(counts: Tensor, per_octave: int) -> Tensor:
    """The bins of magnitudes whose values are outliers: at most 1e-4 of those that are not 0, and apart.

    In few values that share is met by chance: twice the spread of its count is let pass.
    """
    counts = counts.double()
    counts = torch.cat([torch.zeros_like(counts[:, :1]), counts[:, 1:]], dim=1)  # zeros say nothing about magnitudes
    expected = _SHARE * counts.sum(1)
    return apart(counts, expected + 2 * expected.sqrt(), per_octave)


def rare_batches(batches: Tensor) -> Tensor:
    """The magnitudes that only few batches reached, one in 20 or a single one, and that lie apart from the others'.

    Args:
        batches: how many batches have their greatest magnitude in each bin, of shape (channels, MAGNITUDES).

    Returns:
        A mask of that shape; nothing of less than 8 batches is an outlier, as these say too little.
    """
    counts = torch.cat([torch.zeros_like(batches[:, :1]), batches[:, 1:]], dim=1)
    seen = counts.sum(1)
    few = (seen // _BATCHES).clamp(min=1)
    return apart(counts, torch.where(seen >= _FEWEST, few, 0), _PER_OCTAVE)


def none_are_rare(batches: Tensor) -> bool:
    """Whether a glance tells that `rare_batches` finds nothing, as mostly: the magnitudes of all lie close together.

    Elsewhere than on the CPU looking would wait for the device, and in a graph it is not possible.
    """
    if batches.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    used = batches[:, 1:].any(0).nonzero()
    return len(used) == 0 or int(used[-1] - used[0]) <= _OCTAVES_APART * _PER_OCTAVE


def beyond_the_rest(batches: Tensor) -> Tensor:
    """The magnitude beyond which only outliers of few batches lie, float32 of shape (channels,); infinite without any.

    Args:
        batches: as `rare_batches` takes it.
    """
    if none_are_rare(batches):
        return torch.full((len(batches),), torch.inf, dtype=torch.float32, device=batches.device)
    first = (~rare_batches(batches)).sum(1, dtype=torch.int32)
    edge = ((first + _LOWEST) << _SHIFT).view(torch.float32)
    return torch.where(first < MAGNITUDES, edge, torch.inf)
