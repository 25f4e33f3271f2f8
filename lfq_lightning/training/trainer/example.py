"""What a run's model does with a batch: made before the run begins, from what the Trainer was given."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import lightning as L
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lfq_lightning.flow.graph import Flow
from lfq_lightning.flow.tracing import states_kept, trace
from lfq_lightning.placement import Placement, to_float
from lfq_lightning.placement.layers import QUANTIZABLE, TABLES, modules_by_name
from lfq_lightning.placement.planning import NO_PART
from lfq_lightning.private import request_loaders, training_source, tree_map_only
from lfq_lightning.running import example_of, explained, inputs_of
from lfq_lightning.training.wrapping import Wrappers


class NoFlow(Exception):
    """No batch could be run, for the reason that it gives."""


def find_flow(trainer: L.Trainer, model: L.LightningModule, example: Any, wrappers: Wrappers, complete: bool) -> Flow:
    """What the model does with a batch, from the first of these that can be had.

    An example that the user gave, through `forward`; the first training batch, through `training_step` and else through
    `forward`; the module's `example_input_array`, through `forward`.

    Args:
        trainer: about to fit the model.
        model: the module.
        example: the user's, or None.
        wrappers: take off again what hands the loaders on that were made here.
        complete: whether the module's own `setup` has run, without which it may have no loader yet.

    Raises:
        NoFlow: if none can be had.
        Exception: what the model raises, if the example is the user's.
    """
    if example is not None:
        with explained(f"{type(model).__name__} must take the example", example, "as `forward` does"):
            return _through_forward(trainer, model, example_of(model, example), "the example")
    reasons: list[str] = []
    if trainer.state.fn == "fit":
        try:
            with states_kept():
                batch = _first_batch(trainer, model, wrappers, complete)
        except Exception as error:  # of any kind: it is the user's code that makes it
            reasons.append(f"no training batch could be made ({_shown(error)})")
        else:
            for run, source in ((_training_step(batch), "the training step"), (None, "forward")):
                try:
                    if run is None:
                        return _through_forward(trainer, model, inputs_of(model, batch), source)
                    with _without_loggers(trainer):
                        return trace(model, run, source, _untouched(trainer), _prepare)
                except Exception as error:
                    reasons.append(f"{source} did not run ({_shown(error)})")
    if model.example_input_array is not None:
        try:
            inputs = example_of(model, model.example_input_array)
            return _through_forward(trainer, model, inputs, "the example_input_array")
        except Exception as error:
            reasons.append(f"the example_input_array did not run ({_shown(error)})")
    raise NoFlow("; ".join(reasons) or "there is no training batch and no example")


def tell_account(placement: Placement | None) -> None:
    """Say how much of a model is quantized, and what is not; warn where it is less than half."""
    if placement is None:
        return
    for line in placement.account:
        rank_zero_info(line)
    shortfall = placement.shortfall("the callback's `placement`")
    if shortfall:
        rank_zero_warn(shortfall)


def tell_when_met(model: nn.Module, placement: Placement | None) -> list[Any]:
    """Say it, once, of each layer in float that had no part in the batch, when it is met after all.

    Returns:
        Handles that take the hooks off again.
    """
    source = "" if placement is None else placement.source
    absent = {name for name, reason in (placement.left_in_float if placement else ()) if reason == NO_PART + source}
    handles: list[Any] = []
    for name, module in modules_by_name(model).items():
        if name in absent and isinstance(module, (*QUANTIZABLE, *TABLES)):
            handles.append(module.register_forward_pre_hook(_Met(name, source)))
    return handles


class _Met:
    def __init__(self, name: str, source: str) -> None:
        self.name, self.source, self.said = name, source, False

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not self.said:
            self.said = True
            rank_zero_warn(
                f"{self.name!r} had no part in {self.source} by which the model was quantized, and runs now: it stays "
                "in float. Name it in a Rule to quantize it, or give an `example` that it has a part in."
            )


def _shown(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.150}" if text else type(error).__name__


def _through_forward(trainer: L.Trainer, model: nn.Module, inputs: tuple[Any, Any], source: str) -> Flow:
    args, kwargs = inputs
    return trace(model, lambda copied: copied(*args, **kwargs), source, _untouched(trainer), _prepare)


def _untouched(trainer: L.Trainer) -> tuple[Any, ...]:
    return trainer, getattr(trainer, "datamodule", None)


@contextmanager
def _without_loggers(trainer: L.Trainer) -> Iterator[None]:
    """Within it, whoever logs through the module's logger logs nothing."""
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


# ---- a training step ------------------------------------------------------------------------------------------------


