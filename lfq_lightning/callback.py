"""Quantization-aware training as a Lightning callback: it decides when, the other modules know how."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
from torch.optim import Optimizer

from lfq_lightning.checking import check_choice, check_flags, check_path
from lfq_lightning.export.parity import Parity
from lfq_lightning.gathering import set_gathering
from lfq_lightning.placement import Placement, apply, plan, quantizers
from lfq_lightning.placement.host import FrozenLayers
from lfq_lightning.placement.points import points
from lfq_lightning.records.recorder import Recorder
from lfq_lightning.rules import Rule, as_rules
from lfq_lightning.schedule import PhaseSchedule
from lfq_lightning.spec import QuantSpec, SpecLike, activation_spec, as_schedule, weight_spec
from lfq_lightning.training.exporting import FitExport
from lfq_lightning.training.phases import (
    RunPhases,
    begin,
    settle_frozen_layers,
    show_phase,
    warn_if_float,
    warn_if_still,
    warn_if_unlearned,
)
from lfq_lightning.training.sentinel import Reaction, Sentinel
from lfq_lightning.training.stepping.qparams import OptimizerFactory, QParamOptimizer, ScheduleFactory
from lfq_lightning.training.stepping.users import UserOptimizers, arranged_qparams, check_makers, make_optimizer
from lfq_lightning.training.stepping.weights import WeightSteps
from lfq_lightning.training.trainer.length import ModelSchedule
from lfq_lightning.training.trainer.module import add_note, meet_quantizers, note_on_checkpoints
from lfq_lightning.training.trainer.neighbours import arrange, check_neighbours, require_gradients
from lfq_lightning.training.trainer.resuming import explain_torn_checkpoint, open_epoch, take_up
from lfq_lightning.training.trainer.strategy import load_quantizers_whole
from lfq_lightning.training.wrapping import AtRest, Wrappers


class QuantizationAwareTraining(AtRest):
    """Trains any LightningModule with learned fake quantization of its weights and activations.

    Quantizers are attached before the optimizers are made. They observe, then estimate, then learn their scale and
    zero point by backpropagation (Esser et al. 2020, LSQ; Bhalgat et al. 2020, LSQ+), as the schedule says. Their
    parameters have an optimizer of their own. Scales, zero points and saturation go to `trajectory.csv` in the run's
    directory and to every logger, those of every channel at each epoch to `qparams.npz`, and `lfq/...` summaries
    through `self.log`.

    Args:
        weight: bits, a QuantSpec, or None (float) for weights. An int means symmetric per channel.
        activation: the same for the inputs of quantized layers. An int means affine per tensor.
        rules: exceptions by name or type; the first that matches a layer decides.
        schedule: when each phase starts; None derives one from the run's length and prints it.
        optimizer: makes the optimizer of scales and zero points from a list of parameters, for instance
            `functools.partial(torch.optim.Adam, lr=1e-3)`, which is the default. Its learning rate is relative: 1e-3
            with Adam moves a scale by about a thousandth of its size a step. "user" puts them into the optimizers of
            `configure_optimizers` instead, each with its layer's weight, in a last group without weight decay.
        lr_schedule: makes a learning-rate scheduler for that optimizer, stepped with it; None keeps its rate in
            proportion to that of the weights' optimizer.
        reobserve: start over where the model has learned scales already, which otherwise go on learning.
        compress_saved: make quantized tensors again in backward instead of keeping them, bit for bit; eager only.
        frozen_layers: whether scales and zero points of layers with a frozen weight "keep" still, or "learn" alone.
        record_every_n_steps: optimizer steps between two records; None takes `log_every_n_steps`, less in a short run.
        write_files: False leaves records to the loggers; a run without a directory of its own writes none either.
        on_collapse: what happens to a quantizer that passes nothing useful any more: "warn" names it once, "reinit"
            also estimates its qparams anew, "raise" ends the run; "reinit" only names one with most codes unused.
        export: write the best checkpoint, or the last, to this ONNX file when a fit ends, and compare the two: see
            `parity`. A relative path is taken from the Trainer's log directory.

    Raises:
        TypeError, ValueError: if an argument is wrong, here or when a fit begins.

    Example:
        >>> import lightning as L, lfq_lightning as lfq
        >>> trainer = L.Trainer(callbacks=[lfq.QuantizationAwareTraining(weight=4, activation=4)], logger=False)
    """

    def __init__(
        self,
        weight: int | QuantSpec | None = 8,
        activation: int | QuantSpec | None = 8,
        rules: Iterable[Rule] = (),
        schedule: PhaseSchedule | None = None,
        optimizer: Literal["user"] | OptimizerFactory | None = None,
        lr_schedule: ScheduleFactory | None = None,
        reobserve: bool = False,
        compress_saved: bool = False,
        frozen_layers: FrozenLayers = "keep",
        record_every_n_steps: int | None = None,
        write_files: bool = True,
        on_collapse: Reaction = "warn",
        export: str | Path | None = None,
    ) -> None:
        check_flags(reobserve=reobserve, compress_saved=compress_saved, write_files=write_files)
        check_choice("frozen_layers", frozen_layers, get_args(FrozenLayers))
        check_path("export", export, needed=False)
        self.weight: SpecLike = weight if isinstance(weight, int) else weight_spec(weight)
        self.activation: SpecLike = activation if isinstance(activation, int) else activation_spec(activation)
        weight_spec(self.weight), activation_spec(self.activation)
        self.rules, self.schedule = as_rules(rules), as_schedule(schedule)
        check_makers(optimizer, lr_schedule)
        self.optimizer, self.lr_schedule = optimizer, lr_schedule
        self.reobserve, self.compress_saved, self.frozen_layers = reobserve, compress_saved, frozen_layers
        self.record_every_n_steps, self.write_files = record_every_n_steps, write_files
        self.on_collapse, self.export = on_collapse, export
        self.placement: Placement | None = None
        self.parity: Parity | None = None
        self._rest()

    def _rest(self) -> None:
        self._recorder = Recorder(self.record_every_n_steps, self.write_files)
        self._sentinel, self._export = Sentinel(self.on_collapse), FitExport(self.export)
        self._weight_steps, self.model_schedule = WeightSteps(), ModelSchedule(self.schedule)
        self.qparam_optimizer: QParamOptimizer | UserOptimizers | None = None
        self._phases = RunPhases({}, PhaseSchedule())  # of nothing, until training starts
        self._restored: dict[str, Any] = {}
        self._wrappers, self._arranged = Wrappers(), Wrappers()  # until training starts, and until the run ends

    # ---- before the run ---------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Attach, and see to it that layers made later, optimizers and checkpoints meet the quantizers in order."""
        self._restored = {}  # a stage that does not train takes nothing up, and leaves it
        check_neighbours(trainer, self)
        self.model_schedule.check(trainer, pl_module, self.schedule, self.reobserve)
        attach = partial(self._attach, pl_module)
        meet_quantizers(self._wrappers, pl_module, attach, partial(arranged_qparams, pl_module, self.optimizer))
        arrange(self._arranged, trainer, pl_module)
        note_on_checkpoints(self._arranged, pl_module)
        load_quantizers_whole(self._arranged, trainer, pl_module)

    def _attach(self, pl_module: L.LightningModule, final: bool) -> None:
        self.placement = plan(pl_module, self.weight, self.activation, self.rules, final)
        apply(pl_module, self.placement, self.compress_saved)
        require_gradients(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over from the user's optimizers what concerns qparams; refuse what could not be exported."""
        self._export.begin(trainer, pl_module)
        self._wrappers.remove()
        self.qparam_optimizer = make_optimizer(self._arranged, trainer, pl_module, self.optimizer, self.lr_schedule)
        self._weight_steps.follow(pl_module, trainer.optimizers)
        settle_frozen_layers(pl_module, trainer.optimizers, self.frozen_layers)
        begin(pl_module, anew=not take_up(self.qparam_optimizer, self._restored) and self.reobserve)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up a checkpoint, settle the schedule and where the trajectory goes, and enter the phase."""
        take_up(self.qparam_optimizer, self._restored)  # strategies that shard restore it after `on_fit_start`
        before, given = self._restored, self.schedule
        schedule, steps = self.model_schedule.settle(trainer, pl_module, given, self.reobserve, before)
        found = points(pl_module)  # nothing comes or goes while it trains
        self._recorder.open(trainer, found, steps, before.get("recorder", {}))
        self._sentinel.load_state_dict(before.get("sentinel", {}))
        self._phases = RunPhases(found, schedule)
        show_phase(self._arranged, trainer, self._phases)
        self._phases.enter(trainer, pl_module)

    # ---- the run --------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Enter the epoch's phase."""
        self._phases.enter(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Gather statistics from this batch's forward passes, and measure them where a record is due."""
        open_epoch(trainer)
        self._weight_steps.forget()
        self._phases.enter(trainer, pl_module)
        self._export.see(pl_module, batch)
        self._phases.before_batch()
        self._recorder.before_batch(trainer, pl_module, self.qparam_optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Merge the batch's statistics over ranks, and record."""
        assert self.qparam_optimizer is not None
        self._phases.after_batch(trainer, pl_module)
        begun_anew = self._phases.follow_blank()
        begun_anew += self._sentinel.watch(trainer, pl_module, *self._recorder.after_batch(trainer, pl_module))
        for quantizer in begun_anew:
            self.qparam_optimizer.forget(quantizer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the scales and zero points of every channel, and say so if nothing moves them."""
        self._recorder.after_epoch(trainer)
        warn_if_still(trainer, self._phases, self.qparam_optimizer)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Let no user's optimizer move qparams outside `learn`, and note where it moves weights of few bits from."""
        if isinstance(self.qparam_optimizer, UserOptimizers):
            self.qparam_optimizer.prepare()
        self._weight_steps.remember(optimizer)

    # ---- after the run ----------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if the run ended before anything was learned."""
        warn_if_unlearned(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show what was recorded, and export, on rank zero."""
        self._recorder.after_fit(trainer)
        self.parity = self._export.end(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so where the numbers that follow are those of the float model."""
        warn_if_float(trainer, pl_module)

    on_validation_start = on_predict_start = on_test_start

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave nothing behind but the quantizers."""
        self._let_go(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the model usable."""
        explain_torn_checkpoint(trainer, exception)
        self._let_go(trainer, pl_module)

    def _let_go(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.model_schedule.end(trainer, pl_module)
        self._recorder.close()
        for attached in (self._wrappers, self._arranged, self._weight_steps, self.qparam_optimizer):
            if attached is not None:
                attached.remove()
        set_gathering(quantizers(pl_module).values(), None)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    @wraps(L.Callback.state_dict, assigned=())  # Lightning then leaves it to us to refuse two, with the remedy
    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The schedule in force, the qparams' optimizer, what records and sentinel know; plain values and tensors."""
        state: dict[str, Any] = {"recorder": self._recorder.state_dict(), "sentinel": self._sentinel.state_dict()}
        state |= self.model_schedule.state_dict()
        if self.qparam_optimizer is not None:
            state["qparam_optimizer"] = self.qparam_optimizer.state_dict()
        return state

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tell whoever loads it into a float model what to do."""
        add_note(checkpoint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until the fit has made what it belongs to."""
        self._restored = dict(state_dict)

    def __repr__(self) -> str:
        given = {"weight": self.weight, "activation": self.activation, "rules": self.rules, "schedule": self.schedule}
        return f"QuantizationAwareTraining({', '.join(f'{k}={v!r}' for k, v in given.items())})"
