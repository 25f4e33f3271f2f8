"""Draws recorded trajectories: scales, their movement while learning, saturation and zero points."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfq_lightning.checking import check_path
from lfq_lightning.records.curves import (
    KINDS,
    PALETTE,
    PHASE_COLOURS,
    QUANTITIES,
    Curve,
    layer_and_kind,
    panels_of,
    phases_of,
    shortened,
    trailing_mean,
)
from lfq_lightning.records.trajectory import FILE_NAME, TrajectoryRow, read_trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_trajectories(run_directory: Path | str, path: Path | str | None = None) -> Path:
    """Draw what a run has recorded in its ``trajectory.csv``.

    Weights and activations stand side by side. From top to bottom: the scale on a logarithmic axis, with a
    band from the smallest to the largest channel; the scale relative to its value on entering ``learn``; the
    share of saturated elements with its trailing mean; the zero points that are ever different from zero.
    Quantities that no quantizer has are left out, and so are the phases ``off`` and ``observe``, in which
    scales are not in use.

    Args:
        run_directory: Directory that holds a ``trajectory.csv`` or has one below it, or the path of such a file.
        path: Picture to write; its suffix decides the format (``.png``, ``.svg``, ``.pdf``). ``None`` means
            ``trajectories.png`` beside the trajectory.

    Returns:
        The path of the picture.

    Raises:
        FileNotFoundError: There is no trajectory.
        ValueError: The file is no trajectory, nothing in it can be drawn yet, or there are several runs.
        ImportError: matplotlib is not installed.

    Example:
        >>> plot_trajectories("lightning_logs/version_0")  # doctest: +SKIP
        PosixPath('lightning_logs/version_0/trajectories.png')
    """
    check_path("run_directory", run_directory)
    check_path("path", path, written=True, needed=False)
    source = _trajectory_in(Path(run_directory))
    target = source.with_name("trajectories.png") if path is None else Path(path)
    rows = read_trajectory(source)
    panels = panels_of(rows)
    if not panels:
        raise ValueError(
            f"A picture needs a quantizer in phase estimate, learn or freeze. Found {len(rows)} rows without "
            f"one in `{source}`: let the run reach the phase estimate first."
        )
    figure = _draw(rows, panels)
    check_format(figure, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=160, format=target.suffix[1:] or "png")
    return target


def check_format(figure: Figure, path: Path) -> None:
    """Raise ValueError unless matplotlib writes pictures of the kind that a path's suffix names; none is a PNG."""
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in ("", *known):
        raise ValueError(
            f"`path` must end as a picture does. Found {path.name!r}: use one of {', '.join(f'.{k}' for k in known)}."
        )


def _trajectory_in(source: Path) -> Path:
    if source.suffix == ".csv" or (source / FILE_NAME).is_file():
        return source if source.suffix == ".csv" else source / FILE_NAME
    found = sorted(source.rglob(FILE_NAME))
    if len(found) > 1:
        shown = ", ".join(f"`{path.parent}`" for path in found[:5])
        raise ValueError(f"A picture is of one run. Found {len(found)} in `{source}`: choose one of {shown}.")
    return found[0] if found else source / FILE_NAME


def _draw(rows: list[TrajectoryRow], panels: dict[tuple[str, str], dict[str, Curve]]) -> Figure:
    try:
        # Not pyplot: it would choose a window system and keep the figure alive in global state.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "`plot_trajectories` draws with matplotlib. Found none: "
            'install it with `pip install "lfq_lightning[examples]"`.'
        ) from error
    kinds = [kind for kind in (*KINDS.values(), "others") if any(kind == k for _, k in panels)]
    quantities = [quantity for quantity in QUANTITIES if any(quantity == q for q, _ in panels)]
    figure = Figure(figsize=(4.4 * len(kinds) + 1.6, 1.8 * len(quantities) + 1), layout="constrained")
    grid = figure.subplots(len(quantities), len(kinds), squeeze=False, sharex=True)
    colours = _colours(list(dict.fromkeys(layer_and_kind(row.quantizer)[0] for row in rows)))
    # A dollar sign would start a formula.
    names = {layer: name.replace("$", r"\$") for layer, name in shortened(list(colours)).items()}
    phases = phases_of(rows)
    for line, quantity in zip(grid, quantities, strict=True):
        for axes, kind in zip(line, kinds, strict=True):
            curves = panels.get((quantity, kind), {})
            _draw_curves(axes, quantity, curves, colours)
            _shade_phases(axes, phases)
            if len(colours) > len(PALETTE):  # too many colours to tell apart: the outermost lines are named
                _name_outermost(axes, quantity, curves, colours, names)
    for axes, kind in zip(grid[0], kinds, strict=True):
        axes.set_title(kind, fontsize=11, loc="left", pad=_name_phases(axes, phases), fontweight="bold")
    for axes in grid[-1]:
        axes.set_xlabel("step", fontsize=9)
    figure.align_ylabels()
    _explain_colours(figure, colours, list(names.values()))
    return figure


def _colours(layers: list[str]) -> dict[str, Any]:
    if len(layers) <= len(PALETTE):
        return dict(zip(layers, PALETTE, strict=False))
    from matplotlib import colormaps

    # Up to 0.9 only: the yellow end of the map cannot be seen on white.
    return {layer: colormaps["viridis"](0.9 * i / (len(layers) - 1)) for i, layer in enumerate(layers)}


