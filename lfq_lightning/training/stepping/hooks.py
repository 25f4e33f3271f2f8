"""When optimizers that are not ours step, however they are made and whoever calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lfq_lightning.private import takes_step_hooks
from lfq_lightning.training.wrapping import Wrappers

Moment = Callable[[Any], None]  # called with the optimizer
_Hook = Callable[[Any, Any, Any], None]  # with the arguments of its step, too


class StepHooks:
    """Moments before and after steps, of torch's optimizers and of objects that only look like one.

    Before a step is where its gradients are complete and nothing has moved. A step without a closure begins there.
    Within a closure gradients are yet to come, and whoever makes them says when they have: Lightning does, to
    callbacks, and `announce` tells it on.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._wrappers = Wrappers()
        self._before: list[tuple[Any, Moment]] = []

    def add(self, optimizer: Any, before: Moment, after: Moment) -> None:
        """Call these at each step of an optimizer from now on."""

        def begins(stepping: Any, args: Any, kwargs: Any) -> None:
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if closure is None:
                before(stepping)

        self._before.append((optimizer, before))
        self._around(optimizer, begins, lambda stepping, args, kwargs: after(stepping))

    def announce(self, optimizer: Any) -> None:
        """Gradients are complete within the closure that this optimizer was given; it may be called again in a step."""
        for each, before in self._before:
            if each is optimizer:
                before(optimizer)

    def add_once(self, optimizer: Any, call: Callable[[], None]) -> None:
        """Call this when a step has ended, or that of an optimizer within, and once for steps within steps.

        A subclass that calls its parent's `step` runs the hooks of both, and a wrapper those of what it wraps.
        """
        stepped, outermost = [optimizer, *wrapped_by(optimizer)], _Outermost(call)
        kinds = [kind for kind in type(optimizer).__mro__ if "step" in vars(kind) and kind is not Optimizer]
        for each in stepped:
            self._around(each, outermost.begins if len(stepped) > 1 or len(kinds) > 1 else None, outermost.ends)

    def _around(self, optimizer: Any, begins: _Hook | None, ends: _Hook) -> None:
        if takes_step_hooks(optimizer):
            if begins is not None:
                self._handles.append(optimizer.register_step_pre_hook(begins))
            self._handles.append(optimizer.register_step_post_hook(ends))
            return

        def step(original: Any, *args: Any, **kwargs: Any) -> Any:
            if begins is not None:
                begins(optimizer, (optimizer, *args), kwargs)
            given = original(*args, **kwargs)
            ends(optimizer, (optimizer, *args), kwargs)
            return given

        self._wrappers.around(optimizer, "step", step)

    def remove(self) -> None:
        """Let go of all optimizers."""
        self._before.clear()
        while self._handles:
            self._handles.pop().remove()
        self._wrappers.remove()


class _Outermost:
    """Calls back when the outermost of steps within steps has ended."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call, self._depth = call, 0

    def begins(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._depth += 1

    def ends(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._depth = max(self._depth - 1, 0)
        if not self._depth:
            self._call()


def wrapped_by(optimizer: Any) -> list[Optimizer]:
    """The optimizers that an optimizer keeps to step the same parameters with, the innermost last.

    SAM's `first_step` and `second_step` are no steps to torch; that of the optimizer within it is one.
    """
    held, inner = held_by([optimizer]), optimizer
    found: list[Optimizer] = []
    while inner is not None:
        within = [v for v in vars(inner).values() if isinstance(v, Optimizer) and v not in (optimizer, *found)]
        inner = next((kept for kept in within if held and held_by([kept]) >= held), None)
        found += [] if inner is None else [inner]
    return found


def held_by(optimizers: Iterable[Any]) -> set[int]:
    """The ids of all parameters in these optimizers."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
