"""Plain tables for the terminal, in colour where rich is installed and someone is looking."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], to_the_right: Sequence[bool]) -> str:
    """Columns as wide as their widest cell, the header underlined."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, to_the_right, strict=True)
        ).rstrip()
        for row in table
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def show(header: Sequence[str], rows: Sequence[Sequence[str]], to_the_right: Sequence[bool], last_line: str) -> None:
    """Print a table: by rich in a terminal, where it is installed, and else as plain text, which no width cuts."""
    if not sys.stdout.isatty() or find_spec("rich") is None:
        print(f"{aligned(header, rows, to_the_right)}\n{last_line}")
        return
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, caption=escape(last_line), caption_justify="left")
    for name, right in zip(header, to_the_right, strict=True):
        table.add_column(escape(name), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)
