"""Which module a technique served last: what it knows of that one is wrong for any other."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn


class Served:
    """Remembers the module that a callback served last, without keeping it alive.

    A callback is often used again for another model, as in cross-validation. What it remembers by the names of layers
    would then be applied to weights that it never saw. A checkpoint's state comes after `setup`, and is not affected.

    Example:
        >>> import torch
        >>> served, first, second = Served(), torch.nn.Identity(), torch.nn.Identity()
        >>> [served.is_another(module) for module in (first, first, second)]
        [False, False, True]
    """

    def __init__(self) -> None:
        self._module: Callable[[], nn.Module | None] | None = None

    def is_another(self, module: nn.Module) -> bool:
        """Whether this is another module than the last one, if there was any; it is the last one from now on."""
        before, self._module = self._module, weakref.ref(module)
        return before is not None and before() is not module

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process, or beside this one, serves no module that was served before."""
        return {"_module": None if self._module is None else _gone}


def _gone() -> None:
    return None
