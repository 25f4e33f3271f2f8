"""How long a Trainer's run will be, what of it a model has had before, and the schedule that fits."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import nn

from lfq_lightning.placement.quantized_layer import quantizers
from lfq_lightning.schedule import PhaseSchedule
from lfq_lightning.telling import tell

Count = tuple[int, int]  # epochs and optimizer steps


def is_dev_run(trainer: L.Trainer) -> bool:
    """Whether it is a `fast_dev_run`, too short for any schedule."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def check_configured_length(trainer: L.Trainer, schedule: PhaseSchedule | None, since: Count) -> None:
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


def _length_for(trainer: L.Trainer, since: Count) -> tuple[float, float]:
    """Epochs and optimizer steps that a model will have had when the run ends."""
    epochs, steps = length_of(trainer)
    if since == (0, 0) or math.isinf(steps):
        return epochs - since[0], steps - since[1]
    left = max(0.0, epochs - trainer.current_epoch)
    had = trainer.global_step - since[1]
    return epochs - since[0], had + left * steps / epochs  # what it had may have been in other epochs


def steps_left(trainer: L.Trainer) -> float:
    """How many more steps each optimizer will take; infinite where it cannot be known."""
    return max(0.0, length_of(trainer)[1] - trainer.global_step) / max(1, len(trainer.optimizers))


def learning_left(trainer: L.Trainer, schedule: PhaseSchedule) -> tuple[float, float]:
    """How many more steps each optimizer will take while qparams learn, and the Trainer's step at their end.

    Args:
        trainer: as a fit begins or is resumed.
        schedule: in force, in the Trainer's own counts.
    """
    epochs, steps = length_of(trainer)
    if math.isinf(steps) or not epochs:
        return math.inf, math.inf
    in_an_epoch = steps / epochs if schedule.unit == "epoch" else 1.0
    end = steps if schedule.freeze is None else min(steps, schedule.freeze * in_an_epoch)
    begins = max(float(trainer.global_step), schedule.learn * in_an_epoch)
    return max(0.0, end - begins) / max(1, len(trainer.optimizers)), end


def settle_schedule(
    trainer: L.Trainer,
    model: nn.Module,
    given: PhaseSchedule | None,
    restored: Mapping[str, Any] | None,
    since: Count,
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


@dataclass(frozen=True)
class Had:
    """How much a model had been trained when a fit of it ended, and by which Trainer; neither is kept alive.

    A Trainer counts on through all its fits, whichever model it fits, and another Trainer begins again.
    """

    model: weakref.ref[nn.Module]
    trainer: weakref.ref[L.Trainer]
    count: Count

    @classmethod
    def now(cls, trainer: L.Trainer, model: nn.Module, since: Count) -> Had:
        """At this moment, where the Trainer had counted `since` when the model's own count was 0."""
        count = trainer.current_epoch - since[0], trainer.global_step - since[1]
        return cls(weakref.ref(model), weakref.ref(trainer), count)


def count_begins(trainer: L.Trainer, model: nn.Module, had: Had | None, anew: bool) -> Count:
    """The Trainer's epoch and step at which a model's own count is 0; negative where another has trained it before.

    Args:
        trainer: is about to fit the model.
        model: goes on counting if it is the one of the fit before, and its quantizers know something.
        had: what was left by the fit before.
        anew: whether the model is to start over.
    """
    epoch, step = trainer.current_epoch, trainer.global_step
    if anew or had is None or had.model() is not model:
        return epoch, step
    unlearned = [quantizer for quantizer in quantizers(model).values() if not quantizer.learned]
    on_the_way = any(quantizer.estimated or quantizer.saw_data() for quantizer in unlearned)
    # Of a model that has learned, a new layer begins; without one, only the Trainer of before goes on to freeze.
    if not on_the_way and (unlearned or had.trainer() is not trainer):
        return epoch, step
    return epoch - had.count[0], step - had.count[1]


def count_resumes(trainer: L.Trainer, given: PhaseSchedule | None, restored: Mapping[str, Any], begins: Count) -> Count:
    """`count_begins`, or what goes before it where a checkpoint is resumed."""
    if restored:
        epoch, step = restored.get("since", (0, 0))  # nothing was kept when every count began at 0
        return epoch, step
    of_a_float_run = trainer.ckpt_path is not None and given is not None
    return (0, 0) if of_a_float_run else begins  # whose epochs count
