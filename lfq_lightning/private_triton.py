"""What Triton does not promise to keep: how it launches a kernel that it has compiled.

Before it does, it looks at every argument anew for the kernel that it compiled for such arguments, which takes longer
than most kernels run. From Triton 3.4 to 3.9 a compiled kernel was launched as here; torch's Inductor does so too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from triton import knobs
from triton.runtime import driver

# Triton compiles into a kernel whether addresses of tensors are divisible by so many bytes, of which integers that
# holds too, and which integers are 1.
ALIGNED = 16

_HOOKS = ("launch_metadata", "launch_enter_hook", "launch_exit_hook")  # what is told of a launch, and to whom
_TAKEN = ("gridX", "gridY", "gridZ", "stream", "function", "kernel_metadata", *_HOOKS)


def current_device() -> int:
    """The number of the current GPU."""
    number: int = driver.active.get_current_device()
    return number


def launches_are_hooked() -> bool:
    """Whether somebody wants to be told of every launch, such as Triton's profiler."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def can_launch(launcher: type) -> bool:
    """Whether Triton's launchers of this class take what `compiled_launch` gives them; older ones do not name all."""
    parameters = inspect.signature(launcher.__call__).parameters.values()
    named = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD][1:]
    return len(named) >= 5 and tuple(named) == _TAKEN[: len(named)]


def compiled_launch(compiled: Any, programs: int, device: int) -> Callable[..., None] | None:
    """What launches a compiled kernel on a device's current stream; it takes all arguments, tensors as addresses.

    None where this Triton has another way, and for GPUs for which it compiles more into a kernel, such as AMD's.
    """
    target = getattr(getattr(compiled, "metadata", None), "target", None)
    if target is None or target.backend != "cuda":
        return None
    run, function, metadata = (getattr(compiled, name, None) for name in ("run", "function", "packed_metadata"))
    if run is None or function is None or metadata is None or not can_launch(type(run)):
        return None
    current_stream = driver.active.get_current_stream

    def launch(*arguments: Any) -> None:
        run(programs, 1, 1, current_stream(device), function, metadata, None, None, None, *arguments)

    return launch
