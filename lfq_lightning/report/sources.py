"""Where a report finds its checkpoint and its trajectory: a file of one run, or the run's directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfq_lightning.checking import check_path
from lfq_lightning.records.trajectory import FILE_NAME, trajectory_in


@dataclass(frozen=True)
class FilesOfRun:
    """The files of one run; None where there is none."""

    directory: Path
    checkpoint: Path | None
    trajectory: Path | None


def find_run(source: Path | str) -> FilesOfRun:
    """The run that a checkpoint belongs to, or that a directory holds.

    Args:
        source: a checkpoint, a `trajectory.csv`, or a directory with either in it or below.

    Raises:
        FileNotFoundError: if there is nothing there.
        ValueError: if there are several runs in the directory.
    """
    check_path("source", source)
    source = Path(source)
    if source.is_file():
        if source.name == FILE_NAME:
            return FilesOfRun(source.parent, _newest_checkpoint(source.parent), source)
        # A checkpoint stands beside the trajectory, or in `checkpoints` below it.
        beside = (directory / FILE_NAME for directory in (source.absolute().parent, source.absolute().parent.parent))
        return FilesOfRun(source.absolute().parent, source, next((path for path in beside if path.is_file()), None))
    if not source.is_dir():
        raise FileNotFoundError(
            f"A report is about a checkpoint or a run's directory. Found nothing at `{source}`: check the path."
        )
    found = trajectory_in(source)
    directory = source if found is None else found.parent
    checkpoint = _newest_checkpoint(directory)
    if checkpoint is None and found is None:
        raise FileNotFoundError(f"A run has a checkpoint or a `{FILE_NAME}`. Found neither in `{source}`.")
    return FilesOfRun(directory, checkpoint, found)


def _newest_checkpoint(directory: Path) -> Path | None:
    return max(directory.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)


def recorded_path(checkpoint: Mapping[str, Any]) -> Path | None:
    """The trajectory that a checkpoint of a running fit speaks of, if it is still there."""
    for state in checkpoint.get("callbacks", {}).values():
        recorder = state.get("recorder") if isinstance(state, Mapping) else None
        if isinstance(recorder, Mapping) and recorder.get("path") and Path(recorder["path"]).is_file():
            return Path(recorder["path"])
    return None
