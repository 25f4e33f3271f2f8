"""Copies of a callback, by pickle or deepcopy, that leave a run in progress with the original."""

from __future__ import annotations

from typing import Any

import lightning as L

_OF_THE_MODULE = ("log", "log_dict")  # Lightning gives a callback those of the module that it fits


class AtRest(L.Callback):
    """A callback whose copies carry what it was given and what came out, and nothing that a run is at work with."""

    def _rest(self) -> None:
        """Set every attribute that belongs to a run as it is without one, from the others."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        resting = object.__new__(type(self))
        resting.__dict__.update(self.__dict__)
        resting._rest()
        return {name: value for name, value in resting.__dict__.items() if name not in _OF_THE_MODULE}
