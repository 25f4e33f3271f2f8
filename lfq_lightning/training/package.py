"""Lightning is published as two packages, whose classes have the same names and are not the same."""

from __future__ import annotations

import lightning as L
from lightning.pytorch import Trainer

_OTHER = "pytorch_lightning"


def change_of_import(value: object) -> str:
    """The line to change where an object comes from the other package, or nothing."""
    if not any(kind.__module__.partition(".")[0] == _OTHER for kind in type(value).__mro__):
        return ""
    return f"write `import lightning.pytorch as pl` in place of `import {_OTHER} as pl`, everywhere in the program"


def check_package(trainer: L.Trainer, own: L.Callback) -> None:
    """Refuse what is of the other package, which would pass by every check of strategies, callbacks and modules.

    Raises:
        TypeError: unless the Trainer is one of `lightning`, and all that it was given.
    """
    if not isinstance(trainer, Trainer):
        _refuse(trainer, own)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for part in (*callbacks, *trainer.loggers, trainer.strategy, trainer.precision_plugin):
        if change_of_import(part):
            _refuse(part, own)


def _refuse(found: object, own: L.Callback) -> None:
    kind = type(found)
    raise TypeError(
        f"{type(own).__name__} needs a Trainer of the package `lightning`, with callbacks, loggers and plugins of it. "
        f"Found {kind.__module__}.{kind.__qualname__}: {change_of_import(found) or 'use `lightning.Trainer`'}."
    )
