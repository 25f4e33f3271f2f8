"""`python -m lfq_lightning compare MULTIRUN_DIR`: accuracy against bytes of a sweep, as a table and a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from lfq_lightning.records.comparison import compare
from lfq_lightning.records.plot_comparison import plot_comparison


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("compare", help="accuracy against bytes of a sweep", description=__doc__)
    parser.add_argument("directory", type=Path, help="directory of a Hydra --multirun, or any above it")
    parser.add_argument("-o", "--output", type=Path, help="picture to write: .png, .svg or .pdf (pareto.png)")
    parser.add_argument("--metric", default="test/accuracy", help="what to judge by (%(default)s)")
    parser.add_argument("--size", default="parameter_bytes", help="what it costs (%(default)s)")
    parser.add_argument("--lower-is-better", action="store_true", help="for a loss or an error")
    parser.add_argument("--seed", default="seed", help="the override by which repetitions differ (%(default)s)")
    parser.set_defaults(run=_compare)


def _compare(given: argparse.Namespace) -> None:
    comparison = compare(given.directory, given.metric, given.size, given.lower_is_better, given.seed)
    print(comparison)
    print(plot_comparison(comparison, given.output or given.directory / "pareto.png"))
