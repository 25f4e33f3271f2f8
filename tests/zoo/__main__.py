"""`python -m tests.zoo [NAME ...]`: examine each network, and print the table of what holds."""

from __future__ import annotations

import logging
import sys
import time

import torch

from tests.zoo.examine import PASSES, Result, examine
from tests.zoo.listing import CASES

COLUMNS = ("fit", "resume", "load", "compile", "frozen", "pt2", "ONNX", "detach")


def row(result: Result) -> str:
    """A row of the table in Markdown."""
    cells = [result.checks.get(name, "") for name in COLUMNS]
    shown = ["" if cell == PASSES else cell.replace("|", "/") for cell in cells]
    return f"| {' | '.join([result.name, f'{result.share:.1%}', *shown])} |"


def main() -> None:
    """Print the table; an empty cell holds."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    print(f"| {' | '.join(['network', 'quantized', *COLUMNS])} |")
    print(f"|{' --- |' * (len(COLUMNS) + 2)}")
    for case in CASES:
        if not wanted or any(name in case.name for name in wanted):
            began = time.perf_counter()
            result = examine(case)
            print(row(result), flush=True)
            print(
                f"{case.name}: {time.perf_counter() - began:.0f} s",
                *result.left,
                sep="\n  ",
                file=sys.stderr,
                flush=True,
            )


if __name__ == "__main__":
    main()
