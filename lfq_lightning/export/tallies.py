"""Counts over batches of how far two computations of the same network are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lfq_lightning.export.parity import OutputParity, QuantizerParity


@dataclass
class Codes:
    """One quantizer's codes, counted over batches."""

    count: int = 0
    equal: int = 0
    largest: int = 0

    def take_in(self, expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> None:
        """Count one batch."""
        self.count += sum(codes.size for codes in expected)
        for mine, theirs in zip(expected, found, strict=False):  # those that the file lacks are not equal
            apart = np.abs(mine - theirs.astype(np.int32))
            self.equal += int((apart == 0).sum())
            self.largest = max(self.largest, int(apart.max(initial=0)))

    def row(self, name: str) -> QuantizerParity:
        """The share of equal codes, and the largest difference."""
        return QuantizerParity(name, self.count, self.equal / max(self.count, 1), self.largest)


class Outputs:
    """How far one session's outputs are from what the model gives."""

    def __init__(self, names: Sequence[str]) -> None:
        self.gaps = [Gap() for _ in names]
        self.same = 0

    def take_in(self, found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
        """Count one batch of every output."""
        for gap, mine, theirs in zip(self.gaps, expected, found, strict=True):
            gap.take_in(theirs, mine)
        self.same += int((found[0].argmax(-1) == expected[0].argmax(-1)).sum())

    def parity(self, quantum: float, count: int) -> OutputParity:
        """The worst of all outputs, in the output's units and in quanta."""
        largest = max(gap.largest for gap in self.gaps)
        noise = max(gap.noise for gap in self.gaps)
        return OutputParity(largest, largest / quantum, noise, self.same / max(count, 1))


@dataclass
class Gap:
    """How far one output is from what the model gives."""

    largest: float = 0.0
    squares: float = 0.0
    power: float = 0.0

    def take_in(self, found: np.ndarray, expected: np.ndarray) -> None:
        """Count one batch."""
        same = (found == expected) | (np.isnan(found) & np.isnan(expected))  # infinite masks are equal too
        f, e = (np.where(same, 0.0, x.astype(np.float64)) for x in (found, expected))
        apart = np.nan_to_num(np.abs(f - e), nan=np.inf)
        self.largest = max(self.largest, float(apart.max(initial=0)))
        self.squares += float((apart**2).sum())
        self.power += float((np.where(np.isfinite(expected), expected, 0).astype(np.float64) ** 2).sum())

    @property
    def noise(self) -> float:
        """The power of the difference over that of the expected output."""
        return self.squares / max(self.power, float(np.finfo(np.float32).tiny))
