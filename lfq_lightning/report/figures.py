"""The interactive figures of a report, by plotly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from lfq_lightning.analysis.sensitivity import Sensitivity
from lfq_lightning.records.curves import PALETTE, PHASE_COLOURS, Panel, Sheet, layer_and_kind, sheet_of, shortened
from lfq_lightning.records.summary import Summary
from lfq_lightning.records.trajectory import TrajectoryRow
from lfq_lightning.report.findings import WeightFindings

_BLUE, _RED, _GREY = PALETTE[0], PALETTE[1], "#b8b8c4"


def trajectories(rows: list[TrajectoryRow]) -> go.Figure | None:
    """Every recorded quantity of weights and activations over steps; None without a quantized phase.

    A click on a layer in the legend hides it, a double click shows it alone.
    """
    sheet = sheet_of(rows)
    if sheet is None:
        return None
    shape = {"rows": len(sheet.panels), "cols": len(sheet.kinds)}
    figure = make_subplots(**shape, shared_xaxes=True, column_titles=sheet.kinds, vertical_spacing=0.03)
    colours = sheet.colours(lambda point: sample_colorscale("Viridis", [point])[0])
    explained: set[str] = set()
    for row, panels in enumerate(sheet.panels, start=1):
        for column, panel in enumerate(panels, start=1):
            _draw_panel(figure, {"row": row, "col": column}, panel, sheet, colours, explained)
        figure.update_yaxes(title_text=panels[0].shows.label.replace("\n", "<br>"), row=row, col=1)
    for phase, start, end in sheet.phases:
        if phase in PHASE_COLOURS:
            figure.add_vrect(start, end, fillcolor=PHASE_COLOURS[phase], opacity=1, layer="below", line_width=0)
    figure.update_xaxes(title_text="step", row=len(sheet.panels))
    figure.update_xaxes(range=sheet.limits)
    return _styled(figure, 230 * len(sheet.panels) + 90)


def _draw_panel(
    figure: go.Figure,
    place: dict[str, int],
    panel: Panel,
    sheet: Sheet,
    colours: dict[str, str],
    explained: set[str],
) -> None:
    for quantizer, curve in panel.curves.items():
        layer = layer_and_kind(quantizer)[0]
        steps, middle, low, high = zip(*curve, strict=True)
        if low != high and sheet.are_told_apart:
            figure.add_trace(_band(steps, low, high, layer, colours[layer]), **place)
        figure.add_trace(
            go.Scatter(
                x=steps,
                y=middle,
                name=sheet.layers[layer],
                showlegend=layer not in explained,
                customdata=list(zip(low, high, strict=True)),
                hovertemplate=_hover(sheet.layers[layer], panel, low != high),
                mode="lines" if len(steps) > 1 else "markers",
                legendgroup=layer,
                line={"color": colours[layer], "width": 1.5},
            ),
            **place,
        )
        explained.add(layer)
    if not panel.curves and panel.quantity == "zero_point":
        look = {"mode": "lines", "line": {"color": _GREY, "dash": "dot"}}
        look["hovertemplate"] = f"{panel.shows.note}<extra></extra>"
        figure.add_trace(go.Scatter(x=sheet.limits, y=[0, 0], showlegend=False, **look), **place)
    figure.update_yaxes(tickformat=".2~%" if panel.shows.is_share else "~g", **place)
    if panel.is_logarithmic and panel.curves:
        figure.update_yaxes(type="log", dtick="D2", **place)  # 1, 2 and 5
    if panel.shows.reference is not None:
        figure.add_hline(panel.shows.reference, line={"color": "#000000", "width": 0.6, "dash": "dot"}, **place)


def _band(steps: Sequence[int], low: Sequence[float], high: Sequence[float], layer: str, colour: str) -> go.Scatter:
    return go.Scatter(
        x=[*steps, *reversed(steps)],
        y=[*high, *reversed(low)],
        fill="toself",
        fillcolor=colour,
        opacity=0.15,
        line_width=0,
        mode="lines",
        hoverinfo="skip",
        legendgroup=layer,
        showlegend=False,
    )


def _hover(name: str, panel: Panel, band: bool) -> str:
    form = ".3%" if panel.shows.is_share else ".5g"
    channels = f"<br>channels %{{customdata[0]:{form}}} to %{{customdata[1]:{form}}}" if band else ""
    return f"{name}<br>step %{{x}}: %{{y:{form}}}{channels}<extra></extra>"


def sizes(weights: Sequence[WeightFindings]) -> go.Figure:
    """Bytes of each layer's weight, in float32 and packed."""
    names = list(shortened([w.layer for w in weights]).values())
    label = [f"{w.bits} bit, {w.float_bytes / w.packed_bytes:.1f}x smaller" for w in weights]
    figure = go.Figure(
        [
            go.Bar(x=[w.float_bytes for w in weights], y=names, name="float32", marker_color=_GREY, orientation="h"),
            go.Bar(
                x=[w.packed_bytes for w in weights],
                y=names,
                name="quantized",
                marker_color=_BLUE,
                orientation="h",
                customdata=label,
                hovertemplate="%{y}<br>%{x:,} bytes<br>%{customdata}<extra></extra>",
            ),
        ]
    )
    figure.update_layout(xaxis_title="bytes", barmode="group")
    return _listed(figure, len(weights), 26)


