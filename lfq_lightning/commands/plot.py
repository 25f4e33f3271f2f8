"""`python -m lfq_lightning plot RUN_DIR`: a picture of what a run has recorded."""

from __future__ import annotations

import argparse
from pathlib import Path

from lfq_lightning.records.plot import plot_trajectories


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("plot", help="draw the recorded trajectories of a run", description=__doc__)
    parser.add_argument("run_directory", type=Path, help="directory of the run, or its trajectory.csv")
    parser.add_argument("-o", "--output", type=Path, help="picture to write: .png, .svg or .pdf (trajectories.png)")
    parser.set_defaults(run=_plot)


def _plot(given: argparse.Namespace) -> None:
    print(plot_trajectories(given.run_directory, given.output))
