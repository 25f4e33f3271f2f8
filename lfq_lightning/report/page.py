"""One HTML page of facts, tables and figures that needs nothing else: no network and no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from plotly.offline import get_plotlyjs

from lfq_lightning.tables import Table


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it; `name` is the element's id."""

    name: str
    heading: str
    text: str = ""
    figure: go.Figure | None = None
    table: Table | None = None


def render(title: str, source: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The page as HTML; names and texts are escaped.

    Args:
        title: heading of the page.
        source: what the page is about.
        facts: names and values at the top.
        sections: in order.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("page.html").read_text())
    shown = [
        {
            "name": section.name,
            "heading": section.heading,
            "text": section.text,
            "table": section.table,
            "figure": None if section.figure is None else _as_html(section.figure, section.name),
        }
        for section in sections
    ]
    return template.render(title=title, source=source, facts=facts, sections=shown, plotly=get_plotlyjs())


def _as_html(figure: go.Figure, name: str) -> str:
    # One of plotly's buttons would send the figure's data to its maker's server.
    buttons = ["sendChartToCloud", "select2d", "lasso2d"]
    config = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": buttons, "plotlyServerURL": ""}
    html: str = figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"{name}-figure", config=config)
    return html
