"""Notices quantizers that have collapsed or leave their codes unused, from what is recorded anyway."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lfq_lightning.checking import check_choice
from lfq_lightning.placement.host import hosts, quantizers, whole_weight
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.records.codes import few_codes
from lfq_lightning.records.trajectory import TrajectoryRow

Reaction = Literal["warn", "reinit", "raise"]

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

_REMEDY = (
    "Lower the learning rate of scales and zero points (`optimizer`), observe for longer (`schedule`), give the layer "
    'more bits with a Rule, or pass `on_collapse="reinit"`.'
)
_REMEDY_FOR_UNUSED = (
    "The range is much wider than the values: look for outliers in the data that were observed, take "
    'observer="mse" or "percentile" instead of "minmax", granularity="per_channel" where some channels are much '
    "larger than others, or give the layer more bits with a Rule."
)


class Sentinel:
    """Finds collapsed quantizers and those with unused codes in what is recorded, and reacts to each.

    Collapsed is a quantizer whose scale or zero point is not finite, and, while it learns, one whose scale fell to its
    floor or to a thousandth, which clamps most of what it is given, or whose zero point moved to an end of the range,
    stays there, and lies where a good part of what it is given does not.

    While outputs are quantized it also names a quantizer most of whose codes are unused; see `in_few_codes`. Estimated
    anew from the same values its range would be the same, so that "reinit" does no more than "warn" about it.

    Args:
        reaction: "warn" names it once; "reinit" also estimates its qparams anew; "raise" ends the run.

    Raises:
        ValueError: if the reaction is none of these.
    """

    def __init__(self, reaction: Reaction = "warn") -> None:
        check_choice("on_collapse", reaction, get_args(Reaction))
        self.reaction = reaction
        self.load_state_dict({})

    def state_dict(self) -> dict[str, Any]:
        """What is remembered of each quantizer, in plain values; on several ranks, that of rank zero decides."""
        streaks = {name: dict(lasting) for name, lasting in self._streaks.items()}
        named = {"named": sorted(self._named), "named_unused": sorted(self._named_unused)}
        return {**named, "began": dict(self._began), "streaks": streaks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave; nothing at all forgets."""
        self._named: set[str] = set(state.get("named", ()))
        self._named_unused: set[str] = set(state.get("named_unused", ()))  # which earlier versions did not know
        self._began: dict[str, float] = dict(state.get("began", {}))
        streaks = state.get("streaks", {})
        self._streaks: dict[str, dict[str, float]] = {name: dict(lasting) for name, lasting in streaks.items()}

    def watch(
        self, trainer: L.Trainer, model: nn.Module, rows: list[TrajectoryRow], in_few_codes: Mapping[str, float]
    ) -> list[LearnableFakeQuantize]:
        """React to what a record shows, on every rank alike; the quantizers that were started over.

        Args:
            trainer: which says how many ranks there are.
            model: the one that trains.
            rows: the record, which may be none.
            in_few_codes: by quantizer, the share of the values in few codes, where that is a fault, else 0.
        """
        if not rows:
            return []
        found = self.collapsed(model, rows), self.unused(model, rows, in_few_codes)
        if trainer.world_size > 1 and self.reaction != "warn":
            found = trainer.strategy.broadcast(found)  # what is measured is each rank's own, and all act or none
        collapsed, unused = found
        self.name_unused(unused)
        return self.react(model, collapsed)

    def collapsed(self, model: nn.Module, rows: Iterable[TrajectoryRow]) -> dict[str, str]:
        """The quantizers that these rows show to have collapsed, and how."""
        found = quantizers(model)
        reasons = {row.quantizer: self._reason(row, found[row.quantizer]) for row in rows}
        return {name: reason for name, reason in reasons.items() if reason}

    def unused(
        self, model: nn.Module, rows: Iterable[TrajectoryRow], in_few_codes: Mapping[str, float]
    ) -> dict[str, str]:
        """The quantizers most of whose codes were unused for some records, and how few are used."""
        found, reasons = quantizers(model), {}
        for row in rows:
            name, quantized = row.quantizer, row.phase not in ("off", "observe")
            share = in_few_codes.get(name, 0.0) if quantized else 0.0
            if self._lasts(name, "unused", share > 0, _UNUSED_FOR):
                low, high = found[name].code_range
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

    def react(self, model: nn.Module, collapsed: dict[str, str]) -> list[LearnableFakeQuantize]:
        """Warn of each quantizer once, or raise; with "reinit", start it over, and give those that were.

        Raises:
            RuntimeError: with "raise".
        """
        self._say("Quantizers collapsed", collapsed, _REMEDY, self._named)
        if self.reaction != "reinit":
            return []
        for name in collapsed:  # what it was says nothing about what it becomes
            self._began.pop(name, None)
            self._streaks.pop(name, None)
        return [_reinitialise(model, name) for name in collapsed]

    def name_unused(self, unused: dict[str, str]) -> None:
        """Warn once of each quantizer whose codes are unused, or raise.

        Raises:
            RuntimeError: with "raise".
        """
        self._say("Most codes of quantizers are unused", unused, _REMEDY_FOR_UNUSED, self._named_unused)

    def _say(self, what: str, reasons: dict[str, str], remedy: str, named: set[str]) -> None:
        fresh = {name: reason for name, reason in reasons.items() if name not in named}
        named.update(fresh)
        if not fresh:
            return
        shown = "; ".join(f"{name}: {reason}" for name, reason in fresh.items())
        said = f"{what}: {shown}. {remedy}"
        if self.reaction == "raise":
            raise RuntimeError(said)
        rank_zero_warn(said)


@torch.no_grad()
def _reinitialise(model: nn.Module, name: str) -> LearnableFakeQuantize:
    """Estimate a quantizer anew, from the weight as it is or from what was observed of the input."""
    quantizer = quantizers(model)[name]
    if quantizer.role == "weight" and quantizer.site is not None:
        quantizer.estimate_from(whole_weight(hosts(model)[name.rpartition(".")[0]]))
    elif quantizer.saw_data():
        quantizer.estimate()
    quantizer.scale_reference.copy_(quantizer.scale)
    return quantizer
