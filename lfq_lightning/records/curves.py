"""What is shown of trajectories, whoever draws it: panels by quantity and kind of tensor, and the phases behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, TypeVar

from lfq_lightning.quantizer.saved import Role, role_in_name
from lfq_lightning.records.trajectory import TrajectoryRow

# Of each step that is drawn: the step, the line, and both ends of the band around it.
Curve = list[tuple[int, float, float, float]]
Colour = TypeVar("Colour")

KINDS: dict[Role, str] = {"weight": "weights", "input": "activations"}


class Quantity(NamedTuple):
    """What is shown of a quantizer.

    Args:
        label: what stands at its axis.
        note: what is said where there are no curves.
        is_share: values begin at 0 and are read in percent.
        reference: where a thin line tells what has not changed.
    """

    label: str
    note: str = "not recorded"
    is_share: bool = False
    reference: float | None = None


QUANTITIES = {
    "scale": Quantity("scale"),
    "movement": Quantity("scale / scale on\nentering learn", reference=1.0),
    "saturation": Quantity("saturated share", is_share=True),
    "zero_point": Quantity("zero point", note="all zero points are 0"),
}
# Told apart by colour-blind readers (after Paul Tol's "muted"), and none of them pale.
PALETTE = ["#332288", "#cc6677", "#117733", "#ddaa33", "#66bbdd", "#882255"]
PALETTE += ["#44aa99", "#999933", "#aa4499", "#777777", "#bb5500", "#1155cc"]
PHASE_COLOURS = {"observe": "#dce6f2", "estimate": "#fbe9cc", "freeze": "#e6e6e6"}


@dataclass(frozen=True)
class Panel:
    """The curves of one quantity and one kind of tensor, by quantizer."""

    quantity: str
    kind: str
    curves: dict[str, Curve]

    @property
    def shows(self) -> Quantity:
        """How its quantity is shown."""
        return QUANTITIES[self.quantity]

    @property
    def spread(self) -> float:
        """The largest positive value over the smallest."""
        positive = [value for curve in self.curves.values() for _, value, _, _ in curve if value > 0] or [1.0]
        return max(positive) / min(positive)

    @property
    def is_logarithmic(self) -> bool:
        """Whether factors are told rather than differences."""
        return self.quantity == "scale" or (self.quantity == "movement" and self.spread >= 4)


@dataclass(frozen=True)
class Sheet:
    """All panels of a run.

    Args:
        panels: a row for each quantity, in it a panel for each kind of tensor.
        layers: a short name for each layer.
        phases: name, first and last step of each.
    """

    panels: list[list[Panel]]
    layers: dict[str, str]
    phases: list[tuple[str, int, int]]

    @property
    def kinds(self) -> list[str]:
        """What stands above the columns."""
        return [panel.kind for panel in self.panels[0]]

    @property
    def limits(self) -> tuple[int, int]:
        """The first and the last step."""
        return self.phases[0][1], self.phases[-1][2]

    @property
    def are_told_apart(self) -> bool:
        """Whether each layer has a colour that a reader knows again."""
        return len(self.layers) <= len(PALETTE)

    def colours(self, shade: Callable[[float], Colour]) -> dict[str, str | Colour]:
        """A colour for each layer; of many, shades of one map.

        Args:
            shade: the map's colour at a point between 0 and 1, in the words of whoever draws.
        """
        if self.are_told_apart:
            return dict(zip(self.layers, PALETTE, strict=False))
        # Up to 0.9 only: the yellow end of such maps cannot be seen on white.
        return {layer: shade(0.9 * i / (len(self.layers) - 1)) for i, layer in enumerate(self.layers)}


def sheet_of(rows: list[TrajectoryRow]) -> Sheet | None:
    """What is shown of these rows; None where no quantizer was in use yet."""
    found = panels_of(rows)
    if not found:
        return None
    kinds = [kind for kind in (*KINDS.values(), "others") if any(kind == k for _, k in found)]
    quantities = [quantity for quantity in QUANTITIES if any(quantity == q for q, _ in found)]
    panels = [[Panel(quantity, kind, found.get((quantity, kind), {})) for kind in kinds] for quantity in quantities]
    layers = list(dict.fromkeys(layer_and_kind(row.quantizer)[0] for row in rows))
    return Sheet(panels, shortened(layers), phases_of(rows))


def panels_of(rows: list[TrajectoryRow]) -> dict[tuple[str, str], dict[str, Curve]]:
    """Return the curves of each panel that has any, by quantity and kind, then by quantizer."""
    quantizers: dict[str, list[TrajectoryRow]] = {}
    for row in rows:
        quantizers.setdefault(row.quantizer, []).append(row)
    panels: dict[tuple[str, str], dict[str, Curve]] = {}
    for name, found in quantizers.items():
        used = [r for r in found if r.phase not in ("off", "observe")]
        curves: dict[str, Curve] = {
            "scale": [(r.step, r.scale_mean, r.scale_min, r.scale_max) for r in used],
            "movement": _movement(found),
            "saturation": [(r.step, r.saturation, r.saturation, r.saturation) for r in used],
            "zero_point": [(r.step, r.zero_point_mean, r.zero_point_min, r.zero_point_max) for r in used],
        }
        if not any(r.zero_point_min or r.zero_point_max for r in used):
            del curves["zero_point"]
        for quantity, curve in curves.items():
            # What was not measured is bridged: saturation may be recorded less often than the scale.
            drawn = [point for point in curve if math.isfinite(point[1])]
            if drawn:
                panels.setdefault((quantity, layer_and_kind(name)[1]), {})[name] = drawn
    return panels


def _movement(rows: list[TrajectoryRow]) -> Curve:
    curve: Curve = []
    before, start = "off", math.nan
    for row in rows:
        if row.phase == "learn" and before not in ("learn", "freeze"):
            start = row.scale_mean
        if row.phase in ("learn", "freeze") and start > 0:
            ratio = row.scale_mean / start
            curve.append((row.step, ratio, ratio, ratio))
        before = row.phase
    return curve


def phases_of(rows: list[TrajectoryRow]) -> list[tuple[str, int, int]]:
    """Return the name, first and last step of each phase, in order."""
    starts: list[tuple[str, int]] = []
    for step, phase in {row.step: row.phase for row in rows}.items():
        if not starts or phase != starts[-1][0]:
            starts.append((phase, step))
    ends = [step for _, step in starts[1:]] + [max(rows[-1].step, rows[0].step + 1)]
    return [(phase, start, end) for (phase, start), end in zip(starts, ends, strict=True)]


def layer_and_kind(name: str) -> tuple[str, str]:
    """Return the layer that a quantizer belongs to, and the kind of tensor that it quantizes."""
    role = role_in_name(name)
    return (name, "others") if role is None else (name.rpartition(".")[0] or "(model)", KINDS[role])


def shortened(layers: list[str]) -> dict[str, str]:
    """Names without the parts that all begin with, and with their end alone where they are long."""
    parts = [layer.split(".") for layer in layers]
    shared = next((i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), 0)
    short = [".".join(part[shared:]) for part in parts]
    return {name: s if len(s) <= 32 else "…" + s[-31:] for name, s in zip(layers, short, strict=True)}


def trailing_mean(values: tuple[float, ...]) -> tuple[float, ...]:
    """The mean of the last thirtieth up to each value: trailing, so that nothing rises before what raises it."""
    sums, length = [0.0, *accumulate(values)], 1 + len(values) // 30
    lengths = (min(i, length) for i in range(1, len(sums)))
    return tuple((sums[i] - sums[i - n]) / n for i, n in enumerate(lengths, start=1))
