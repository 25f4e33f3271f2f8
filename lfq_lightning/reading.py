"""A checkpoint's file, or what was found in its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem

from lfq_lightning.checking import check_device, check_path
from lfq_lightning.private import load_file


def read_checkpoint(
    path: str | Path | IO[bytes], map_location: Any = None, weights_only: bool | None = None
) -> dict[str, Any]:
    """The contents of a checkpoint with a `state_dict`.

    Args:
        path: a path, a URL, any path that fsspec knows (`s3://...`), or an open file.
        map_location: where tensors go, as in `torch.load`; None is the CPU.
        weights_only: as in `torch.load`; None is True, also for a URL.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if fsspec lacks what it reads such paths with.
        ValueError: if it cannot be read, or has none.
    """
    if not (hasattr(path, "read") and hasattr(path, "seek")):
        check_path("path", path)
    if not callable(map_location) and not isinstance(map_location, Mapping):
        check_device("map_location", map_location)
    if weights_only is None and str(path).startswith("http"):
        weights_only = True  # where Lightning would trust whoever answers
    try:
        checkpoint = load_file(path, map_location=map_location or "cpu", weights_only=weights_only)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"`path` must be a checkpoint. Found nothing at `{path}`: check the path.") from error
    except ImportError:
        raise
    except Exception as error:  # torch.load has no common error for a file that is no checkpoint
        objects = untrusted(path)
        if objects:
            raise ValueError(
                f"{path} must be trusted before its objects are made. Found {', '.join(sorted(objects)[:5])} beside "
                "tensors and plain values: pass `weights_only=False` if you know where the file comes from."
            ) from error
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"{path} must be a complete checkpoint. Found a file that torch cannot read ({type(error).__name__}: "
            f"{reason}): it may have been cut short, or be of another kind."
        ) from error
    state_dict = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
        raise ValueError(f"{path} must be a Lightning checkpoint. Found no `state_dict` in it: use `load_state_dict`.")
    return cast(dict[str, Any], checkpoint)


def untrusted(path: str | Path | IO[bytes]) -> list[str]:
    """The classes and functions in a whole file that torch does not call unasked; none where it cannot be read."""
    try:
        with _opened(path) as file:
            return torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # a torn file fails again here, in as many ways
        return []


@contextmanager
def _opened(path: str | Path | IO[bytes]) -> Iterator[IO[bytes]]:
    if not isinstance(path, (str, Path)):
        path.seek(0)
        yield path
        return
    if str(path).startswith("http"):  # torch.hub keeps what it loads
        path = Path(torch.hub.get_dir(), "checkpoints", Path(str(path)).name)
    with get_filesystem(path).open(str(path), "rb") as file:
        yield file
