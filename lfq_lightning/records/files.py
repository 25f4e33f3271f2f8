"""The files of a run's record: both are written, repaired after a crash, and resumed in one way."""

from __future__ import annotations

import os
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from lfq_lightning.records import history, trajectory
from lfq_lightning.records.history import Array, Epoch
from lfq_lightning.records.place import Place, fetch
from lfq_lightning.records.trajectory import TrajectoryRow


class RecordFile(ABC):
    """A file that a run adds to, which never stops a training because it cannot be written.

    A crash tears nothing but the end of what is appended to, and nothing at all of what is replaced. A file that is
    already there and is not continued belongs to another run: it is kept aside as ``<name>.bak``, and the one that was
    kept so before is gone. If writing fails, one warning names the path and the error, and recording stays off from
    then on. In a distributed run, make one on rank zero.

    Args:
        directory: Where the file lies; created when there is something to write.
        continue_from: File of the run that is being resumed, in this directory or another. What it holds up to ``step``
            is carried over; what came later, or was torn by a crash, is not. If it cannot be read, a warning says why
            and recording starts afresh.
        step: Step of the checkpoint that is being resumed.
    """

    name: ClassVar[str]
    subject: ClassVar[str]  # as warnings speak of it

    def __init__(self, directory: Path | str, continue_from: Path | str | None = None, step: int = 0) -> None:
        # Absolute, because a training script may change its working directory after this.
        self.path = Path(directory).absolute() / self.name
        self.recording = True
        with self._stopping_no_training():
            if continue_from is None:
                self._keep_aside()
            else:
                self._continue(Path(continue_from).absolute(), step)

    @abstractmethod
    def _carried_over(self, source: Path, step: int) -> tuple[int, bytes]:
        """How many entries a file has up to a step, and the whole file of these; empty where it would not be there.

        Raises:
            OSError, ValueError: if it cannot be read.
        """

    def _continue(self, source: Path, step: int) -> None:
        try:
            entries, content = self._carried_over(source, step)
        except (OSError, ValueError) as error:
            self._start_afresh(f"from `{source}` ({error})")
            return
        if not content:
            self._keep_aside()
            return
        self._replace(content, aside=source.resolve() != self.path.resolve() or not entries)

    def _replace(self, content: bytes, aside: bool = False) -> None:
        """Write the whole file beside the one that is there, which may be kept, and rename it into place."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.name + ".tmp")
        try:
            temporary.write_bytes(content)
            if aside:
                self._keep_aside()
            os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def _append(self, header: bytes, content: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            # The file's length decides, not a memory of it: it may have been deleted since the last row. One write, so
            # that a crash tears the end of the file and nothing else.
            file.write((b"" if file.tell() else header) + content)

    def _start_afresh(self, why: str) -> None:
        aside = self._keep_aside()
        kept = f", and the file that was there is kept as `{aside}`" if aside else ""
        warnings.warn(
            f"{self.subject} of the resumed run cannot be continued {why}. Recording starts afresh in "
            f"`{self.path}`{kept}.",
            stacklevel=5,
        )

    def _keep_aside(self) -> Path | None:
        if not self.path.is_file():
            return None
        aside = self.path.with_name(self.name + ".bak")
        os.replace(self.path, aside)
        return aside

    @contextmanager
    def _stopping_no_training(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, training goes on
            self.recording = False
            warnings.warn(
                f"{self.subject} cannot be written to `{self.path}` ({error}). Training goes on, and nothing more is "
                "recorded there: free the disk or choose a writable directory before the next run.",
                stacklevel=4,
            )


class Trajectory(RecordFile):
    """Appends rows to ``<directory>/trajectory.csv``; see `RecordFile`.

    Example:
        >>> import tempfile
        >>> from lfq_lightning.records.trajectory import read_trajectory
        >>> file = Trajectory(tempfile.mkdtemp())
        >>> row = TrajectoryRow(1, 0, "learn", "fc.weight_quantizer", 0.1, 0.1, 0.1, 0, 0, 0, 0.01, 0.5)
        >>> file.append([row])
        >>> read_trajectory(file.path) == [row]
        True
    """

    name, subject = trajectory.FILE_NAME, "The trajectory"

    def append(self, rows: Iterable[TrajectoryRow]) -> None:
        """Write these rows to the file, or, where that fails, warn once and record nothing more.

        Args:
            rows: Usually one per quantizer, all of the same step. None at all leaves the file untouched.
        """
        rows = list(rows)
        if not self.recording or not rows:
            return
        with self._stopping_no_training():
            lines = trajectory.as_csv(map(trajectory.as_fields, rows))
            self._append(trajectory.as_csv([trajectory.COLUMNS]), lines)

    def _carried_over(self, source: Path, step: int) -> tuple[int, bytes]:
        rows = trajectory.rows_up_to(source, step)
        return len(rows), trajectory.as_csv([trajectory.COLUMNS, *rows])


class History(RecordFile):
    """Adds an epoch at a time to ``<directory>/qparams.npz``; see `RecordFile`.

    A ZIP archive cannot be appended to without a moment in which a crash loses all of it, so each epoch writes the file
    anew. That stays cheap because the file is bounded: beyond 64 MiB, every second one of the earlier epochs is let go.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from lfq_lightning.records.history import read_qparams
        >>> file = History(tempfile.mkdtemp())
        >>> file.append(100, 0, "learn", {"fc.weight_quantizer.scale": np.ones(4, np.float32)})
        >>> read_qparams(file.path)["fc.weight_quantizer.scale"].shape
        (1, 4)
    """

    name, subject = history.FILE_NAME, "The scales"

    def __init__(self, directory: Path | str, continue_from: Path | str | None = None, step: int = 0) -> None:
        self._epochs: list[Epoch] = []
        super().__init__(directory, continue_from, step)

    def append(self, step: int, epoch: int, phase: str, vectors: Mapping[str, Array]) -> None:
        """Write one more epoch, or, where that fails, warn once and keep nothing more.

        Args:
            step: optimizer steps taken; an epoch that was written at the same step is replaced.
            epoch: the epoch that ended.
            phase: the phase that was in force.
            vectors: by key in the state dict, an array of shape (channels,); the same keys and shapes each time.
        """
        if not self.recording or not vectors:
            return
        added = history.as_epoch(step, epoch, phase, vectors)
        with self._stopping_no_training():
            if self._epochs and history.shapes(self._epochs[-1]) != history.shapes(added):
                self._epochs = []
                self._start_afresh("as it has other quantizers")
            self._epochs = history.with_epoch(self._epochs, added)
            self._replace(history.as_archive(self._epochs))

    def _carried_over(self, source: Path, step: int) -> tuple[int, bytes]:
        self._epochs = history.epochs_up_to(source, step)
        return len(self._epochs), history.as_archive(self._epochs)


class RunFiles:
    """Both files of one run, in its directory; in a distributed run, make one on rank zero.

    Args:
        directory: where they lie, a path or URL.
        before: the trajectory of the run that is resumed, or None.
        step: step of the checkpoint that is resumed.

    Attributes:
        path: the local trajectory.csv.
        name: the trajectory's path or URL, by which a resumed run finds it.
    """

    def __init__(self, directory: str, before: str | None, step: int) -> None:
        self._place = Place(directory, (Trajectory.name, History.name))
        self._files: tuple[Trajectory, History] | None = None
        self.path = self._place.local / Trajectory.name
        self.name = self._place.name_of(Trajectory.name)
        if self._place.owned:
            with tempfile.TemporaryDirectory() as aside:
                rows, vectors = self._before(before, Path(aside))
                self._files = Trajectory(self._place.local, rows, step), History(self._place.local, vectors, step)

    def _before(self, name: str | None, aside: Path) -> tuple[Path | None, Path | None]:
        """The local files of the run that is resumed; one that stopped in its first epoch has no scales yet."""
        if name is None:
            return None, None
        directory = name.removesuffix(Trajectory.name)
        rows, vectors = (
            self._place.local / file if name == self.name else fetch(directory + file, aside)
            for file in (Trajectory.name, History.name)
        )
        return rows, vectors if vectors.is_file() else None

    @property
    def written(self) -> bool:
        """Whether there is anything that can be written to."""
        return self._files is not None and self._files[0].recording

    def append(self, rows: list[TrajectoryRow]) -> None:
        """Write rows of the trajectory."""
        if self._files is not None:
            self._files[0].append(rows)

    def keep(self, step: int, epoch: int, phase: str, vectors: Mapping[str, Any]) -> None:
        """Write an epoch's scales and zero points, and copy everything to where it belongs."""
        if self._files is not None and self.written:  # where one file cannot be written, one warning is enough
            self._files[1].append(step, epoch, phase, vectors)
            self._place.publish()

    def close(self) -> None:
        """Write no more."""
        self._place.close()
