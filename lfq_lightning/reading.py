"""A checkpoint's file, or what was found in its place."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from lfq_lightning.checking import check_path, in_words


def read_checkpoint(
    path: str | Path | IO[bytes], map_location: Any = None, weights_only: bool | None = None
) -> dict[str, Any]:
    """The contents of a checkpoint with a `state_dict`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or has none.
    """
    if not (hasattr(path, "read") and hasattr(path, "seek")):
        check_path("path", path)
    _check_location(map_location)
    try:
        checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=weights_only)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"`path` must be a checkpoint. Found nothing at `{path}`: check the path.") from error
    except Exception as error:  # torch.load has no common error for a file that is no checkpoint
        objects = _untrusted(path)
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
    return checkpoint


def _check_location(location: Any) -> None:
    if location is None or callable(location) or isinstance(location, (torch.device, Mapping)):
        return
    try:
        torch.device(location)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"`map_location` must be a device, a mapping or a function. Found {in_words(location)}: leave it "
            "out for the CPU."
        ) from error


def _untrusted(path: str | Path | IO[bytes]) -> list[str]:
    """The classes and functions in a whole file that torch does not call unasked."""
    if not zipfile.is_zipfile(path):
        return []
    if not isinstance(path, (str, Path)):
        path.seek(0)
    return torch.serialization.get_unsafe_globals_in_checkpoint(path)
