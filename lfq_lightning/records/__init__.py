"""What quantizers looked like: tables, trajectories and pictures."""

from lfq_lightning.records.comparison import Comparison, compare
from lfq_lightning.records.history import read_qparams
from lfq_lightning.records.plot import plot_trajectories
from lfq_lightning.records.plot_comparison import plot_comparison
from lfq_lightning.records.summary import Summary, SummaryRow, summarize
from lfq_lightning.records.trajectory import TrajectoryRow, read_trajectory

__all__ = [
    "Comparison",
    "Summary",
    "SummaryRow",
    "TrajectoryRow",
    "compare",
    "plot_comparison",
    "plot_trajectories",
    "read_qparams",
    "read_trajectory",
    "summarize",
]
