"""Draws the methods of a sweep: what they reach over what they cost, and the Pareto front."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from lfq_lightning.records.comparison import Comparison, Method
from lfq_lightning.records.plot import new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FRONT, BEHIND, FLOAT = "#332288", "#cc6677", "#555555"


def plot_comparison(comparison: Comparison, path: Path | str) -> Path:
    """Draw each method's mean with its standard deviation over the bytes, and a line along the Pareto front.

    Args:
        comparison: of one method or more.
        path: picture to write; its suffix decides the format (``.png``, ``.svg``, ``.pdf``).

    Returns:
        The path of the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure("plot_comparison", 5.6, 3.8)
    axes = figure.subplots()
    front = [m for m in comparison.methods if m.on_front]
    # Steps: between two methods there is none, and bytes short of the next buy no more than the one before.
    reached = [(m.size, m.mean) for m in front] + [(comparison.methods[-1].size, front[-1].mean)]
    axes.step(*zip(*reached, strict=True), where="post", color=FRONT, linewidth=1, alpha=0.5, zorder=1)
    for method in comparison.methods:
        _draw_method(axes, method)
    _label_axes(axes, comparison)
    return save(figure, Path(path), dpi=200)


def _draw_method(axes: Axes, method: Method) -> None:
    colour = FRONT if method.on_front else BEHIND
    colour = FLOAT if method.name == "float" else colour
    spread = 0.0 if math.isnan(method.deviation) else method.deviation
    sizes = [method.size] * len(method.values)
    axes.scatter(sizes, method.values, s=10, color=colour, alpha=0.35, linewidths=0, zorder=2)
    axes.errorbar(
        method.size,
        method.mean,
        spread,
        fmt="s" if method.name == "float" else "o",
        markersize=6,
        markerfacecolor=colour if method.on_front else "white",
        markeredgecolor=colour,
        ecolor=colour,
        elinewidth=1,
        capsize=2.5,
        zorder=4 if method.on_front else 3,
    )
    # The front rises to the right: above it there is room on the left, below it on the right.
    place = ((-6, 6), "right", "bottom") if method.on_front else ((7, -6), "left", "top")
    offset, horizontal, vertical = place
    axes.annotate(
        method.name.replace("$", r"\$"),
        (method.size, method.mean),
        offset,
        textcoords="offset points",
        ha=horizontal,
        va=vertical,
        fontsize=8,
        color=colour,
    )


def _label_axes(axes: Axes, comparison: Comparison) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(0.16, 0.14)
    axes.xaxis.set_major_formatter(_in_bytes)
    if "accuracy" in comparison.metric and all(0 <= v <= 1 for m in comparison.methods for v in m.values):
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    seeds = {len(m.values) for m in comparison.methods}
    over = f", mean and standard deviation of {max(seeds)} seeds" if max(seeds) > 1 else ""
    axes.set_ylabel(comparison.metric.replace("/", " "), fontsize=9)
    axes.set_xlabel("bytes of all parameters, logarithmic", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#000000", alpha=0.08, linewidth=0.6)
    handles = [
        Line2D([], [], color=FRONT, marker="o", ms=5, linewidth=1, label=f"Pareto front{over}"),
        Line2D([], [], color=BEHIND, marker="o", ms=5, mfc="white", linewidth=0, label="behind it"),
    ]
    behind = any(not m.on_front for m in comparison.methods)
    axes.figure.legend(handles=handles[: 1 + behind], loc="outside upper left", ncols=2, fontsize=8, frameon=False)


def _in_bytes(size: float, _: object) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
