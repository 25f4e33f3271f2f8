"""Quantization-aware training as a Lightning callback: it decides when, the other modules know how."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lfq_lightning.checkpoint import fit_to
from lfq_lightning.host import quantizers, set_compressed
from lfq_lightning.optimizer import (
    OptimizerFactory,
    QParamOptimizer,
    ScheduleFactory,
    default_optimizer,
    hidden_qparams,
)
from lfq_lightning.phases import (
    check_ranks_agree,
    estimate_weights,
    merge_statistics,
    model_phase,
    set_gathering,
    set_phase,
)
from lfq_lightning.placement import Placement, apply, plan
from lfq_lightning.recorder import Recorder
from lfq_lightning.schedule import PHASES, Phase, PhaseSchedule
from lfq_lightning.spec import QuantSpec, Rule, SpecLike, activation_spec, weight_spec
from lfq_lightning.wrapping import Wrappers


class QuantizationAwareTraining(L.Callback):
    """Trains any LightningModule with learned fake quantization of its weights and activations.

    Quantizers are attached before the optimizers are made. They observe, then estimate, then learn their scale and
    zero point by backpropagation (Esser et al. 2020, LSQ; Bhalgat et al. 2020, LSQ+), as the schedule says. Their
    parameters have an optimizer of their own. Scales, zero points and saturation go to `trajectory.csv` in the run's
    directory and to every logger, and `lfq/...` summaries through `self.log`.

    Args:
        weight: bits, a QuantSpec, or None (float) for weights. An int means symmetric per channel.
        activation: the same for the inputs of quantized layers. An int means affine per tensor.
        rules: exceptions by name or type; the first that matches a layer decides.
        schedule: when each phase starts; None derives one from the run's length and prints it.
        optimizer: makes the optimizer of scales and zero points from a list of parameters, for instance
            `functools.partial(torch.optim.Adam, lr=1e-3)`, which is the default. Its learning rate is relative: 1e-3
            with Adam moves a scale by about a thousandth of its size a step.
        lr_schedule: makes a learning-rate scheduler for that optimizer, stepped with it.
        reobserve: start over with observing where the model has learned scales already; otherwise a further fit goes
            on learning.
        compress_saved: keep what layers need for backward as 8-bit codes; gradients keep every bit. Eager only.
        record_every_n_steps: optimizer steps between two records; None takes the Trainer's `log_every_n_steps`, or less
            in a run so short that there would be fewer than 50.

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
        optimizer: OptimizerFactory | None = None,
        lr_schedule: ScheduleFactory | None = None,
        reobserve: bool = False,
        compress_saved: bool = False,
        record_every_n_steps: int | None = None,
    ) -> None:
        self.weight: SpecLike = weight if isinstance(weight, int) else weight_spec(weight)
        self.activation: SpecLike = activation if isinstance(activation, int) else activation_spec(activation)
        weight_spec(self.weight), activation_spec(self.activation)
        self.rules = tuple(Rule(**rule) if isinstance(rule, Mapping) else rule for rule in rules)
        self.schedule = PhaseSchedule(**schedule) if isinstance(schedule, Mapping) else schedule
        if self.schedule is not None and not isinstance(self.schedule, PhaseSchedule):
            raise TypeError(f"`schedule` must be a PhaseSchedule or None. Found {schedule!r}.")
        for name, value in (("optimizer", optimizer), ("lr_schedule", lr_schedule)):
            if value is not None and not callable(value):
                raise TypeError(f"`{name}` must be a callable that makes one, or None. Found {value!r}.")
        self.optimizer, self.lr_schedule = optimizer, lr_schedule
        self.reobserve = reobserve
        self.compress_saved = compress_saved
        self.record_every_n_steps = record_every_n_steps

        self._recorder = Recorder(record_every_n_steps)
        self.placement: Placement | None = None
        self.qparam_optimizer: QParamOptimizer | None = None
        self._schedule_in_force: PhaseSchedule | None = self.schedule
        self._restored: dict[str, Any] = {}
        self._wrappers = Wrappers()

    # ---- before the run -------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Attach, and see to it that layers made later, optimizers and checkpoints meet the quantizers in order."""
        self._check_run(trainer, stage)
        self._attach(pl_module, final=False)

        def configure_model(original: Any) -> None:
            original()
            self._attach(pl_module, final=True)

        def configure_optimizers(original: Any) -> Any:
            with hidden_qparams(pl_module):
                return original()

        def on_load_checkpoint(original: Any, checkpoint: dict[str, Any]) -> None:
            original(checkpoint)
            checkpoint["state_dict"] = fit_to(pl_module, checkpoint["state_dict"])

        self._wrappers.around(pl_module, "configure_model", configure_model)
        self._wrappers.around(pl_module, "configure_optimizers", configure_optimizers)
        self._wrappers.around(pl_module, "on_load_checkpoint", on_load_checkpoint)

    def _check_run(self, trainer: L.Trainer, stage: str) -> None:
        if stage == "fit" and self.schedule is not None and not _is_dev_run(trainer):
            epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else torch.inf
            self.schedule.check_reaches_learn(epochs, trainer.max_steps if trainer.max_steps != -1 else torch.inf)

    def _attach(self, pl_module: L.LightningModule, final: bool) -> None:
        self.placement = plan(pl_module, self.weight, self.activation, self.rules, final)
        apply(pl_module, self.placement)
        set_compressed(pl_module, self.compress_saved)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over from the user's optimizers what concerns qparams."""
        self._wrappers.remove()
        faces = pl_module.optimizers()
        self.qparam_optimizer = QParamOptimizer(
            pl_module,
            trainer.optimizers,
            self.optimizer or default_optimizer,
            self.lr_schedule,
            getattr(trainer.precision_plugin, "scaler", None),
            faces if isinstance(faces, list) else [faces],
        )
        if "qparam_optimizer" in self._restored:
            self.qparam_optimizer.load_state_dict(self._restored["qparam_optimizer"])
        elif self.reobserve:
            for quantizer in quantizers(pl_module).values():
                quantizer.forget()
        set_gathering(pl_module, False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Settle the schedule and where the trajectory goes, and enter the phase; a resumed epoch has no start."""
        epochs, steps = _length_of(trainer)
        self._settle_schedule(trainer, epochs, steps)
        self._recorder.open(trainer, steps, self._restored.get("recorder", {}))
        self._show_phase(trainer, pl_module)
        self._enter_phase(trainer, pl_module)
        self._restored = {}

    def _settle_schedule(self, trainer: L.Trainer, epochs: float, steps: float) -> None:
        if self.schedule is not None:
            if not _is_dev_run(trainer):
                self.schedule.check_reaches_learn(epochs, steps)
            self._schedule_in_force = self.schedule
        elif self._restored.get("schedule"):
            self._schedule_in_force = PhaseSchedule(**self._restored["schedule"])
        else:
            self._schedule_in_force = PhaseSchedule.for_run(epochs, steps)
            rank_zero_info(f"QuantizationAwareTraining derived {self._schedule_in_force} from the length of the run.")

    # ---- the run --------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Enter the epoch's phase."""
        self._enter_phase(trainer, pl_module)
        phase = PHASES.index(model_phase(pl_module))
        pl_module.log("lfq/phase", float(phase), on_step=False, on_epoch=True)
        if self.qparam_optimizer is not None and self.qparam_optimizer.optimizers:
            pl_module.log("lfq/lr", self.qparam_optimizer.learning_rates[0], on_step=False, on_epoch=True)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Gather statistics from this batch's forward passes, and measure them where a record is due."""
        self._enter_phase(trainer, pl_module)
        set_gathering(pl_module, True)
        self._recorder.before_batch(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Merge the batch's statistics over ranks, and record."""
        set_gathering(pl_module, False)
        self._merge(trainer, pl_module)
        for name, value in self._recorder.after_batch(trainer, pl_module).items():
            pl_module.log(name, value, on_step=True, on_epoch=False)

    def _merge(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        met = merge_statistics(pl_module, self._over_ranks(trainer) if trainer.world_size > 1 else None)
        for name, flag in met.items():
            if flag.device.type == "cpu":
                quantizers(pl_module)[name].warn_non_finite(flag, name)
        if self._phase(trainer) == "estimate":
            estimate_weights(pl_module)

    @staticmethod
    def _over_ranks(trainer: L.Trainer) -> Callable[[Tensor], Tensor]:
        return lambda flat: trainer.strategy.reduce(flat, reduce_op="max")

    def _phase(self, trainer: L.Trainer) -> Phase:
        assert self._schedule_in_force is not None
        return self._schedule_in_force.phase(trainer.current_epoch, trainer.global_step)

    def _enter_phase(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        first = next(iter(quantizers(pl_module).values()), None)
        if first is None:
            return
        phase, before = self._phase(trainer), first.phase
        if first.learned and phase in ("off", "observe", "estimate"):
            phase = "learn"
        if phase in ("learn", "freeze") and _is_dev_run(trainer):
            phase = "off"
        if phase == before:
            return
        set_phase(pl_module, phase)
        if trainer.world_size > 1:
            check_ranks_agree(pl_module, self._over_ranks(trainer))
        rank_zero_info(
            f"Epoch {trainer.current_epoch}, step {trainer.global_step}: quantizers go from {before} to {phase}."
        )

    def _show_phase(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def get_metrics(original: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return {**original(*args, **kwargs), "phase": model_phase(pl_module)}

        if trainer.progress_bar_callback is not None:
            self._wrappers.around(trainer.progress_bar_callback, "get_metrics", get_metrics)

    # ---- after the run --------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if the run ended before anything was learned."""
        phase = model_phase(pl_module)
        if quantizers(pl_module) and phase not in ("learn", "freeze") and not _is_dev_run(trainer):
            rank_zero_warn(f"The run ended in phase {phase!r}: scales and zero points were not learned.")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave nothing behind but the quantizers."""
        self._let_go(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the model usable."""
        self._let_go(pl_module)

    def _let_go(self, pl_module: L.LightningModule) -> None:
        self._recorder.close()
        self._wrappers.remove()
        set_gathering(pl_module, None)
        if self.qparam_optimizer is not None:
            self.qparam_optimizer.remove()

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The schedule in force, the qparams' optimizer, and where the trajectory is; plain values and tensors."""
        state: dict[str, Any] = {"recorder": self._recorder.state_dict()}
        if self._schedule_in_force is not None:
            state["schedule"] = self._schedule_in_force.to_dict()
        if self.qparam_optimizer is not None:
            state["qparam_optimizer"] = self.qparam_optimizer.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until the fit has made what it belongs to."""
        self._restored = dict(state_dict)

    def __repr__(self) -> str:
        given = {"weight": self.weight, "activation": self.activation, "rules": self.rules, "schedule": self.schedule}
        return f"QuantizationAwareTraining({', '.join(f'{k}={v!r}' for k, v in given.items())})"


def _is_dev_run(trainer: L.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _length_of(trainer: L.Trainer) -> tuple[float, float]:
    """Epochs and optimizer steps that the run will have; infinite where it cannot be known."""
    epochs = torch.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs)
    steps = float(trainer.estimated_stepping_batches)
    if steps < 0 or steps == torch.inf:
        return epochs, torch.inf
    in_an_epoch = max(1.0, float(trainer.num_training_batches) / trainer.accumulate_grad_batches)
    return min(epochs, steps / in_an_epoch), steps * max(1, len(trainer.optimizers))
