"""Draws recorded trajectories: scales, their movement while learning, saturation and zero points."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lfq_lightning.checking import check_path
from lfq_lightning.records.curves import PHASE_COLOURS, Panel, Sheet, layer_and_kind, sheet_of, trailing_mean
from lfq_lightning.records.trajectory import FILE_NAME, read_trajectory, trajectory_in

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
    source = Path(run_directory)
    if source.suffix != ".csv":
        source = trajectory_in(source) or source / FILE_NAME
    target = source.with_name("trajectories.png") if path is None else Path(path)
    rows = read_trajectory(source)
    sheet = sheet_of(rows)
    if sheet is None:
        raise ValueError(
            f"A picture needs a quantizer in phase estimate, learn or freeze. Found {len(rows)} rows without "
            f"one in `{source}`: let the run reach the phase estimate first."
        )
    return save(_draw(sheet), target, dpi=160)


def new_figure(caller: str, width: float, height: float) -> Figure:
    """An empty figure, in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        # Not pyplot: it would choose a window system and keep the figure alive in global state.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f'`{caller}` draws with matplotlib. Found none: install it with `pip install "lfq_lightning[examples]"`.'
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path, dpi: int) -> Path:
    """Write a picture of the kind that the path's suffix names; without one a PNG.

    Raises:
        ValueError: matplotlib knows no such kind.
    """
    known = figure.canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in ("", *known):
        raise ValueError(
            f"`path` must end as a picture does. Found {path.name!r}: use one of {', '.join(f'.{k}' for k in known)}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, format=path.suffix[1:] or "png")
    return path


def _draw(sheet: Sheet) -> Figure:
    figure = new_figure("plot_trajectories", 4.4 * len(sheet.kinds) + 1.6, 1.8 * len(sheet.panels) + 1)
    from matplotlib import colormaps

    grid = figure.subplots(len(sheet.panels), len(sheet.kinds), squeeze=False, sharex=True)
    colours = sheet.colours(colormaps["viridis"])
    # A dollar sign would start a formula.
    names = {layer: name.replace("$", r"\$") for layer, name in sheet.layers.items()}
    for line, panels in zip(grid, sheet.panels, strict=True):
        for axes, panel in zip(line, panels, strict=True):
            _draw_panel(axes, panel, colours)
            _shade_phases(axes, sheet)
            if not sheet.are_told_apart:  # the outermost lines are named
                _name_outermost(axes, panel, colours, names)
    for axes, kind in zip(grid[0], sheet.kinds, strict=True):
        axes.set_title(kind, fontsize=11, loc="left", pad=_name_phases(axes, sheet), fontweight="bold")
    for axes in grid[-1]:
        axes.set_xlabel("step", fontsize=9)
    figure.align_ylabels()
    _explain_colours(figure, sheet, colours, list(names.values()))
    return figure


def _name_outermost(axes: Axes, panel: Panel, colours: dict[str, Any], names: dict[str, str]) -> None:
    by_last_value = sorted(panel.curves, key=lambda name: panel.curves[name][-1][1])
    named = [(name, "bottom") for name in by_last_value[-1:]]
    if panel.quantity in ("scale", "movement"):  # of shares and zero points the lowest are all near 0
        named += [(name, "top") for name in by_last_value[:-1][:1]]
    for name, side in named:
        layer, (step, value, _, _) = layer_and_kind(name)[0], panel.curves[name][-1]
        offset = (-2, -2 if side == "top" else 2)
        place: dict[str, Any] = {"xytext": offset, "textcoords": "offset points", "ha": "right", "va": side}
        axes.annotate(names[layer], (step, value), color=colours[layer], fontsize=7, **place)


def _draw_panel(axes: Axes, panel: Panel, colours: dict[str, Any]) -> None:
    axes.set_ylabel(panel.shows.label, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if not panel.curves:
        axes.annotate(panel.shows.note, (0.5, 0.5), xycoords="axes fraction", ha="center", fontsize=9, color="#666666")
        axes.set_yticks([])
        return
    axes.margins(y=0.12)
    axes.grid(axis="y", color="#000000", alpha=0.08, linewidth=0.6)
    count = len(panel.curves)
    for name, curve in panel.curves.items():
        colour = colours[layer_and_kind(name)[0]]
        steps, middle, low, high = zip(*curve, strict=True)
        if panel.shows.is_share:
            # One batch says little about the share: the eye needs its mean, and the noise only faintly.
            axes.plot(steps, middle, color=colour, linewidth=0.6, alpha=min(0.25, 1 / count))
            middle = trailing_mean(middle)
        look = {"color": colour, "linewidth": 1.2 if count <= 20 else 0.9, "gid": f"{name}.{panel.quantity}"}
        # A line through one point would be invisible.
        axes.plot(steps, middle, marker="." if len(steps) == 1 else "", **look)
        if low != high:
            axes.fill_between(steps, low, high, color=colour, alpha=min(0.18, 2.5 / count), linewidth=0)
    _scale_axis(axes, panel)


def _scale_axis(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    if panel.shows.is_share:
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
        axes.set_ylim(bottom=0)
    if panel.shows.reference is not None:
        axes.axhline(panel.shows.reference, color="#000000", linewidth=0.6, linestyle=":")
    if panel.is_logarithmic:
        axes.set_yscale("log", nonpositive="mask")
        # Between 1, 2, 5 and 10 a narrow range may hold no tick at all.
        subs = (1, 2, 5) if panel.spread < 100 else (1,)
        few = MaxNLocator(5, steps=[1, 2, 5, 10])
        axes.yaxis.set_major_locator(few if panel.spread < 4 else LogLocator(subs=subs))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")


def _shade_phases(axes: Axes, sheet: Sheet) -> None:
    axes.set_xlim(*sheet.limits)
    for phase, start, end in sheet.phases:
        axes.axvspan(start, end, color=PHASE_COLOURS.get(phase, "#ffffff"), linewidth=0, zorder=0)


def _name_phases(axes: Axes, sheet: Sheet) -> float:
    """Write the names above the axes, and return the height that they take, in points."""
    phases, (first, last) = sheet.phases, sheet.limits
    # Shares of the width: a letter takes about a fiftieth, a slanted line of text a sixteenth.
    narrow = any((end - start) / (last - first) < 0.02 * len(phase) for phase, start, end in phases)
    slant: dict[str, Any] = {"rotation": 35, "ha": "left"} if narrow else {"ha": "center"}
    middle = -1.0
    for phase, start, end in phases:
        middle = max(middle + 0.06, ((start + end) / 2 - first) / (last - first))
        axes.annotate(phase, (middle, 1.02), xycoords="axes fraction", fontsize=8, **slant)
    return 28 if narrow else 16


def _explain_colours(figure: Figure, sheet: Sheet, colours: dict[str, Any], layers: list[str]) -> None:
    from matplotlib import cm, colors, lines

    if sheet.are_told_apart:
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
