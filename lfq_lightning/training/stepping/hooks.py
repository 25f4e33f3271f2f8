"""When optimizers that are not ours step, however they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lfq_lightning.training.wrapping import Wrappers

Hook = Callable[[Any, Any, Any], None]  # the optimizer, and the arguments of its step


class StepHooks:
    """Hooks before and after steps, of torch's optimizers and of objects that only look like one."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._wrappers = Wrappers()

    def add(self, optimizer: Any, before: Hook | None, after: Hook) -> None:
        """Call these around each step of an optimizer from now on."""
        if hasattr(optimizer, "_optimizer_step_post_hooks"):  # wrappers often leave `Optimizer.__init__` out
            if before is not None:
                self._handles.append(optimizer.register_step_pre_hook(before))
            self._handles.append(optimizer.register_step_post_hook(after))
            return

        def step(original: Any, *args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(optimizer, (optimizer, *args), kwargs)
            given = original(*args, **kwargs)
            after(optimizer, (optimizer, *args), kwargs)
            return given

        self._wrappers.around(optimizer, "step", step)

    def add_once(self, optimizer: Any, call: Callable[[], None]) -> None:
        """Call this when a step has ended, or that of an optimizer within, and once for steps within steps.

        A subclass that calls its parent's `step` runs the hooks of both, and a wrapper those of what it wraps.
        """
        stepped, outermost = [optimizer, *wrapped_by(optimizer)], _Outermost(call)
        kinds = [kind for kind in type(optimizer).__mro__ if "step" in vars(kind) and kind is not Optimizer]
        for each in stepped:
            self.add(each, outermost.before if len(stepped) > 1 or len(kinds) > 1 else None, outermost.after)

    def remove(self) -> None:
        """Let go of all optimizers."""
        while self._handles:
            self._handles.pop().remove()
        self._wrappers.remove()


class _Outermost:
    """Calls back when the outermost of steps within steps has ended."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call, self._depth = call, 0

    def before(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._depth += 1

    def after(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._depth = max(self._depth - 1, 0)
        if not self._depth:
            self._call()


def wrapped_by(optimizer: Any) -> list[Optimizer]:
    """The optimizers that an optimizer keeps to step the same parameters with, the innermost last.

    SAM's `first_step` and `second_step` are no steps to torch; that of the optimizer within it is one.
    """
    held, inner = _held(optimizer), optimizer
    found: list[Optimizer] = []
    while inner is not None:
        within = [v for v in vars(inner).values() if isinstance(v, Optimizer) and v not in (optimizer, *found)]
        inner = next((kept for kept in within if held and _held(kept) >= held), None)
        found += [] if inner is None else [inner]
    return found


def _held(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
