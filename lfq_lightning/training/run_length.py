"""How long a Trainer's run will be, and the schedule that fits it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import nn

from lfq_lightning.placement.host import quantizers
from lfq_lightning.schedule import PhaseSchedule
from lfq_lightning.training.telling import tell


def is_dev_run(trainer: L.Trainer) -> bool:
    """Whether it is a `fast_dev_run`, too short for any schedule."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def check_configured_length(trainer: L.Trainer, schedule: PhaseSchedule | None, since: tuple[int, int]) -> None:
    """Raise ValueError if the Trainer's own limits show that a schedule never learns, before anything is changed.

    Args:
        trainer: its limits are for all that it fits.
        schedule: the user's, or None.
        since: the Trainer's epoch and step at which the model's own count was 0.
    """
    if schedule is not None and not is_dev_run(trainer):
        epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else math.inf
        steps = trainer.max_steps if trainer.max_steps != -1 else math.inf
        schedule.check_reaches_learn(epochs - since[0], steps - since[1])


def has_learned(model: nn.Module) -> bool:
    """Whether every quantizer that had data has learned already; the model goes on, whatever the schedule says."""
    in_time = [quantizer for quantizer in quantizers(model).values() if not quantizer.late]
    return bool(in_time) and all(quantizer.learned for quantizer in in_time)


def length_of(trainer: L.Trainer) -> tuple[float, float]:
    """Epochs and optimizer steps that the run will have; infinite where it cannot be known."""
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs)
    steps = float(trainer.estimated_stepping_batches)
    if steps < 0 or steps == math.inf:
        return epochs, math.inf
    in_an_epoch = max(1.0, float(trainer.num_training_batches) / trainer.accumulate_grad_batches)
    return min(epochs, steps / in_an_epoch), steps * max(1, len(trainer.optimizers))


def _length_for(trainer: L.Trainer, since: tuple[int, int]) -> tuple[float, float]:
    """Epochs and optimizer steps that a model will have had when the run ends."""
    epochs, steps = length_of(trainer)
    if since == (0, 0) or math.isinf(steps):
        return epochs - since[0], steps - since[1]
    left = max(0.0, epochs - trainer.current_epoch)
    had = trainer.global_step - since[1]
    return epochs - since[0], had + left * steps / epochs  # what it had may have been in other epochs


def settle_schedule(
    trainer: L.Trainer,
    model: nn.Module,
    given: PhaseSchedule | None,
    restored: Mapping[str, Any] | None,
    since: tuple[int, int],
) -> tuple[PhaseSchedule, float]:
    """The schedule in force (the user's, else the resumed run's, else one that fits), and the model's optimizer steps.

    Args:
        trainer: counts on through all that it fits, and the schedule in force goes by its counts.
        model: the module.
        given: the user's schedule, in the model's own counts.
        restored: that of the run that is resumed, in the Trainer's.
        since: the Trainer's epoch and step at which the model's own count was 0.

    Raises:
        ValueError: if the user's schedule never learns in this run, and the model has not learned before.
    """
    epochs, steps = _length_for(trainer, since)
    if given is not None:
        if not is_dev_run(trainer) and not has_learned(model):
            given.check_reaches_learn(epochs, steps)
        return given.counted_from(*since), steps
    if restored is not None:
        return PhaseSchedule(**restored), steps
    derived = PhaseSchedule.for_run(epochs, steps)
    tell(trainer, f"QuantizationAwareTraining derived {derived} from the length of the run.")
    return derived.counted_from(*since), steps