def _name_outermost(
    axes: Axes, quantity: str, curves: dict[str, Curve], colours: dict[str, Any], names: dict[str, str]
) -> None:
    by_last_value = sorted(curves, key=lambda name: curves[name][-1][1])
    named = [(name, "bottom") for name in by_last_value[-1:]]
    if quantity in ("scale", "movement"):  # of shares and zero points the lowest are all near 0
        named += [(name, "top") for name in by_last_value[:-1][:1]]
    for name, side in named:
        layer, value = layer_and_kind(name)[0], curves[name][-1][1]
        offset = (-2, -2 if side == "top" else 2)
        place: dict[str, Any] = {"xytext": offset, "textcoords": "offset points", "ha": "right", "va": side}
        axes.annotate(names[layer], (curves[name][-1][0], value), color=colours[layer], fontsize=7, **place)


def _draw_curves(axes: Axes, quantity: str, curves: dict[str, Curve], colours: dict[str, Any]) -> None:
    axes.set_ylabel(QUANTITIES[quantity], fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if not curves:
        note = "all zero points are 0" if quantity == "zero_point" else "not recorded"
        axes.annotate(note, (0.5, 0.5), xycoords="axes fraction", ha="center", fontsize=9, color="#666666")
        axes.set_yticks([])
        return
    axes.margins(y=0.12)
    axes.grid(axis="y", color="#000000", alpha=0.08, linewidth=0.6)
    for name, curve in curves.items():
        colour = colours[layer_and_kind(name)[0]]
        steps, middle, low, high = zip(*curve, strict=True)
        if quantity == "saturation":
            # One batch says little about the share: the eye needs its mean, and the noise only faintly.
            axes.plot(steps, middle, color=colour, linewidth=0.6, alpha=min(0.25, 1 / len(curves)))
            middle = trailing_mean(middle)
        # A line through one point would be invisible.
        marker = "." if len(steps) == 1 else ""
        axes.plot(
            steps,
            middle,
            color=colour,
            linewidth=1.2 if len(curves) <= 20 else 0.9,
            marker=marker,
            gid=f"{name}.{quantity}",
        )
        if low != high:
            axes.fill_between(steps, low, high, color=colour, alpha=min(0.18, 2.5 / len(curves)), linewidth=0)
    _scale_axis(axes, quantity, [value for curve in curves.values() for _, value, _, _ in curve])


def _scale_axis(axes: Axes, quantity: str, values: list[float]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    if quantity == "saturation":
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
        axes.set_ylim(bottom=0)
    elif quantity == "movement":
        axes.axhline(1, color="#000000", linewidth=0.6, linestyle=":")
    positive = [value for value in values if value > 0] or [1.0]
    spread = max(positive) / min(positive)
    if quantity == "scale" or (quantity == "movement" and spread >= 4):
        axes.set_yscale("log", nonpositive="mask")
        # Between 1, 2, 5 and 10 a narrow range may hold no tick at all.
        subs = (1, 2, 5) if spread < 100 else (1,)
        few = MaxNLocator(5, steps=[1, 2, 5, 10])
        axes.yaxis.set_major_locator(few if spread < 4 else LogLocator(subs=subs))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")


def _shade_phases(axes: Axes, phases: list[tuple[str, int, int]]) -> None:
    axes.set_xlim(phases[0][1], phases[-1][2])
    for phase, start, end in phases:
        axes.axvspan(start, end, color=PHASE_COLOURS.get(phase, "#ffffff"), linewidth=0, zorder=0)


def _name_phases(axes: Axes, phases: list[tuple[str, int, int]]) -> float:
    """Write the names above the axes, and return the height that they take, in points."""
    first, last = phases[0][1], phases[-1][2]
    # Shares of the width: a letter takes about a fiftieth, a slanted line of text a sixteenth.
    narrow = any((end - start) / (last - first) < 0.02 * len(phase) for phase, start, end in phases)
    slant: dict[str, Any] = {"rotation": 35, "ha": "left"} if narrow else {"ha": "center"}
    middle = -1.0
    for phase, start, end in phases:
        middle = max(middle + 0.06, ((start + end) / 2 - first) / (last - first))
        axes.annotate(phase, (middle, 1.02), xycoords="axes fraction", fontsize=8, **slant)
    return 28 if narrow else 16


def _explain_colours(figure: Figure, colours: dict[str, Any], layers: list[str]) -> None:
    from matplotlib import cm, colors, lines

    if len(layers) <= len(PALETTE):
        handles = [lines.Line2D([], [], color=colour) for colour in colours.values()]
        figure.legend(handles, layers, loc="outside right upper", fontsize=8, frameon=False, title="layer")
        return
    shades = colors.ListedColormap(list(colours.values()))
    mappable = cm.ScalarMappable(colors.Normalize(-0.5, len(layers) - 0.5), shades)
    bar = figure.colorbar(mappable, ax=figure.axes, aspect=50, pad=0.02)
    ticks = [round(i * (len(layers) - 1) / 9) for i in range(10)]
    bar.set_ticks(ticks, labels=[layers[i] for i in ticks], fontsize=8)
    bar.ax.invert_yaxis()
    bar.ax.set_title("layer", fontsize=9)
