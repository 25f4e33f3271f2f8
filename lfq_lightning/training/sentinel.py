"""Reacts to quantizers that have collapsed or leave their codes unused, which what is recorded anyway shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lfq_lightning.placement.points import points
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.records.symptoms import Symptoms
from lfq_lightning.records.trajectory import TrajectoryRow

Reaction = Literal["warn", "reinit", "raise"]

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
    """Reacts to quantizers that have collapsed or leave their codes unused; see `Symptoms`.

    Estimated anew from the same values the range of one with unused codes would be the same, so that "reinit" does no
    more than "warn" about it.

    Args:
        reaction: "warn" names it once; "reinit" also estimates its qparams anew; "raise" ends the run.
        state: what `state_dict` gave; nothing at all remembers nothing.
    """

    def __init__(self, reaction: Reaction = "warn", state: Mapping[str, Any] | None = None) -> None:
        state = state or {}
        self.reaction, self.symptoms = reaction, Symptoms(state)
        self._named: set[str] = set(state.get("named", ()))
        self._named_unused: set[str] = set(state.get("named_unused", ()))  # which earlier versions did not know

    def state_dict(self) -> dict[str, Any]:
        """What is remembered of each quantizer, in plain values; on several ranks, that of rank zero decides."""
        named = {"named": sorted(self._named), "named_unused": sorted(self._named_unused)}
        return {**named, **self.symptoms.state_dict()}

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
        known = points(model)
        found = self.symptoms.collapsed(rows, known), self.symptoms.unused(rows, known, in_few_codes)
        if trainer.world_size > 1 and self.reaction != "warn":
            found = trainer.strategy.broadcast(found)  # what is measured is each rank's own, and all act or none
        collapsed, unused = found
        self.name_unused(unused)
        return self.react(model, collapsed)

    def react(self, model: nn.Module, collapsed: dict[str, str]) -> list[LearnableFakeQuantize]:
        """Warn of each quantizer once, or raise; with "reinit", start it over, and give those that were.

        Raises:
            RuntimeError: with "raise".
        """
        self._say("Quantizers collapsed", collapsed, _REMEDY, self._named)
        if self.reaction != "reinit":
            return []
        for name in collapsed:  # what it was says nothing about what it becomes
            self.symptoms.forget(name)
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
    point = points(model)[name]
    quantizer = point.quantizer
    if point.parameter is not None:
        quantizer.estimate_from(point.whole_parameter())
    elif quantizer.saw_data():
        quantizer.estimate()
    quantizer.scale_reference.copy_(quantizer.scale)
    return quantizer
