"""Running a model on a batch as it would be used, and leaving its modes as they were."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from lfq_lightning.checking import in_words
from lfq_lightning.private import BatchNorm, uncompiled


def batch_norms(model: nn.Module) -> list[BatchNorm]:
    """The BatchNorm layers of a model that keep running statistics, SyncBatchNorm among them."""
    return [m for m in model.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it every module is in eval mode; afterwards each has its own mode again, whatever happened."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def inputs_of(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword inputs of a model in a batch, as a DataLoader gives it.

    A mapping is passed as keywords. Of a tuple or list, as many entries are inputs as the model's `forward` must be
    given, the first at least: what follows are targets. Anything else is the one input.
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if not isinstance(batch, (tuple, list)):
        return (batch,), {}
    return tuple(batch[: max(1, _positional(model)[0])]), {}


def example_of(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs in an example, as Lightning's `example_input_array` is one, or in a batch.

    A tuple holds positional inputs if `forward` takes so many; all else is a batch.
    """
    if isinstance(inputs, tuple) and len(inputs) <= _positional(model)[1]:
        return inputs, {}
    return inputs_of(model, inputs)


def _positional(model: nn.Module) -> tuple[int, float]:
    """How many positional inputs `forward` must be given, and how many it takes."""
    model = uncompiled(model)  # the forward of what torch.compile makes takes anything
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # a scripted one
        return 1, float("inf")
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in places)
    return required, float("inf") if any(p.kind is p.VAR_POSITIONAL for p in parameters) else len(places)


def run(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch, whose inputs are those of `inputs_of`."""
    args, kwargs = inputs_of(model, batch)
    with explained(f"{type(model).__name__} must take the inputs of a batch", batch, "or pass `forward`"):
        return model(*args, **kwargs)


def run_by(forward: Callable[[nn.Module, Any], Any] | None, model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch, by the function that a user gave, or else by `run`."""
    if forward is None:
        return run(model, batch)
    with explained("`forward` is called with the model and a batch", batch, "see what it makes of it"):
        return forward(model, batch)


@contextmanager
def explained(rule: str, given: Any, remedy: str) -> Iterator[None]:
    """Within it, an error of a user's own code goes on as it is, with a note of what the code was given here."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{rule}. Found {in_words(given)}: give what it takes, {remedy}.")
        raise
