"""Where a run's files lie: a directory of its own, a local copy of a remote one, or nowhere."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import filelock
import lightning as L
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.utilities import rank_zero_warn

LOCK = "trajectory.csv.lock"


def directory_for(trainer: L.Trainer) -> str | None:
    """The directory that a run has for its files, or None; every rank calls this.

    A run has one if its first logger writes to one, or its Trainer was given a `default_root_dir`. The working
    directory, which the Trainer takes otherwise, is nobody's choice. A barebones run keeps nothing.
    """
    if trainer.barebones:
        return None
    logged = trainer.log_dir if trainer.loggers else None  # a broadcast
    if logged:
        return str(logged)
    given = str(trainer.default_root_dir)
    return None if given == os.getcwd() else given


class Place:
    """One run's directory, which no other run writes to at the same time.

    Object stores do not append: the files of a remote directory (`s3://`, `memory://`) are written to a temporary one,
    and copied at each `publish`. The mark of ownership is a lock that the system lifts when a process ends, however it
    ends; object stores have none.

    Args:
        directory: a path or a URL that fsspec knows.
        names: the files of the run; those that a remote directory has already are fetched.

    Attributes:
        local: where files are written.
        owned: whether this run may write here.
    """

    def __init__(self, directory: str, names: Iterable[str]) -> None:
        self._url = None if _is_local(directory) else directory.rstrip("/")
        self._copies = self._url is not None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._lock: filelock.BaseFileLock | None = None
        self.owned = True
        if self._url is None:
            # Absolute, because a training script may change its working directory after this.
            self.local = Path(directory.removeprefix("file://")).absolute()
            self._claim()
            return
        self._temporary = tempfile.TemporaryDirectory(prefix="lfq_records_")
        self.local = Path(self._temporary.name)
        for name in names:
            fetch(f"{self._url}/{name}", self.local)

    def _claim(self) -> None:
        try:
            self.local.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.local / LOCK, timeout=0)
            lock.acquire()
            self._lock = lock
        except filelock.Timeout:
            self.owned = False
            rank_zero_warn(
                f"Each run needs a directory of its own for its records. Found another that is writing to "
                f"`{self.local}` now: this one keeps no files. Give it another `default_root_dir`, or a logger's "
                "version of its own."
            )
        except (OSError, NotImplementedError):
            pass  # who cannot lock a file cannot write one, and says so then; or the file system has no locks

    def name_of(self, name: str) -> str:
        """The path or URL of a file."""
        return str(self.local / name) if self._url is None else f"{self._url}/{name}"

    def publish(self) -> None:
        """Copy the files to the remote directory, or, where that fails, warn and copy nothing more."""
        if self._url is None or not self._copies:
            return
        try:
            file_system = get_filesystem(self._url)
            file_system.makedirs(self._url, exist_ok=True)
            for path in self.local.iterdir():
                file_system.put_file(str(path), f"{self._url}/{path.name}")
        except Exception as error:  # every store has errors of its own, and a record stops no training
            rank_zero_warn(
                f"Records cannot be copied to `{self._url}` ({error}). Training goes on, and nothing more is copied: "
                "check the store's address and credentials before the next run."
            )
            self._copies = False

    def close(self) -> None:
        """Copy what is left, and let other runs write here."""
        self.publish()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._copies = False
        if self._lock is not None:
            with suppress(OSError):  # while it is held, so that nobody else can hold a file that is taken away
                os.unlink(self._lock.lock_file)
            self._lock.release()
            self._lock = None


def fetch(path: str, into: Path) -> Path:
    """A local file as it is, or a copy of a remote one in this directory; where there is none, where it would be."""
    if _is_local(path):
        return Path(path.removeprefix("file://"))
    copied = into / path.rpartition("/")[2]
    try:
        with get_filesystem(path).open(path, "rb") as source, copied.open("wb") as target:
            shutil.copyfileobj(source, target)
    except Exception:  # every store has an error of its own for a file that is not there
        copied.unlink(missing_ok=True)
    return copied


def _is_local(path: str) -> bool:
    protocol, separator, _ = path.partition("://")
    return not separator or protocol == "file"
