"""What a picture of trajectories shows: curves by quantity and kind of tensor, and the phases behind them."""

from __future__ import annotations

import math
from itertools import accumulate

from lfq_lightning.quantizer.saved import Role, role_in_name
from lfq_lightning.records.trajectory import TrajectoryRow

# Of each step that is drawn: the step, the line, and both ends of the band around it.
Curve = list[tuple[int, float, float, float]]

KINDS: dict[Role, str] = {"weight": "weights", "input": "activations"}
QUANTITIES = {
    "scale": "scale",
    "movement": "scale / scale on\nentering learn",
    "saturation": "saturated share",
    "zero_point": "zero point",
}
# Told apart by colour-blind readers (after Paul Tol's "muted"), and none of them pale.
PALETTE = ["#332288", "#cc6677", "#117733", "#ddaa33", "#66bbdd", "#882255"]
PALETTE += ["#44aa99", "#999933", "#aa4499", "#777777", "#bb5500", "#1155cc"]
PHASE_COLOURS = {"observe": "#dce6f2", "estimate": "#fbe9cc", "freeze": "#e6e6e6"}


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
