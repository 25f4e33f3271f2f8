"""Notices that nothing takes scales and zero points along, which no error would tell."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lfq_lightning.schedule import OBSERVING
from lfq_lightning.training.optimizer import QParamOptimizer
from lfq_lightning.training.run_phases import RunPhases
from lfq_lightning.training.user_optimizer import UserOptimizers


def warn_if_still(trainer: L.Trainer, phases: RunPhases, optimizer: QParamOptimizer | UserOptimizers | None) -> None:
    """Say once in a run that optimizers make their steps where neither Lightning nor a hook sees them.

    Args:
        trainer: at the end of a training epoch.
        phases: those of the run.
        optimizer: what steps the qparams.
    """
    if phases.found.quantizers and optimizer is not None and not phases.told_still:
        said = _still(trainer, phases, optimizer)
        if said:
            phases.told_still = True
            rank_zero_warn(said)


def _still(trainer: L.Trainer, phases: RunPhases, optimizer: QParamOptimizer | UserOptimizers) -> str:
    if phases.phase == "learn" and optimizer.unseen:
        return (
            "Scales and zero points step with the optimizer that holds their layer's weight. Found no call of `step()` "
            f"of {', '.join(optimizer.unseen)} so far: none has moved, and no weight of few bits took longer steps. "
            "Make updates by `step()` of an optimizer of `configure_optimizers`, or of one that it keeps as an "
            "attribute, as SAM does."
        )
    if phases.phase in ("off", *OBSERVING) and phases.schedule.unit == "step" and trainer.global_step == 0:
        return (
            "The schedule counts optimizer steps, and Lightning has counted none: scales and zero points would never "
            f"be learned. Found phase {phases.phase!r}: call `step()` of what `self.optimizers()` gives, or give the "
            "schedule in epochs, such as `schedule=PhaseSchedule(observe=0, estimate=1, learn=2)`."
        )
    return ""
