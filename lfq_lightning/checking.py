"""What every public function asks of its arguments before it changes anything: rule, what was found, remedy."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_SHOWN = 100  # characters of a value in a message


def in_words(value: Any) -> str:
    """A value and its type, as a message names them: tensors, modules and containers by what they are."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype} on {value.device}"
    if isinstance(value, nn.Module):
        return f"the module {kind}"
    if isinstance(value, (list, tuple)) and any(isinstance(entry, (Tensor, nn.Module)) for entry in value):
        entries = ", ".join(in_words(entry) for entry in value[:3])
        return f"a {kind} of {len(value)}: {entries}{', ...' if len(value) > 3 else ''}"
    if isinstance(value, Mapping) and any(isinstance(entry, (Tensor, nn.Module)) for entry in value.values()):
        return f"a {kind} with the keys {', '.join(map(str, list(value)[:5]))}"
    if value is None:
        return "None"
    try:
        shown = repr(value)
    except Exception:  # of an object that is half made
        return f"an object of type {kind}"
    return f"{shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '...'} of type {kind}"


def check_model(model: object, name: str = "model") -> None:
    """Raise TypeError unless it is a module."""
    if isinstance(model, nn.Module):
        return
    remedy = "make one of the class first" if isinstance(model, type) else "pass the model itself"
    raise TypeError(f"`{name}` must be a torch.nn.Module. Found {in_words(model)}: {remedy}.")


def check_flags(**flags: object) -> None:
    """Raise TypeError unless each is True or False: a text such as "no" would count as true."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"`{name}` must be True or False. Found {in_words(value)}: write one of the two.")


def check_whole(name: str, value: object, least: int = 0, most: int = 2**31 - 1) -> None:
    """Raise unless it is a whole number within limits."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be a whole number. Found {in_words(value)}: give an int of {least} or more.")
    if not least <= value <= most:
        limit = f"at least {least}" if value < least else f"at most {most}"
        raise ValueError(f"`{name}` must be {limit}. Found {value}.")


def check_number(name: str, value: object) -> None:
    """Raise TypeError unless it is a number; which numbers are allowed is the caller's to say."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number. Found {in_words(value)}: give a float.")


def check_share(name: str, value: object) -> None:
    """Raise unless it is a share from 0 to 1."""
    check_number(name, value)
    assert isinstance(value, (int, float))
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be a share from 0 to 1. Found {value}: 0.01 is a hundredth.")


def check_texts(**texts: object) -> None:
    """Raise TypeError unless each is a text."""
    for name, value in texts.items():
        if not isinstance(value, str):
            raise TypeError(f"`{name}` must be a text. Found {in_words(value)}: write it in quotes.")


def check_rows(name: str, value: object, kind: type) -> None:
    """Raise TypeError unless it is a tuple of one kind of rows, as the function makes it that gives them."""
    if not isinstance(value, tuple) or not all(isinstance(row, kind) for row in value):
        raise TypeError(f"`{name}` must be a tuple of {kind.__name__}. Found {in_words(value)}: take what was given.")


def check_device(name: str, value: Any) -> None:
    """Raise ValueError unless torch knows it as a device, or it is None."""
    if value is None or isinstance(value, torch.device):
        return
    try:
        torch.device(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'`{name}` must be a device. Found {in_words(value)}: "cpu" is one.') from error


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError unless it is one of some words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}. Found {in_words(value)}: choose one of them.")


def check_function(name: str, value: object, takes: str) -> None:
    """Raise TypeError unless it can be called, or is None."""
    if value is not None and not callable(value):
        raise TypeError(f"`{name}` must be a function of {takes}, or None. Found {in_words(value)}: leave it out.")


def check_batches(name: str, value: object) -> None:
    """Raise TypeError unless it gives batches; one batch alone would be taken apart, and its samples for batches."""
    if isinstance(value, (Tensor, Mapping, str, bytes)):
        raise TypeError(f"`{name}` must give batches. Found {in_words(value)}, which may be one: put it in brackets.")
    if isinstance(value, type) or not (isinstance(value, Iterable) or hasattr(value, "__getitem__")):
        raise TypeError(f"`{name}` must give batches. Found {in_words(value)}: pass a DataLoader or a list of batches.")


def check_path(name: str, value: object, *, written: bool = False, needed: bool = True) -> None:
    """Raise unless it is a path, and one that can be a file where it is to be written; None where it is not needed."""
    if value is None and not needed:
        return
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"`{name}` must be a path. Found {in_words(value)}: give a str or a pathlib.Path.")
    text = os.fspath(value)
    if not text or "\0" in text:
        raise ValueError(f"`{name}` must name a file or directory. Found {text!r}: give its path.")
    if "://" in text:  # of fsspec, which knows
        return
    path = Path(text)
    try:
        path.exists()  # which fails for a name that is too long
        if not written:
            return
        if path.is_dir():
            raise ValueError(f"`{name}` must be a file to write. Found the directory {text!r}: add the file's name.")
        above = next((parent for parent in path.parents if parent.exists()), None)
        if above is not None and not above.is_dir():
            raise ValueError(f"`{name}` must lie in a directory. Found {text!r}, where {str(above)!r} is a file.")
    except OSError as error:
        raise ValueError(
            f"`{name}` must be a path that the file system takes. Found {text[:_SHOWN]!r} ({error})."
        ) from error
