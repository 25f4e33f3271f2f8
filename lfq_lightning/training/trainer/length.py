"""How long a Trainer's run will be, what of it a model has had before, and the schedule that fits."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from torch import nn

from lfq_lightning.placement.host import quantizers
from lfq_lightning.schedule import PhaseSchedule
from lfq_lightning.telling import tell

Count = tuple[int, int]  # epochs and optimizer steps


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


class ModelSchedule:
    """The schedule of one model after another, and where each model's own count begins in the Trainer's.

    A Trainer counts on through all its fits, whichever model it fits, and another Trainer begins again.

    Attributes:
        in_force: the schedule of the present run, in the Trainer's epochs or steps; None before there is one.
        since: the Trainer's epoch and step at which the model's count was 0; negative where another Trainer has trained
            the model before.
    """

    def __init__(self, given: PhaseSchedule | None) -> None:
        self.in_force = given
        self.since: Count = (0, 0)
        self._had: Count = (0, 0)
        self._model: Callable[[], nn.Module | None] = _nothing
        self._trainer: Callable[[], L.Trainer | None] = _nothing

    def check(self, trainer: L.Trainer, model: nn.Module, given: PhaseSchedule | None, anew: bool) -> None:
        """Refuse a schedule that the Trainer's limits end before it learns, where it is to fit the model.

        Args:
            trainer: its run begins.
            model: goes on counting if it is the one of the fit before, and its quantizers know something.
            given: the user's schedule, in the model's own epochs or steps.
            anew: whether the model is to start over.
        """
        if trainer.state.fn == "fit":
            self.since = self._begins(trainer, model, anew)
            if anew or not has_learned(model):
                check_configured_length(trainer, given, self.since)

    def settle(
        self,
        trainer: L.Trainer,
        model: nn.Module,
        given: PhaseSchedule | None,
        anew: bool,
        restored: Mapping[str, Any],
    ) -> tuple[PhaseSchedule, float]:
        """Put a schedule in force as training starts, and say how many steps the model will have had at the end.

        Args:
            trainer: fits the model.
            model: the model.
            given: the user's schedule.
            anew: whether the model is to start over.
            restored: the callback's state in the checkpoint that the fit resumes from; empty without one.
        """
        self.since = self._begins(trainer, model, anew)
        if trainer.ckpt_path is not None and given is not None:
            self.since = 0, 0  # of a float run that is resumed, its epochs count
        if restored:
            epoch, step = restored.get("since", (0, 0))  # nothing was kept when every count began at 0
            self.since = epoch, step
        self.in_force, steps = settle_schedule(trainer, model, given, restored.get("schedule"), self.since)
        return self.in_force, steps

    def end(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Remember what the model has had, when a fit ends."""
        if trainer.state.fn == "fit" and not is_dev_run(trainer):
            self._model, self._trainer = weakref.ref(model), weakref.ref(trainer)
            self._had = (trainer.current_epoch - self.since[0], trainer.global_step - self.since[1])

    def state_dict(self) -> dict[str, Any]:
        """The schedule in force, if there is one, and where the model's count begins; plain values."""
        schedule = {} if self.in_force is None else {"schedule": self.in_force.to_dict()}
        return {**schedule, "since": list(self.since)}

    def _begins(self, trainer: L.Trainer, model: nn.Module, anew: bool) -> Count:
        epoch, step = trainer.current_epoch, trainer.global_step
        if anew or self._model() is not model:
            return epoch, step
        unlearned = [quantizer for quantizer in quantizers(model).values() if not quantizer.learned]
        on_the_way = any(quantizer.estimated or quantizer.saw_data() for quantizer in unlearned)
        # Of a model that has learned, a new layer begins; without one, only the Trainer of before goes on to freeze.
        if not on_the_way and (unlearned or self._trainer() is not trainer):
            return epoch, step
        return epoch - self._had[0], step - self._had[1]


def _nothing() -> None:
    return None
