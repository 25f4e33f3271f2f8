"""What a run lays around methods of other objects, taken off again when it ends, and in no copy of a callback."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning as L

_NOTHING = object()
_OF_THE_MODULE = ("log", "log_dict")  # Lightning gives a callback those of the module that it fits


class _Wrapped:
    """What stands in a method's place; in a copy of the object, the method stands there again."""

    def __init__(self, target: Any, name: str, wrapper: Callable[..., Any]) -> None:
        self._target, self._name, self._wrapper = target, name, wrapper
        self._original, self._before = getattr(target, name), target.__dict__.get(name, _NOTHING)
        self.__code__ = type(self).__call__.__code__  # Lightning compares it to see whether a hook is overridden

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapper(self._original, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._before is _NOTHING:
            return getattr, (self._target, self._name)  # the copy has nothing there yet but what its class has
        return _itself, (self._before,)


def _itself(value: Any) -> Any:
    return value


class Wrappers:
    """Wraps bound methods of objects, and restores what was there."""

    def __init__(self) -> None:
        self._wrapped: list[tuple[Any, str, Any]] = []

    def around(self, target: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Call `wrapper(original, *args, **kwargs)` in place of `target.name(*args, **kwargs)`."""
        self.put(target, name, _Wrapped(target, name, wrapper))

    def within(self, target: Any, name: str, context: Callable[[], AbstractContextManager[None]]) -> None:
        """Call `target.name(*args, **kwargs)` within a context that is made for each call."""

        def wrapper(original: Any, *args: Any, **kwargs: Any) -> Any:
            with context():
                return original(*args, **kwargs)

        self.around(target, name, wrapper)

    def put(self, target: Any, name: str, replacement: Callable[..., Any]) -> None:
        """Have `target.name` be this, for instance an object that can be pickled with the target."""
        self._wrapped.append((target, name, target.__dict__.get(name, _NOTHING)))
        object.__setattr__(target, name, replacement)

    def remove(self) -> None:
        """Restore every wrapped method."""
        while self._wrapped:
            target, name, before = self._wrapped.pop()
            if before is _NOTHING:
                target.__dict__.pop(name, None)
            else:
                object.__setattr__(target, name, before)


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