def noise(summary: Summary) -> go.Figure | None:
    """Signal-to-quantization-noise ratio of each quantizer; None where nothing was measured."""
    measured = [row for row in summary.rows if math.isfinite(row.sqnr)]
    names = shortened(list(dict.fromkeys(layer_and_kind(row.quantizer)[0] for row in measured)))
    figure = go.Figure()
    for kind, colour in (("weights", _BLUE), ("activations", _RED), ("others", _GREY)):
        chosen = [row for row in measured if layer_and_kind(row.quantizer)[1] == kind]
        if chosen:
            figure.add_bar(
                x=[row.sqnr for row in chosen],
                y=[names[layer_and_kind(row.quantizer)[0]] for row in chosen],
                name=kind,
                marker_color=colour,
                orientation="h",
                customdata=[row.bits for row in chosen],
                hovertemplate="%{y}<br>%{x:.1f} dB at %{customdata} bit<extra></extra>",
            )
    figure.update_layout(xaxis_title="SQNR (dB)", barmode="group")
    return _listed(figure, len(names), 26) if measured else None


def drops(sensitivity: Sensitivity, metric: str) -> go.Figure:
    """What the metric loses with each layer alone quantized."""
    layers = [row.layers[0] for row in sensitivity.rows]
    figure = go.Figure(
        go.Bar(
            x=[row.drop for row in sensitivity.rows],
            y=list(shortened(layers).values()),
            marker_color=_RED,
            orientation="h",
            customdata=[row.metric for row in sensitivity.rows],
            hovertemplate="%{y}<br>worse by %{x:.4g}: %{customdata:.6g}<extra></extra>",
        )
    )
    figure.update_layout(xaxis_title=f"by how much {metric} is worse than {sensitivity.float_metric:.5g} in float")
    return _listed(figure, len(layers), 18)


def histograms(weights: Sequence[WeightFindings]) -> go.Figure:
    """Each layer's weights before and after quantization, and how often each code is used; a menu chooses the layer."""
    figure = make_subplots(1, 2, column_widths=[0.62, 0.38], subplot_titles=("weights", "integer codes"))
    names = list(shortened([w.layer for w in weights]).values())
    first = max(range(len(weights)), key=lambda i: weights[i].float_bytes)
    for i, found in enumerate(weights):
        shown: dict[str, Any] = {"visible": i == first, "legendgroup": "weights"}
        width = found.centres[1] - found.centres[0]
        before = {"marker_color": _GREY, "width": width, "name": "before"}
        after = {"marker_color": _RED, "width": width / 2, "name": "after"}
        figure.add_trace(go.Bar(x=found.centres, y=found.before, **before, **shown), 1, 1)
        figure.add_trace(go.Bar(x=found.centres, y=found.after, **after, **shown), 1, 1)
        code = {"marker_color": _RED, "name": "codes", "showlegend": False}
        figure.add_trace(go.Bar(x=found.codes, y=found.used, **code, **shown), 1, 2)
    buttons = [
        {
            "label": f"{name} ({found.bits} bit)",
            "method": "update",
            "args": [{"visible": [j // 3 == i for j in range(3 * len(weights))]}],
        }
        for i, (name, found) in enumerate(zip(names, weights, strict=True))
    ]
    menu = {"buttons": buttons, "active": first, "x": 0, "xanchor": "left", "y": 1.28, "yanchor": "top"}
    figure.update_layout(updatemenus=[menu], bargap=0.1, barmode="overlay")
    figure.update_xaxes(title_text="weight", col=1)
    figure.update_xaxes(title_text="code", col=2)
    figure.update_yaxes(title_text="number of weights", col=1)
    return _styled(figure, 420, top=110)


def _listed(figure: go.Figure, count: int, height: int) -> go.Figure:
    """Bars from top to bottom in the order of the layers, each with its name."""
    figure.update_yaxes(autorange="reversed", automargin=True, dtick=1)
    return _styled(figure, height * max(count, 3) + 110)


def _styled(figure: go.Figure, height: int, top: int = 40) -> go.Figure:
    margin = {"l": 70, "r": 20, "t": top, "b": 50}
    figure.update_layout(template="plotly_white", height=height, margin=margin, font={"size": 12}, hovermode="closest")
    return figure
