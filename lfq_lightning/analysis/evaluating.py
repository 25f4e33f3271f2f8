"""A model's metric on a DataLoader as one number, however the metric is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric

from lfq_lightning.checking import check_batches, check_flags, check_function, in_words
from lfq_lightning.private import trainer_of
from lfq_lightning.running import explained, in_eval_mode, inputs_of, run, run_by

Evaluation = Callable[[], float]
Forward = Callable[[nn.Module, Any], tuple[Any, Any]]
MetricLike = Metric | Callable[[Any, Any], Any] | str


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode and run eagerly without gradients; its modes are restored."""
    # A layer of its own at a time would have every compiled function compiled again and again.
    stance = torch.compiler.set_stance("force_eager")
    with in_eval_mode(model), stance, torch.no_grad():
        yield


def is_higher_better(metric: MetricLike, given: bool | None) -> bool:
    """What was given, or what a torchmetrics.Metric says of itself."""
    if given is not None:
        check_flags(higher_is_better=given)
    found = getattr(metric, "higher_is_better", None) if given is None else given
    if found is None:
        raise ValueError(
            f"Whether a higher metric is better must be known. Found no word of it for {_name(metric)}: pass "
            "`higher_is_better=True` for an accuracy, or False for a loss."
        )
    return bool(found)


def evaluation(model: nn.Module, dataloader: Iterable[Any], metric: MetricLike, forward: Forward | None) -> Evaluation:
    """A function that runs the model as it is over all batches, each time with the same random numbers.

    Args:
        model: any module; batches are moved to its device.
        dataloader: read from its beginning each time.
        metric: a torchmetrics.Metric, of which a copy is used; a function of outputs and targets, whose values are
            averaged over samples; or the name of a value that a LightningModule logs in `validation_step`.
        forward: from model and batch to outputs and targets; by default a batch is a pair of inputs and targets.
    """
    check_batches("dataloader", dataloader)
    check_function("forward", forward, "the model and a batch")
    if isinstance(dataloader, Iterator):
        raise ValueError("`dataloader` is read once for each layer. Found an iterator: pass a DataLoader or a list.")
    if isinstance(metric, str):
        measure = _by_validation(model, dataloader, metric)
    elif callable(metric):  # a torchmetrics.Metric is
        measure = _by_batches(model, dataloader, metric, forward)
    else:
        raise TypeError(
            "`metric` must be a torchmetrics.Metric, a function of outputs and targets, or the name of a logged value. "
            f"Found {metric!r}."
        )

    def evaluate() -> float:
        failed: BaseException | None = None
        value = float("nan")
        with isolate_rng(), evaluating(model):
            try:
                value = measure()
            except BaseException as error:  # passed on below: past an error, `isolate_rng` restores nothing
                failed = error
        if failed is not None:
            raise failed
        return value

    return evaluate


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    first = next((p for p in model.parameters()), None)
    return torch.device("cpu") if first is None else first.device


def _by_batches(model: nn.Module, dataloader: Iterable[Any], metric: Any, forward: Forward | None) -> Evaluation:
    device = device_of(model)
    copied = metric.clone().to(device) if isinstance(metric, Metric) else None

    def run() -> float:
        total, count = 0.0, 0
        if copied is not None:
            copied.reset()
        for batch in dataloader:
            outputs, targets = _outputs_and_targets(forward, model, move_data_to_device(batch, device))
            size = extract_batch_size(batch)
            count += size
            with explained("`metric` is called with outputs and targets", (outputs, targets), "or choose another"):
                if copied is None:
                    total += size * _number(metric, metric(outputs, targets))
                else:
                    copied.update(outputs, targets)
        if count == 0:
            raise ValueError("`dataloader` must hold at least one batch. Found none.")
        return total / count if copied is None else _number(metric, copied.compute())

    return run


def _by_validation(model: nn.Module, dataloader: Iterable[Any], name: str) -> Evaluation:
    if not isinstance(model, L.LightningModule):
        raise TypeError(
            f"A name such as {name!r} speaks of what a LightningModule logs. Found {type(model).__name__}: pass a "
            "torchmetrics.Metric or a function of outputs and targets."
        )
    device = model.device
    accelerator, devices = ("cpu", 1) if device.type == "cpu" else (device.type, [device.index or 0])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator=accelerator, devices=devices, enable_model_summary=False, **quiet)  # type: ignore[arg-type]

    def run() -> float:
        before = trainer_of(model)
        try:
            logged = {k: v for part in trainer.validate(model, dataloader, verbose=False) for k, v in part.items()}
        finally:
            model.trainer = before
            model.to(device)  # the Trainer leaves it on the CPU
        if name not in logged:
            found = ", ".join(logged) or "nothing"
            raise ValueError(f"{type(model).__name__} must log {name!r} in `validation_step`. Found {found}.")
        return float(logged[name])

    return run


def _outputs_and_targets(forward: Forward | None, model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """What `forward` gives, or of a batch of inputs and targets the model's outputs and the targets."""
    if forward is None:
        inputs = len(inputs_of(model, batch)[0]) if isinstance(batch, (tuple, list)) else 0
        if not inputs or len(batch) != inputs + 1:
            raise TypeError(
                f"A batch must be a pair of inputs and targets. Found {in_words(batch)}: pass `forward`, a "
                "function from model and batch to outputs and targets."
            )
        return run(model, batch), batch[-1]
    given = run_by(forward, model, batch)
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(f"`forward` must give outputs and targets. Found {in_words(given)}: return a pair.")
    return given[0], given[1]


def _number(metric: Any, value: Any) -> float:
    if (isinstance(value, Tensor) and value.numel() != 1) or not isinstance(value, (Tensor, float, int)):
        raise TypeError(f"A metric must give one number. Found {value!r} from {_name(metric)}: choose one, or average.")
    return float(value)


def _name(metric: Any) -> str:
    return repr(metric) if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)