def _training_step(batch: Any) -> Callable[[nn.Module], Any]:
    def run(copied: nn.Module) -> Any:
        assert isinstance(copied, L.LightningModule)
        _still(copied)
        given = copied.on_after_batch_transfer(copied.on_before_batch_transfer(batch, 0), 0)
        wanted = signature(copied.training_step).parameters
        if "batch_idx" in wanted or len(wanted) > 1:
            return copied.training_step(given, 0)
        return copied.training_step(given)

    return run


def _prepare(copied: nn.Module) -> None:
    """The float model, and of one that was compiled as a whole its own methods again."""
    to_float(copied)
    if getattr(copied, "_compiler_ctx", None) is not None:
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            copied.__dict__.pop(name, None)


def _still(copied: L.LightningModule) -> None:
    """Have a module's own ways to its Trainer lead nowhere."""
    quiet = ("log", "log_dict", "print", "manual_backward", "clip_gradients", "toggle_optimizer", "untoggle_optimizer")
    for name in quiet:
        copied.__dict__[name] = _nothing
    copied.__dict__["all_gather"] = lambda data, *args, **kwargs: data
    if not copied.automatic_optimization:
        optimizers = [_StillOptimizer(each) for each in _optimizers_of(copied)]
        copied.__dict__["optimizers"] = lambda *args, **kwargs: optimizers[0] if len(optimizers) == 1 else optimizers
        copied.__dict__["lr_schedulers"] = lambda: [_StillOptimizer(None) for _ in optimizers]


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _optimizers_of(copied: L.LightningModule) -> list[Any]:
    made: Any = type(copied).configure_optimizers(copied)
    if isinstance(made, Mapping):
        return [made["optimizer"]]
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], (list, tuple)):
        made = made[0]
    if not isinstance(made, (list, tuple)):
        made = [made]
    return [each["optimizer"] if isinstance(each, Mapping) else each for each in made]


class _StillOptimizer:
    """Stands for an optimizer or a scheduler, and steps nothing."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.param_groups = [] if optimizer is None else optimizer.param_groups

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    @contextmanager
    def toggle_model(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Nothing."""
        yield

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)


# ---- a batch --------------------------------------------------------------------------------------------------------


def _first_batch(trainer: L.Trainer, model: L.LightningModule, wrappers: Wrappers, complete: bool) -> Any:
    """A batch of the training data, without iterating over a loader.

    A hook that makes loaders is asked once: Lightning is given what it gave here.
    """
    source = training_source(trainer)
    instance = source.instance
    later = ("setup", "prepare_data", "configure_model")
    if not complete and isinstance(instance, L.LightningModule) and any(is_overridden(n, instance) for n in later):
        raise NoFlow("the module's own setup has not run yet")
    if not source.is_defined():
        raise NoFlow("there is no training data")
    loaders = request_loaders(source)
    if source.is_module():
        handed: list[Any] = [loaders]

        def once(original: Callable[[], Any]) -> Any:
            return handed.pop() if handed else original()

        wrappers.around(instance, source.name, once)
    return tree_map_only(DataLoader, _batch_of, _of_any(loaders))


def _of_any(loaders: Any) -> Any:
    """The loaders, and of other iterables their first batch."""
    if isinstance(loaders, DataLoader):
        return loaders
    if isinstance(loaders, Mapping):
        return {name: _of_any(each) for name, each in loaders.items()}
    if isinstance(loaders, Sequence):
        return loaders[0] if not _has_loaders(loaders) else [_of_any(each) for each in loaders]
    inner = getattr(loaders, "iterables", None)
    if inner is not None:
        return _of_any(inner)  # a CombinedLoader
    raise NoFlow(f"a {type(loaders).__name__} cannot be read without being used up")


def _has_loaders(loaders: Sequence[Any]) -> bool:
    return any(isinstance(each, DataLoader) or hasattr(each, "iterables") for each in loaders)


def _batch_of(loader: DataLoader[Any]) -> Any:
    dataset = loader.dataset
    sampler: Any = getattr(loader, "batch_sampler", None)
    size = loader.batch_size or getattr(sampler, "batch_size", None) or (1 if sampler is None else 2)
    if isinstance(dataset, IterableDataset):
        samples: Any = iter(dataset)
        if samples is dataset:
            raise NoFlow("the training data can be read only once")
        taken = list(itertools.islice(samples, size))
    else:
        taken = [dataset[index] for index in range(min(size, len(dataset)))]  # type: ignore[arg-type]
    if not taken:
        raise NoFlow("the training data is empty")
    collate = loader.collate_fn
    return collate(taken[0]) if loader.batch_size is None and sampler is None else collate(taken)
