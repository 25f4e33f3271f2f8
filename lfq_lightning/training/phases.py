"""What quantizers do at each moment of a Trainer's run: which learn, in which phase, and what a batch showed them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lfq_lightning.gathering import (
    Gathered,
    Reduce,
    blank_weights,
    estimate_weights,
    follow_blank,
    mark_blank,
    set_gathering,
)
from lfq_lightning.phases import check_ranks_agree, go_on, goes_on, join, leading_quantizer, model_phase, phase_of
from lfq_lightning.placement.points import Points, points, weights
from lfq_lightning.placement.quantized_layer import FrozenLayers, holders, quantizers, set_learning_alone
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.schedule import OBSERVING, Phase, PhaseSchedule
from lfq_lightning.telling import tell
from lfq_lightning.training.stepping.hooks import held_by
from lfq_lightning.training.trainer.length import is_dev_run
from lfq_lightning.training.trainer.neighbours import share_with_averages
from lfq_lightning.training.wrapping import Wrappers


class RunPhases:
    """One run's way through the phases: entering one on every rank at once, and taking in what a batch showed.

    Args:
        points: of the model; they neither come nor go while it trains.
        schedule: says the phase of each step.
    """

    def __init__(self, points: Points, schedule: PhaseSchedule) -> None:
        self.points, self.schedule = points, schedule
        self._quantizers = [point.quantizer for point in points.values()]
        self._lead = leading_quantizer(self._quantizers)
        waiting = [quantizer for quantizer in self._quantizers if not (quantizer.learned or quantizer.late)]
        self.phase = phase_of(waiting or self._quantizers)
        self._late = self._find_late()
        self._gathered = Gathered(self._observing)
        mark_blank(points)
        self._blank = blank_weights(points)
        self._told_still = False

    def enter(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Put quantizers in the phase that the schedule says; those that have learned before go on learning."""
        phase, before = self.schedule.phase(trainer.current_epoch, trainer.global_step), self.phase
        if self._lead is not None:
            phase = goes_on(self._lead, phase)
        if phase in ("learn", "freeze") and is_dev_run(trainer):
            phase = "off"
        if phase == before or not self.points:
            return
        go_on(self.points, phase)
        self._lead, self._late = leading_quantizer(self._quantizers), self._find_late()
        self._blank = blank_weights(self.points)
        self.phase = phase
        self._gathered = Gathered(self._observing)
        self._tell(trainer, model)
        tell(
            trainer,
            f"Epoch {trainer.current_epoch}, step {trainer.global_step}: quantizers go from {before} to {phase}.",
        )

    def follow_blank(self) -> list[LearnableFakeQuantize]:
        """Estimate anew scales of weights that were all zeros and have grown; the quantizers whose scales were set."""
        return follow_blank(self._blank) if self.phase in ("estimate", "learn") else []

    def before_batch(self) -> None:
        """Gather statistics in the coming forward passes."""
        set_gathering(self._gathered.quantizers, True)

    def after_batch(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Merge what was gathered over ranks, into observers and estimates; late quantizers with data join the rest."""
        observing = self._observing
        if not observing:
            return
        set_gathering(self._gathered.quantizers, False)
        met = self._gathered.merge(_over_ranks(trainer) if trainer.world_size > 1 else None)
        if met is not None and met.flags.device.type == "cpu":
            for name in met.not_finite():
                observing[name].quantizer.warn_non_finite(name)
        if self.phase == "estimate":
            estimate_weights(self.points, cheap=True)
        elif self._late and join((point.quantizer for point in self._late.values()), cast(Phase, self.phase)):
            joined = [name for name, point in self._late.items() if not point.quantizer.late]
            self._late = self._find_late()
            self._gathered = Gathered(self._observing)
            self._tell(trainer, model)
            tell(trainer, f"Step {trainer.global_step}: {', '.join(joined)} saw data and go to {self.phase}.")

    def warn_if_still(self, trainer: L.Trainer, unseen: Sequence[str]) -> None:
        """Say once, as a training epoch ends, that steps are made where neither Lightning nor a hook sees them.

        Nothing takes scales and zero points along then, which no error would tell.

        Args:
            trainer: has counted steps.
            unseen: names of optimizers that no hook has seen step.
        """
        said = "" if self._told_still or not self.points else self._stillness(trainer, unseen)
        if said:
            self._told_still = True
            rank_zero_warn(said)

    def _stillness(self, trainer: L.Trainer, unseen: Sequence[str]) -> str:
        if self.phase == "learn" and unseen:
            return (
                "Scales and zero points step with the optimizer that holds their layer's weight. Found no call of "
                f"`step()` of {', '.join(unseen)} so far: none has moved, and no weight of few bits took longer steps. "
                "Make updates by `step()` of an optimizer of `configure_optimizers`, or of one that it keeps as an "
                "attribute, as SAM does."
            )
        if self.phase in ("off", *OBSERVING) and self.schedule.unit == "step" and trainer.global_step == 0:
            return (
                "The schedule counts optimizer steps, and Lightning has counted none: scales and zero points would "
                f"never be learned. Found phase {self.phase!r}: call `step()` of what `self.optimizers()` gives, or "
                "give the schedule in epochs, such as `schedule=PhaseSchedule(observe=0, estimate=1, learn=2)`."
            )
        return ""

    @property
    def _observing(self) -> Points:
        return self.points if self.phase in OBSERVING else self._late

    def _find_late(self) -> Points:
        return {name: point for name, point in self.points.items() if point.quantizer.late}

    def _tell(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        share_with_averages(trainer, model)
        if trainer.world_size > 1:
            check_ranks_agree(model, lambda flat: _over_ranks(trainer)(flat, "max"))


def begin(model: L.LightningModule, anew: bool) -> None:
    """Have every quantizer gather nothing before a training batch says so, and those that know nothing begin together.

    Args:
        model: the run's module.
        anew: whether all return to the state before any data.
    """
    for quantizer in quantizers(model).values():
        if anew:
            quantizer.forget()
        known = quantizer.estimated or quantizer.learned or quantizer.late
        if quantizer.site is None and not known and not quantizer.saw_data():
            quantizer.start_off()  # as those of layers are; one that the user has placed is made in phase "estimate"
        quantizer.gathering = False


def warn_if_unlearned(trainer: L.Trainer, model: L.LightningModule) -> None:
    """Say so if a run ended before anything was learned."""
    phase = model_phase(model)
    if quantizers(model) and phase not in ("learn", "freeze") and not is_dev_run(trainer):
        rank_zero_warn(f"The run ended in phase {phase!r}: scales and zero points were not learned.")


def warn_if_float(trainer: L.Trainer, model: L.LightningModule) -> None:
    """Say so if a model that is evaluated outside a fit computes in float, as one that was never fitted does."""
    found = quantizers(model).values()
    if trainer.state.fn in (None, TrainerFn.FITTING) or not found or any(q.quantizes for q in found):
        return
    rank_zero_warn(
        f"What `trainer.{trainer.state.fn.value}` gives here are numbers of the float model: its quantizers are in "
        f"phase {model_phase(model)!r}. Fit it with this callback, or give a checkpoint of a quantized epoch: for "
        '`ckpt_path="best"`, `lfq_lightning.while_learning(ModelCheckpoint(...))` compares no others.'
    )


def show_phase(wrappers: Wrappers, trainer: L.Trainer, phases: RunPhases) -> None:
    """Have the progress bar name the phase, which costs it no look at every quantizer."""

    def get_metrics(original: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**original(*args, **kwargs), "phase": phases.phase}

    if trainer.progress_bar_callback is not None:
        wrappers.around(trainer.progress_bar_callback, "get_metrics", get_metrics)


def _over_ranks(trainer: L.Trainer) -> Reduce:
    return lambda flat, operation: trainer.strategy.reduce(flat, reduce_op=operation)


def learn_alone(model: nn.Module) -> None:
    """Let scales and zero points learn in every layer, whose weights do not, and say so."""
    set_learning_alone(holders(model), True)
    qparams = sum(p.numel() for quantizer in quantizers(model).values() for p in quantizer.parameters(recurse=False))
    rank_zero_info(
        f"Scales and zero points learn alone (learn='scales'): {qparams:,} numbers. Every weight and bias, and the "
        "statistics of BatchNorm, stay as they are."
    )


def settle_frozen_layers(model: nn.Module, optimizers: Sequence[Optimizer], choice: FrozenLayers) -> None:
    """Decide for each quantized layer, as a fit begins, whether its scales learn without its weight, and say so.

    Frozen is a layer whose weight has `requires_grad=False` now. Of several optimizers, one that holds such a weight
    will take turns with the others (a GAN's): that layer is not frozen but waits, and its scales wait with it.

    Args:
        model: a model with quantizers.
        optimizers: the user's.
        choice: "keep" leaves scales and zero points of frozen layers as they were estimated, "learn" lets them learn.
    """
    found = [(point.owner, point.parameter) for point in weights(points(model))]
    layers = {owner: weight for owner, weight in found if owner is not None and weight is not None}
    held = held_by(optimizers) if len(optimizers) > 1 else set()
    frozen = [layer for layer, weight in layers.items() if not weight.requires_grad and id(weight) not in held]
    set_learning_alone(holders(model), False)
    if choice == "learn":
        set_learning_alone(frozen, True)
    if not frozen:
        return
    count = f"{len(frozen)} of {len(layers)} quantized layers have frozen weights"
    if choice == "learn":
        rank_zero_info(f"{count}: their scales and zero points learn alone (frozen_layers='learn').")
    elif len(frozen) == len(layers):
        rank_zero_warn(
            f"{count}, and with frozen_layers='keep' their scales and zero points keep their estimates: nothing that "
            "is quantized will learn. Use frozen_layers='learn' to train scales and zero points alone."
        )
    else:
        rank_zero_info(f"{count}: their scales and zero points keep their estimates (frozen_layers='keep').")
