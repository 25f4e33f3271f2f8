"""Instance-level wrappers around a module's methods, and taking them off again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_NOTHING = object()


class Wrappers:
    """Wraps bound methods of objects, and restores what was there."""

    def __init__(self) -> None:
        self._wrapped: list[tuple[Any, str, Any]] = []

    def around(self, target: Any, name: str, wrapper: Callable[..., Any]) -> None:
        """Call `wrapper(original, *args, **kwargs)` in place of `target.name(*args, **kwargs)`."""
        original = getattr(target, name)

        # A plain function without functools.wraps: Lightning looks at its code to see whether a hook is overridden.
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(original, *args, **kwargs)

        self.put(target, name, wrapped)

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
