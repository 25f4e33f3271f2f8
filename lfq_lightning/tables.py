"""Tables: plain text, never wider than the terminal, in colour where rich is installed and someone is looking."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

_GAP = "  "
# What a column of text keeps: the first, which holds names, gives way before the others do.
_SHORTEST_NAME, _SHORTEST_TEXT = 20, 8


@dataclass(frozen=True)
class Table:
    """Rows under titles, with notes below; prints as plain text.

    Args:
        columns: titles, "<" for text and ">" for what is aligned to the right, as numbers are.
        rows: their cells.
        notes: lines of text.
    """

    columns: Mapping[str, str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    @property
    def to_the_right(self) -> list[bool]:
        """Which columns are aligned to the right."""
        return [side == ">" for side in self.columns.values()]

    def __str__(self) -> str:
        return aligned([*self.columns], self.rows, self.to_the_right, self.notes, terminal_width())

    def show(self) -> None:
        """Print it: by rich in a terminal, where it is installed, and else as plain text."""
        width = terminal_width()
        if width is None or find_spec("rich") is None:
            print(self)
        else:
            _show(self, width)


def terminal_width() -> int | None:
    """The columns of the terminal that is printed to; None where there is none, as in a file or a notebook."""
    on_screen = sys.stdout is not None and sys.stdout.isatty()  # None without a console, as in `pythonw`
    return shutil.get_terminal_size().columns if on_screen else None


def aligned(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    to_the_right: Sequence[bool],
    notes: Iterable[str] = (),
    width: int | None = None,
) -> str:
    """Columns as wide as their widest cell, the header underlined, and notes below.

    Args:
        header: a title for each column.
        rows: their cells.
        to_the_right: which columns are aligned to the right, as numbers are. These are never shortened.
        notes: lines of text, wrapped between words.
        width: what no line exceeds: names lose their middle then, and titles stand in two lines. None for no limit.
    """
    header, rows = _fitted(header, rows, to_the_right, width)
    titles = [title.split("\n") for title in header]
    height = max(map(len, titles))
    top = [[([""] * (height - len(title)) + title)[line] for title in titles] for line in range(height)]
    widths = _widths(header, rows)
    lines = [
        _GAP.join(
            cell.rjust(wide) if right else cell.ljust(wide)
            for cell, wide, right in zip(row, widths, to_the_right, strict=True)
        ).rstrip()
        for row in [*top, *rows]
    ]
    rule = "-" * (sum(widths) + len(_GAP) * (len(widths) - 1))
    return "\n".join([*lines[:height], rule, *lines[height:], *(_wrapped(note, width) for note in notes)])


def _show(table: Table, width: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Drawn

    header, rows = _fitted([*table.columns], table.rows, table.to_the_right, width)
    drawn = Drawn(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name, right in zip(header, table.to_the_right, strict=True):
        drawn.add_column(escape(name), justify="right" if right else "left", no_wrap=True, vertical="bottom")
    for row in rows:
        drawn.add_row(*map(escape, row))
    console = Console(width=width)
    console.print(drawn)
    for note in table.notes:
        console.print(escape(note), style="italic", highlight=False)


def shortened(names: Sequence[str], width: int) -> list[str]:
    """Names in at most so many characters, each long one without its middle, cut where they stay distinct.

    Where no cut keeps them apart, dotted names lose more: their parts become initials from the left, as far as needed.
    """
    if all(len(name) <= width for name in names):
        return list(names)
    names = [name.removesuffix("_quantizer") for name in names]  # in a column of quantizers, the least telling part
    cut = _cut(names, width)
    return cut if len(set(cut)) == len(set(names)) else _cut([_initials(name, width) for name in names], width)


def _cut(names: Sequence[str], width: int) -> list[str]:
    kept = width - 1

    def without_middle(name: str, head: int) -> str:
        return name if len(name) <= width else f"{name[:head]}…{name[len(name) - kept + head :]}"

    def quality(head: int) -> tuple[int, int]:
        return len({without_middle(name, head) for name in names}), -abs(2 * head - kept)

    head = max(range(1, kept), key=quality, default=0)
    return [without_middle(name, head) for name in names]


def _initials(name: str, width: int) -> str:
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if sum(map(len, parts)) + len(parts) - 1 <= width:
            break
        parts[index] = part if part.isdecimal() else part[:1]
    return ".".join(parts)


def _fitted(
    header: Sequence[str], rows: Iterable[Sequence[str]], to_the_right: Sequence[bool], width: int | None
) -> tuple[list[str], list[list[str]]]:
    """Header and rows that fit the width, if columns of text can give way so far."""
    titles, cells = list(header), [list(row) for row in rows]
    room = None if width is None else width - len(_GAP) * (len(titles) - 1)
    if room is None or sum(_widths(titles, cells)) <= room:
        return titles, cells
    titles = [title.replace(" ", "\n") for title in titles]
    widths = _widths(titles, cells)
    texts = [index for index, right in enumerate(to_the_right) if not right]
    for shrinking, shortest in ((texts[:1], _SHORTEST_NAME), (texts, _SHORTEST_TEXT)):
        while sum(widths) > room:
            widest = max(shrinking, key=lambda index: widths[index], default=None)
            if widest is None or widths[widest] <= shortest:
                break
            widths[widest] -= 1
    for index in texts:
        column = shortened([row[index] for row in cells], widths[index])
        for row, cell in zip(cells, column, strict=True):
            row[index] = cell
    return titles, cells


def _widths(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    titles = [max(map(len, title.split("\n"))) for title in header]
    return [max([title, *(len(row[index]) for row in rows)]) for index, title in enumerate(titles)]


def _wrapped(note: str, width: int | None) -> str:
    if width is None or len(note) <= width:
        return note
    return textwrap.fill(note, width, subsequent_indent=_GAP, break_long_words=False, break_on_hyphens=False)
