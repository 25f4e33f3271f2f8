"""One run: what exists from a Trainer's `setup` to its `teardown`, and what meets each batch in between."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import lightning as L

from lfq_lightning.export.parity import Parity
from lfq_lightning.flow.graph import Flow
from lfq_lightning.gathering import set_gathering
from lfq_lightning.placement import Placement
from lfq_lightning.placement.points import Points, points
from lfq_lightning.placement.quantized_layer import FrozenLayers, qparams, quantizers
from lfq_lightning.records.recorder import Recorder
from lfq_lightning.schedule import PhaseSchedule
from lfq_lightning.training.exporting import FitExport
from lfq_lightning.training.last_statistics import LastStatistics, Statistics, last_statistics
from lfq_lightning.training.phases import (
    RunPhases,
    begin,
    learn_alone,
    settle_frozen_layers,
    show_phase,
    warn_if_unlearned,
)
from lfq_lightning.training.sentinel import Reaction, Sentinel
from lfq_lightning.training.stepping.qparams import ScheduleFactory
from lfq_lightning.training.stepping.steps import Choice, Steps, arranged_qparams
from lfq_lightning.training.still import Still
from lfq_lightning.training.trainer.example import NoFlow, find_flow, tell_when_met
from lfq_lightning.training.trainer.length import (
    Count,
    Had,
    check_configured_length,
    count_begins,
    count_resumes,
    has_learned,
    is_dev_run,
    learning_left,
    settle_schedule,
)
from lfq_lightning.training.trainer.module import complete_gradients, meet_quantizers, note_on_checkpoints
from lfq_lightning.training.trainer.neighbours import arrange
from lfq_lightning.training.trainer.resuming import open_epoch
from lfq_lightning.training.trainer.strategy import load_quantizers_whole
from lfq_lightning.training.wrapping import Wrappers

Learn = Literal["all", "scales"]


class Training:
    """What meets the batches of a fit: the phases, the record with its sentinel, and the batch that is kept to export.

    Args:
        found: the model's points, which neither come nor go while it trains.
        schedule: in force, in the Trainer's epochs or steps.
        steps: what steps.
        recorder: of this run.
        sentinel: looks at what is recorded.
        export: keeps a batch.
        still: what is not to move, or None.
        statistics: what estimates BatchNorm's anew after the last step, or None.
    """

    def __init__(
        self,
        found: Points,
        schedule: PhaseSchedule,
        steps: Steps,
        recorder: Recorder,
        sentinel: Sentinel,
        export: FitExport,
        still: Still | None,
        statistics: LastStatistics | None,
    ) -> None:
        self.phases, self._steps, self._statistics = RunPhases(found, schedule), steps, statistics
        self._recorder, self._sentinel, self._export, self._still = recorder, sentinel, export, still

    def before_batch(self, trainer: L.Trainer, model: L.LightningModule, batch: Any) -> None:
        """Enter the step's phase; gather what the batch shows, and measure it where a record is due."""
        open_epoch(trainer)
        if self._still is not None:
            self._still.before_batch(model)
        if self._statistics is not None:
            self._statistics.before_batch(trainer, model, batch)
        self._steps.begin_batch()
        self.phases.enter(trainer, model)
        self._export.see(model, batch)
        self.phases.before_batch()
        self._recorder.before_batch(trainer, model, self._steps.qparams)

    def after_batch(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Merge over ranks what the batch showed, and record; who begins anew is new to its optimizer."""
        self.phases.after_batch(trainer, model)
        self._steps.forget(self.phases.follow_blank())
        self._steps.forget(self._sentinel.watch(trainer, model, *self._recorder.after_batch(trainer, model)))
        if self._statistics is not None:
            self._statistics.after_batch(trainer, model)

    def after_epoch(self, trainer: L.Trainer) -> None:
        """Keep the scales and zero points of every channel, and say so if nothing moves them."""
        self._recorder.after_epoch(trainer)
        self.phases.warn_if_still(trainer, self._steps.unseen)

    def after_steps(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Estimate BatchNorm's statistics where the last step was not foreseen, and say if nothing was learned."""
        if self._statistics is not None:
            self._statistics.settle(trainer, model)
        warn_if_unlearned(trainer, model)

    def after_fit(self, trainer: L.Trainer) -> None:
        """Show what was recorded."""
        self._recorder.after_fit(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What record and sentinel know, and the schedule in force; plain values."""
        schedule = self.phases.schedule.to_dict()
        return {"recorder": self._recorder.state_dict(), "sentinel": self._sentinel.state_dict(), "schedule": schedule}


class Run:
    """One call of a Trainer's `fit`, `validate`, `test` or `predict`: born in `setup`, over once `end` was called.

    Checkpoints may be saved until the next one is born, and a run that trains nothing saves what the run before it
    knows. All that it puts on other objects is taken off by `end`, whatever has happened.

    Args:
        trainer: at `setup`.
        model: the module.
        schedule: the user's, in the model's own epochs or steps.
        anew: whether the model is to start over.
        learn: what does.
        export: what is written when a fit ends.
        before: the run before, which is over.

    Attributes:
        since: the Trainer's epoch and step at which the model's own count was 0.
        steps: what steps, from `start` on.
        training: what meets batches, from `train` on.
        restored: what a checkpoint holds of the run that is resumed, until it is taken up.

    Raises:
        ValueError: if the Trainer's limits end a fit before the schedule learns.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        model: L.LightningModule,
        schedule: PhaseSchedule | None,
        anew: bool,
        learn: Learn,
        export: FitExport,
        before: Run | None,
    ) -> None:
        self._trainer = trainer
        self._flow: tuple[Flow | None, str] | None = None
        self._flow_of: set[str] = set()
        self._schedule, self._anew, self._export = schedule, anew, export
        self._had: Had | None = None
        self.since: Count = (0, 0)
        self.steps, self.restored = Steps(), dict[str, Any]()
        self.training: Training | None = None
        if before is not None:
            before.end()
            self._had, self.since = before._had, before.since
            self.steps, self.training = before.steps, before.training
        self._ending = ExitStack()
        if trainer.state.fn == "fit":
            self.since, self.steps = count_begins(trainer, model, self._had, anew), Steps()
            if anew or not has_learned(model):
                check_configured_length(trainer, schedule, self.since)
            self._ending.callback(self._remember, trainer, model)
        self._still = Still() if learn == "scales" and trainer.state.fn == "fit" else None
        if self._still is not None:
            self._ending.callback(self._still.give_back)
        self._until_fit, self._until_end = Wrappers(), Wrappers()
        self._ending.callback(self._until_end.remove)
        self._ending.callback(self._until_fit.remove)

    def _remember(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        if not is_dev_run(trainer):
            self._had = Had.now(trainer, model, self.since)

    def arrange(
        self, trainer: L.Trainer, model: L.LightningModule, attach: Callable[[bool], None], optimizer: Choice
    ) -> None:
        """Attach, and have the module's hooks, other callbacks, loggers and the strategy meet quantizers in order.

        Args:
            trainer: whose neighbours are met.
            model: the module.
            attach: see `meet_quantizers`.
            optimizer: whose optimizer the qparams will be in.
        """
        meet_quantizers(self._until_fit, model, attach, partial(arranged_qparams, model, optimizer))
        if self._still is not None:
            self._until_fit.within(model, "configure_optimizers", self._still.let_go)
        arrange(self._until_end, trainer, model)
        note_on_checkpoints(self._until_end, model)
        load_quantizers_whole(self._until_end, trainer, model)

    @property
    def fits(self) -> bool:
        """Whether the model is trained."""
        return self._trainer.state.fn == "fit"

    def flow(self, model: L.LightningModule, example: Any, final: bool) -> tuple[Flow | None, str]:
        """What the model does with a batch, or None and the reason; sought anew once the model has other parameters.

        Args:
            model: the module.
            example: the user's, None to look for one, or False.
            final: whether all layers are made.
        """
        if example is False:
            return None, ""
        present = {name for name, parameter in model.named_parameters() if parameter not in set(qparams(model))}
        if self._flow is None or self._flow_of != present:
            self._flow_of = present
            try:
                self._flow = find_flow(self._trainer, model, example, self._until_fit, final), ""
            except NoFlow as reason:
                self._flow = None, str(reason)
        flow = self._flow
        if flow[0] is None and not final:
            self._flow = None  # there is another chance
        return flow

    def agreed(self, placement: Placement) -> Placement:
        """The placement of rank zero: an example that was drawn at random may differ from rank to rank."""
        made: Placement = self._trainer.strategy.broadcast(placement)
        return made

    def hold_still(self, model: L.LightningModule) -> None:
        """Take the gradients of all that is not to learn, once all layers are made and quantized."""
        if self._still is not None:
            self._still.hold(model)

    def start(
        self,
        trainer: L.Trainer,
        model: L.LightningModule,
        optimizer: Choice,
        lr_schedule: ScheduleFactory | None,
        frozen_layers: FrozenLayers,
    ) -> None:
        """Refuse what could not be exported; step with the user's optimizers from now on; have quantizers begin."""
        self._export.begin(trainer, model)
        self._until_fit.remove()
        self._ending.callback(lambda: set_gathering(quantizers(model).values(), None))
        self._ending.callback(self.steps.remove)
        complete_gradients(self._until_end, model, optimizer != "user")
        self.steps.follow(trainer, model, optimizer, lr_schedule, alone=self._still is not None)
        if self._still is None:
            settle_frozen_layers(model, trainer.optimizers, frozen_layers)
        else:
            learn_alone(model)
        begin(model, anew=not self.steps.take_up(self.restored) and self._anew)

    def watch_for_absent(self, model: L.LightningModule, placement: Placement | None) -> None:
        """Say so where a layer runs that had no part in the batch by which the model was quantized."""
        for handle in tell_when_met(model, placement):
            self._ending.callback(handle.remove)

    def train(
        self,
        trainer: L.Trainer,
        model: L.LightningModule,
        every: int | None,
        write_files: bool,
        on_collapse: Reaction,
        batch_norm: Statistics,
    ) -> None:
        """Take up a checkpoint, settle the schedule and where the record goes, and enter the phase."""
        self.steps.take_up(self.restored)  # strategies that shard restore it after `start`
        begins = count_begins(trainer, model, self._had, self._anew)
        self.since = count_resumes(trainer, self._schedule, self.restored, begins)
        before = self.restored.get("schedule")
        schedule, length = settle_schedule(trainer, model, self._schedule, before, self.since)
        self.steps.fall(*learning_left(trainer, schedule))
        found = points(model)
        recorder = Recorder(trainer, found, every, write_files, length, self.restored.get("recorder", {}))
        self._ending.callback(recorder.close)
        sentinel = Sentinel(on_collapse, self.restored.get("sentinel"))
        statistics = last_statistics(trainer, model, batch_norm, found, length)
        self.training = Training(found, schedule, self.steps, recorder, sentinel, self._export, self._still, statistics)
        show_phase(self._until_end, trainer, self.training.phases)
        self.training.phases.enter(trainer, model)

    def finish(self, trainer: L.Trainer, model: L.LightningModule) -> Parity | None:
        """Show what was recorded, and export; every rank calls this, also after a fit that had nothing left to do."""
        if self.training is not None:
            self.training.after_fit(trainer)
        return self._export.end(trainer, model)

    def end(self) -> None:
        """Leave nothing behind but the quantizers; what the run knows stays for a checkpoint."""
        self._ending.close()

    def state_dict(self) -> dict[str, Any]:
        """What a run that is resumed takes up; plain values and tensors."""
        training = {} if self.training is None else self.training.state_dict()
        return {**training, "since": list(self.since), **self.steps.state_dict()}
