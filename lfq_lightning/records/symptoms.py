"""What records show of a quantizer that has collapsed, or that leaves its codes unused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lfq_lightning.placement.points import Points
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.records.codes import few_codes
from lfq_lightning.records.trajectory import TrajectoryRow

# The smallest scale that quantization divides by, with room for the nine digits of a record.
_FLOOR = torch.finfo(torch.float32).eps * (1 + 1e-6)
# Weights shrink in training, and by normalisation may; not to a thousandth.
_SHRUNK = 1e-3
# What a quantizer clamps is lost; zeros after a ReLU never count as clamped.
_SATURATED, _SATURATED_FOR = 0.75, 3
# After a ReLU a zero point belongs at an end. One is suspicious that moved there, stayed, and clamps what lies beyond.
_PINNED_FOR, _BEYOND = 20, 0.1
# One batch may be unlike the data that a range was found on.
_UNUSED_FOR = 3


class Symptoms:
    """Remembers of each quantizer what one record alone does not tell.

    Collapsed is a quantizer whose scale or zero point is not finite, and, while it learns, one whose scale fell to its
    floor or to a thousandth, which clamps most of what it is given, or whose zero point moved to an end of the range,
    stays there, and lies where a good part of what it is given does not. Codes are unused only while outputs are
    quantized.

    Args:
        state: what `state_dict` gave; nothing at all remembers nothing.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._began: dict[str, float] = dict(state.get("began", {}))
        streaks = state.get("streaks", {})
        self._streaks: dict[str, dict[str, float]] = {name: dict(lasting) for name, lasting in streaks.items()}

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, in plain values."""
        streaks = {name: dict(lasting) for name, lasting in self._streaks.items()}
        return {"began": dict(self._began), "streaks": streaks}

    def forget(self, name: str) -> None:
        """Begin anew with a quantizer that does."""
        self._began.pop(name, None)
        self._streaks.pop(name, None)

    def collapsed(self, rows: Iterable[TrajectoryRow], points: Points) -> dict[str, str]:
        """The quantizers that these rows show to have collapsed, and how."""
        reasons = {row.quantizer: self._reason(row, points[row.quantizer].quantizer) for row in rows}
        return {name: reason for name, reason in reasons.items() if reason}

    def unused(
        self, rows: Iterable[TrajectoryRow], points: Points, in_few_codes: Mapping[str, float]
    ) -> dict[str, str]:
        """The quantizers most of whose codes were unused for some records, and how few are used; see `in_few_codes`."""
        reasons = {}
        for row in rows:
            name, quantized = row.quantizer, row.phase not in ("off", "observe")
            share = in_few_codes.get(name, 0.0) if quantized else 0.0
            if self._lasts(name, "unused", share > 0, _UNUSED_FOR):
                low, high = points[name].quantizer.code_range
                few = f"{few_codes(low, high)} of {high - low + 1} codes"
                reasons[name] = f"{share:.1%} of what it is given fall into {few}"
        return reasons

    def _reason(self, row: TrajectoryRow, quantizer: LearnableFakeQuantize) -> str:
        name = row.quantizer
        if not all(map(math.isfinite, (row.scale_min, row.scale_max, row.zero_point_min, row.zero_point_max))):
            return "its scale or zero point is not finite"
        if row.phase != "learn":
            return ""
        began = self._began.setdefault(name, row.scale_min)
        if row.scale_min <= max(began * _SHRUNK, _FLOOR) < began:  # a channel of zeros is at the floor from the start
            return f"its smallest scale fell from {began:.3g} to {row.scale_min:.3g}"
        if self._lasts(name, "saturated", row.saturation > _SATURATED, _SATURATED_FOR):
            return f"it clamps {row.saturation:.0%} of what it is given"
        at_end = row.zero_point_max <= quantizer.quant_min or row.zero_point_min >= quantizer.quant_max
        pinned = at_end and not quantizer.symmetric and row.saturation >= _BEYOND
        self._streaks.setdefault(name, {}).setdefault("pinned", -math.inf if pinned else 0)
        if self._lasts(name, "pinned", pinned, _PINNED_FOR):
            return (
                f"its zero point went to {row.zero_point_mean:g}, an end of the range, and clamps {row.saturation:.0%}"
            )
        return ""

    def _lasts(self, name: str, what: str, holds: bool, records: int) -> bool:
        lasting = self._streaks.setdefault(name, {})
        lasting[what] = lasting.get(what, 0) + 1 if holds else 0
        return lasting[what] >= records
