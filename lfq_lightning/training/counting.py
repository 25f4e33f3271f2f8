"""When a model's phases begin: by what this model has had, in the counts of the Trainer that fits it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from torch import nn

from lfq_lightning.placement.host import quantizers
from lfq_lightning.schedule import PhaseSchedule
from lfq_lightning.training.run_length import check_configured_length, has_learned, is_dev_run, settle_schedule

Count = tuple[int, int]  # epochs and optimizer steps


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
