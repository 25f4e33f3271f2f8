"""The files that a run leaves: trajectory.csv and qparams.npz, in its directory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lfq_lightning.records import history, trajectory
from lfq_lightning.records.history import History
from lfq_lightning.records.place import Place, fetch
from lfq_lightning.records.trajectory import Trajectory, TrajectoryRow


class RunFiles:
    """Writes one run's records; in a distributed run, make one on rank zero.

    Args:
        directory: where they lie, a path or URL.
        before: the trajectory of the run that is resumed, or None.
        step: step of the checkpoint that is resumed.

    Attributes:
        path: the local trajectory.csv.
        name: the trajectory's path or URL, by which a resumed run finds it.
    """

    def __init__(self, directory: str, before: str | None, step: int) -> None:
        self._place = Place(directory, (trajectory.FILE_NAME, history.FILE_NAME))
        self._trajectory: Trajectory | None = None
        self._history: History | None = None
        self.path = self._place.local / trajectory.FILE_NAME
        self.name = self._place.name_of(trajectory.FILE_NAME)
        if self._place.owned:
            with tempfile.TemporaryDirectory() as aside:
                rows, vectors = self._before(before, Path(aside))
                self._trajectory = Trajectory(self._place.local, rows, step)
                self._history = History(self._place.local, vectors, step)

    def _before(self, name: str | None, aside: Path) -> tuple[Path | None, Path | None]:
        """The local files of the run that is resumed."""
        if name is None:
            return None, None
        if name == self.name:
            return self.path, self.path.with_name(history.FILE_NAME)
        directory, _, _ = name.rpartition(trajectory.FILE_NAME)
        return fetch(name, aside), fetch(directory + history.FILE_NAME, aside)

    @property
    def written(self) -> bool:
        """Whether there is anything that can be written to."""
        return self._trajectory is not None and self._trajectory.recording

    def append(self, rows: list[TrajectoryRow]) -> None:
        """Write rows of the trajectory."""
        if self._trajectory is not None:
            self._trajectory.append(rows)

    def keep(self, step: int, epoch: int, phase: str, vectors: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Write an epoch's scales and zero points, and copy everything to where it belongs."""
        if self._history is not None and self.written:  # where one file cannot be written, one warning is enough
            self._history.append(step, epoch, phase, vectors)
            self._place.publish()

    def close(self) -> None:
        """Write no more."""
        self._place.close()
