"""Phases in a Trainer's run: entering one on every rank at once, and taking in what a batch showed."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lfq_lightning.phases import Reduce, check_ranks_agree, estimate_weights, go_on, merge_statistics, model_phase
from lfq_lightning.placement.host import quantizers
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.schedule import PhaseSchedule
from lfq_lightning.training.neighbours import share_with_averages
from lfq_lightning.training.run_length import is_dev_run
from lfq_lightning.training.wrapping import Wrappers


def enter_phase(
    trainer: L.Trainer, model: L.LightningModule, schedule: PhaseSchedule, lead: LearnableFakeQuantize | None
) -> None:
    """Put every quantizer in the phase that the schedule says; those that have learned before the run go on learning.

    Args:
        trainer: the run's Trainer.
        model: its module.
        schedule: says the phase of this step.
        lead: the quantizer whose phase is the model's, `leading_quantizer`.
    """
    if lead is None:
        return
    phase, before = schedule.phase(trainer.current_epoch, trainer.global_step), lead.phase
    if lead.learned and phase in ("off", "observe", "estimate"):
        phase = "learn"
    if phase in ("learn", "freeze") and is_dev_run(trainer):
        phase = "off"
    if phase == before:
        return
    go_on(model, phase)
    share_with_averages(trainer, model)
    if trainer.world_size > 1:
        check_ranks_agree(model, lambda flat: _over_ranks(trainer)(flat, "max"))
    rank_zero_info(
        f"Epoch {trainer.current_epoch}, step {trainer.global_step}: quantizers go from {before} to {phase}."
    )


def start_over(model: L.LightningModule) -> None:
    """Return every quantizer to the state before any data."""
    for quantizer in quantizers(model).values():
        quantizer.forget()


def take_in_batch(trainer: L.Trainer, model: L.LightningModule, lead: LearnableFakeQuantize) -> None:
    """Merge what quantizers gathered in this batch over ranks, into observers and estimates."""
    met = merge_statistics(model, _over_ranks(trainer) if trainer.world_size > 1 else None)
    for name, flag in met.items():
        if flag.device.type == "cpu":
            quantizers(model)[name].warn_non_finite(flag, name)
    if lead.phase == "estimate":
        estimate_weights(model, cheap=True)


def warn_if_unlearned(trainer: L.Trainer, model: L.LightningModule) -> None:
    """Say so if a run ended before anything was learned."""
    phase = model_phase(model)
    if quantizers(model) and phase not in ("learn", "freeze") and not is_dev_run(trainer):
        rank_zero_warn(f"The run ended in phase {phase!r}: scales and zero points were not learned.")


def show_phase(wrappers: Wrappers, trainer: L.Trainer, lead: LearnableFakeQuantize | None) -> None:
    """Have the progress bar name the phase, which costs it no look at every quantizer."""

    def get_metrics(original: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**original(*args, **kwargs), "phase": "off" if lead is None else lead.phase}

    if trainer.progress_bar_callback is not None:
        wrappers.around(trainer.progress_bar_callback, "get_metrics", get_metrics)


def _over_ranks(trainer: L.Trainer) -> Reduce:
    return lambda flat, operation: trainer.strategy.reduce(flat, reduce_op=operation)
