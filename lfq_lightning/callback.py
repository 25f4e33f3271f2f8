"""Quantization-aware training as a Lightning callback: it decides when, the other modules know how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
from torch.optim import Optimizer

from lfq_lightning.checking import check_choice, check_flags, check_whole
from lfq_lightning.export.parity import Parity
from lfq_lightning.placement import Placement, apply, plan
from lfq_lightning.placement.quantized_layer import FrozenLayers
from lfq_lightning.rules import Rule, as_rules
from lfq_lightning.schedule import PhaseSchedule
from lfq_lightning.spec import QuantSpec, SpecLike, activation_spec, as_schedule, weight_spec
from lfq_lightning.targets import target_of
from lfq_lightning.training.exporting import FitExport, check_export
from lfq_lightning.training.last_statistics import Statistics
from lfq_lightning.training.phases import warn_if_float
from lfq_lightning.training.run import Learn, Run, Training
from lfq_lightning.training.sentinel import Reaction
from lfq_lightning.training.stepping.qparams import OptimizerFactory, QParamOptimizer, ScheduleFactory
from lfq_lightning.training.stepping.steps import check_makers
from lfq_lightning.training.stepping.users import UserOptimizers
from lfq_lightning.training.trainer.example import tell_account
from lfq_lightning.training.trainer.length import Count
from lfq_lightning.training.trainer.module import add_note, as_placed
from lfq_lightning.training.trainer.neighbours import check_neighbours, require_gradients
from lfq_lightning.training.trainer.resuming import explain_torn_checkpoint
from lfq_lightning.training.wrapping import AtRest


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
        learn: what does, "all" that the module trains, or "scales" and zero points alone: every weight and bias and
            BatchNorm's statistics keep still, whatever the module's optimizer holds. A pretrained network in 8 bits
            often needs no more, in few steps, and no learning rate of weights; distill it where there are no labels.
        batch_norm: BatchNorm's running statistics: "reestimate" estimates them anew after the last step, before its
            validation and checkpoints, from training batches that `forward` is run on, as many as a tenth of the run's
            steps, and 20 to 100; "keep" leaves them; "auto" is "reestimate" where a weight has fewer than 4 bits, whose
            oscillation leaves statistics behind that may fit no batch (Nagel et al. 2022, arXiv 2203.11086), and no
            `BatchNormStatistics` is among the callbacks.
        optimizer: makes the optimizer of scales and zero points from a list of parameters, for instance
            `functools.partial(torch.optim.Adam, lr=1e-3)`, which is the default. Its learning rate is relative: 1e-3
            with Adam moves a scale by about a thousandth of its size a step; with `learn="scales"` the default is
            3e-4. "user" puts them into the optimizers of `configure_optimizers` instead, each with its layer's weight,
            in a last group without weight decay.
        lr_schedule: makes a learning-rate scheduler for that optimizer, stepped with it; None keeps its rate in
            proportion to that of the weights' optimizer. With `learn="scales"` and no scheduler of the module's it
            falls to zero as a cosine by the end of the fit.
        reobserve: start over where the model has learned scales already, which otherwise go on learning.
        compress_saved: make quantized tensors again in backward instead of keeping them, bit for bit; eager only.
        frozen_layers: whether scales and zero points of layers with a frozen weight "keep" still, or "learn" alone.
        example: inputs of `forward`, to see what the model does with them: one, a tuple of positional ones, a mapping
            of keywords, or a batch. None takes the first training batch, which is run through `training_step` without
            computing anything, or else the module's `example_input_array`; False looks at none, and quantizes layers
            of known types alone.
        target: the runtime that the network is trained for, such as "onnxruntime", or several; see `attach`.
        record_every_n_steps: optimizer steps between two records; None takes `log_every_n_steps`, less in a short run.
        write_files: False leaves records to the loggers; a run without a directory of its own writes none either.
        on_collapse: what happens to a quantizer that passes nothing useful any more: "warn" names it once, "reinit"
            also estimates its qparams anew, "raise" ends the run; "reinit" only names one with most codes unused.
        export: write the best checkpoint, or the last, to this ONNX file when a fit ends, and compare the two: see
            `parity`. A relative path is taken from the Trainer's log directory. A mapping holds `path` and other
            arguments of `export_onnx`, such as `dynamic_axes` or `tolerance`; with a `target`, `optimize_for` is
            "speed" unless it says otherwise. A path that ends in `.pt2` is a program as `export_pt2` writes it, for
            the `target` if that takes programs. What fails then is a warning, and the fit has ended well, unless
            `on_mismatch` is "raise" there.

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
        learn: Learn = "all",
        batch_norm: Statistics = "auto",
        optimizer: Literal["user"] | OptimizerFactory | None = None,
        lr_schedule: ScheduleFactory | None = None,
        reobserve: bool = False,
        compress_saved: bool = False,
        frozen_layers: FrozenLayers = "keep",
        example: Any = None,
        target: str | Sequence[str] | None = None,
        record_every_n_steps: int | None = None,
        write_files: bool = True,
        on_collapse: Reaction = "warn",
        export: str | Path | dict[str, Any] | None = None,
    ) -> None:
        check_flags(reobserve=reobserve, compress_saved=compress_saved, write_files=write_files)
        check_choice("learn", learn, get_args(Learn))
        check_choice("batch_norm", batch_norm, get_args(Statistics))
        check_choice("frozen_layers", frozen_layers, get_args(FrozenLayers))
        check_export(export, target)
        if target_of(target) is not None and example is False:
            raise ValueError(
                f"`target` must know the operations of a batch. Found {target!r} with example=False: leave one out."
            )
        check_choice("on_collapse", on_collapse, get_args(Reaction))
        if record_every_n_steps is not None:
            check_whole("record_every_n_steps", record_every_n_steps, 1)
        self.weight: SpecLike = weight if isinstance(weight, int) else weight_spec(weight)
        self.activation: SpecLike = activation if isinstance(activation, int) else activation_spec(activation)
        weight_spec(self.weight), activation_spec(self.activation)
        self.rules, self.schedule = as_rules(rules), as_schedule(schedule)
        check_makers(optimizer, lr_schedule)
        self.learn, self.batch_norm = learn, batch_norm
        self.optimizer, self.lr_schedule = optimizer, lr_schedule
        self.reobserve, self.compress_saved, self.frozen_layers = reobserve, compress_saved, frozen_layers
        self.example, self.target = example, target
        self.record_every_n_steps, self.write_files = record_every_n_steps, write_files
        self.on_collapse, self.export = on_collapse, export
        self.placement: Placement | None = None
        self.parity: Parity | None = None
        self._rest()

    def _rest(self) -> None:
        self._run: Run | None = None

    @property
    def qparam_optimizer(self) -> QParamOptimizer | UserOptimizers | None:
        """What steps scales and zero points, in the present fit or the last; None before one has optimizers."""
        return None if self._run is None else self._run.steps.qparams

    @property
    def since(self) -> Count:
        """The Trainer's epoch and optimizer step at which the model's own count was 0: it goes on through all fits."""
        return (0, 0) if self._run is None else self._run.since

    @property
    def _in_run(self) -> Run:
        if self._run is None:
            raise RuntimeError("Hooks are for a Trainer to call, `setup` first. Found another before it: use `fit`.")
        return self._run

    @property
    def _training(self) -> Training:
        if self._in_run.training is None:
            raise RuntimeError("A Trainer calls `on_train_start` before batches. Found a batch before it: use `fit`.")
        return self._in_run.training

    # ---- before the run ---------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Attach, and see to it that layers made later, optimizers and checkpoints meet the quantizers in order."""
        check_neighbours(trainer, self)
        export = FitExport(self.export, self.target)
        self._run = Run(trainer, pl_module, self.schedule, self.reobserve, self.learn, export, before=self._run)
        self._run.arrange(trainer, pl_module, partial(self._attach, pl_module), self.optimizer)

    def _attach(self, pl_module: L.LightningModule, final: bool) -> None:
        flow, why_none = self._in_run.flow(pl_module, self.example, final)
        placement = plan(pl_module, self.weight, self.activation, self.rules, final, flow, self.target)
        if flow is None and self.example is not False and not self._in_run.fits:
            placement = as_placed(pl_module, placement) or placement
        self.placement = self._in_run.agreed(replace(placement, unseen=why_none))
        apply(pl_module, self.placement, self.compress_saved)
        require_gradients(pl_module)
        if final:
            self._in_run.hold_still(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over from the user's optimizers what concerns qparams; refuse what could not be exported."""
        self._in_run.start(trainer, pl_module, self.optimizer, self.lr_schedule, self.frozen_layers)
        tell_account(self.placement)
        self._in_run.watch_for_absent(pl_module, self.placement)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up a checkpoint, settle the schedule and where the trajectory goes, and enter the phase."""
        self._in_run.train(
            trainer, pl_module, self.record_every_n_steps, self.write_files, self.on_collapse, self.batch_norm
        )

    # ---- the run --------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Enter the epoch's phase."""
        self._training.phases.enter(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Gather statistics from this batch's forward passes, and measure them where a record is due."""
        self._training.before_batch(trainer, pl_module, batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Merge the batch's statistics over ranks, and record; after the last step, settle BatchNorm's statistics."""
        self._training.after_batch(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the scales and zero points of every channel, and say so if nothing moves them."""
        self._training.after_epoch(trainer)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Let no user's optimizer move qparams outside `learn`, and note where it moves weights of few bits from."""
        self._in_run.steps.announce(optimizer)

    # ---- after the run ----------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Estimate BatchNorm's statistics if the end was not foreseen, and say so if nothing was learned."""
        self._training.after_steps(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show what was recorded, and export, on rank zero."""
        self.parity = self._in_run.finish(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so where the numbers that follow are those of the float model."""
        warn_if_float(trainer, pl_module)

    on_validation_start = on_predict_start = on_test_start

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave nothing behind but the quantizers."""
        self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the model usable."""
        explain_torn_checkpoint(trainer, exception)
        self._end()

    def _end(self) -> None:
        if self._run is not None:
            self._run.end()

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    @wraps(L.Callback.state_dict, assigned=())  # Lightning then leaves it to us to refuse two, with the remedy
    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The schedule in force, the qparams' optimizer, what records and sentinel know; plain values and tensors."""
        return {} if self._run is None else self._run.state_dict()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tell whoever loads it into a float model what to do."""
        add_note(checkpoint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's state until the fit has made what it belongs to."""
        if self._run is not None:
            self._run.restored = dict(state_dict)

    def __repr__(self) -> str:
        given = {"weight": self.weight, "activation": self.activation, "rules": self.rules, "schedule": self.schedule}
        return f"QuantizationAwareTraining({', '.join(f'{k}={v!r}' for k, v in given.items())})"
