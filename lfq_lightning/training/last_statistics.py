"""BatchNorm's statistics after a fit's last step: whether, from how much, and when they are estimated anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lfq_lightning.gathering import gathering_paused
from lfq_lightning.placement.points import Points, weights
from lfq_lightning.placement.quantized_layer import quantizers
from lfq_lightning.private import BatchNorm
from lfq_lightning.running import batch_norms, run_by
from lfq_lightning.telling import tell
from lfq_lightning.training.batch_norm import (
    Forward,
    beside_training,
    check_can_estimate,
    estimate,
    moving,
    only_training,
)
from lfq_lightning.training.stepping.weights import bits_at_last

Statistics = Literal["auto", "reestimate", "keep"]

NOT_ALIKE = "what `forward` does with a batch is not what `training_step` does with it. Found that "
FEWEST, MOST = 20, 100  # batches: running statistics average about the last 20, and a hundred are enough


class Rehearsal:
    """Sees by a fit's first batch whether `forward` gives BatchNorm what training does, or is another computation.

    Preprocessing in `training_step`, or a `forward` that takes other inputs than a batch shows, would leave statistics
    behind that are wrong for both.

    Attributes:
        differs: what is not alike, in words; None until a batch has been seen.
    """

    def __init__(self) -> None:
        self.differs: str | None = None
        self._failed = ""
        self._alone: dict[BatchNorm, tuple[Tensor, Tensor]] = {}
        self._before: dict[BatchNorm, tuple[Tensor, Tensor, int]] = {}

    @torch.no_grad()
    def before_batch(self, trainer: L.Trainer, model: L.LightningModule, batch: Any) -> None:
        """Run `forward` on the batch that is about to be trained on; nothing is left of it."""
        if self.differs is not None:
            return
        norms, self._failed = moving(model), ""
        self._before = {norm: (*_moments(norm), _batches(norm)) for norm in norms}
        try:
            paused = gathering_paused(quantizers(model).values())
            with beside_training(trainer), paused, only_training(model, norms) as undo:
                for norm in norms:
                    norm.reset_running_stats()
                run_by(None, model, batch)
                self._alone = {norm: _moments(norm) for norm in norms if _batches(norm)}
                undo(norms)
        except Exception as error:
            self._failed = _in_words(error)

    def after_batch(self, trainer: L.Trainer, model: L.LightningModule) -> bool:
        """Compare with what the batch has moved the statistics by, in training; whether it is settled by that."""
        moved = any(_batches(norm) > before[2] for norm, before in self._before.items())
        if self.differs is not None or not moved:
            return False
        names = {module: name for name, module in model.named_modules()}
        found = [f"{names[norm]!r} {why}" for norm in self._alone for why in self._apart(norm)]
        why = self._failed or (found[0] if found else "" if self._alone else "it reaches no BatchNorm")
        agreed = trainer.strategy.reduce_boolean_decision(not why, all=True)
        self.differs = why if why or agreed else "on another rank it is not"
        self._alone, self._before = {}, {}
        return True

    def _apart(self, norm: BatchNorm) -> list[str]:
        mean, variance, count = self._before[norm]
        calls = _batches(norm) - count
        if not calls:
            return ["is reached by it alone"]
        share = calls / (count + calls) if norm.momentum is None else 1 - (1 - norm.momentum) ** calls
        now, spread = (old + (new - old) / share for old, new in zip((mean, variance), _moments(norm), strict=True))
        alone, own = self._alone[norm]
        most, least = (float(pick(spread.mean(), own.mean())) for pick in (torch.maximum, torch.minimum))
        shift = float((now - alone).square().mean().sqrt()) / max(most, norm.eps) ** 0.5
        if shift <= 0.5 and most <= 2 * max(least, norm.eps):
            return []
        times = most / max(least, norm.eps)
        return [f"meets means {shift:.2g} standard deviations apart, and {times:.2g} times the variance"]


def _moments(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.float().clone(), norm.running_var.float().clone()


def _batches(norm: BatchNorm) -> int:
    return 0 if norm.num_batches_tracked is None else int(norm.num_batches_tracked)


class LastStatistics:
    """Statistics that are estimated anew after a fit's last step, before its last validation and checkpoints.

    A fit that ends unforeseen, as by early stopping, is over by then, and they are estimated at its end. What fails
    then is a warning: the fit has gone well.

    Args:
        batches: how many batches each rank estimates from.
        forward: how to run the model on a batch, or None.
        loader: gives the batches in place of the training data, or None.
        rehearsal: decides whether, by the first batch; layers that training does not move then keep their statistics.
            None for all layers in any case.
    """

    def __init__(
        self,
        batches: int,
        forward: Forward | None = None,
        loader: Iterable[Any] | None = None,
        rehearsal: Rehearsal | None = None,
    ) -> None:
        self._batches, self._forward, self._loader, self._rehearsal = batches, forward, loader, rehearsal
        self._owed = False

    def before_batch(self, trainer: L.Trainer, model: L.LightningModule, batch: Any) -> None:
        """Rehearse, before the first."""
        if self._rehearsal is not None:
            self._rehearsal.before_batch(trainer, model, batch)

    def after_batch(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Estimate if no step follows; say after the first batch whether that will be."""
        if self._rehearsal is not None and self._rehearsal.after_batch(trainer, model):
            self._tell(trainer, self._rehearsal.differs)
        self._owed = True
        if _is_last_step(trainer):
            self.settle(trainer, model)

    def _tell(self, trainer: L.Trainer, differs: str | None) -> None:
        if differs:
            rank_zero_warn(
                "BatchNorm's running statistics stay as training leaves them, and with few bits may fit no batch: "
                f"{NOT_ALIKE}{differs}. Tell how to run the module, "
                '`BatchNormStatistics(reestimate="end", forward=...)`, or pass `batch_norm="keep"`.'
            )
        else:
            tell(
                trainer,
                "BatchNorm's running statistics will be estimated anew after the last step, from "
                f"{self._batches} batches or all there are (`batch_norm`).",
            )

    def settle(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Estimate if batches have been trained on since this was done."""
        if not self._owed or (self._rehearsal is not None and self._rehearsal.differs != ""):
            return
        self._owed = False
        norms = batch_norms(model) if self._rehearsal is None else moving(model)
        try:
            estimate(trainer, model, self._batches, self._forward, self._loader, norms)
        except Exception as error:
            rank_zero_warn(
                "BatchNorm's running statistics stay as training has left them, as estimating them anew has failed. "
                f"Found {_in_words(error)}"
            )


def _in_words(error: Exception) -> str:
    return " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])


class DecidesStatistics:
    """A callback that decides about BatchNorm's statistics, so that nobody else does."""


def last_statistics(
    trainer: L.Trainer, model: L.LightningModule, asked: Statistics, found: Points, length: float
) -> LastStatistics | None:
    """What estimates BatchNorm's statistics after a fit's last step; None where nothing does.

    Args:
        trainer: as training begins.
        model: the module.
        asked: the user's choice.
        found: its points, whose weights decide for "auto".
        length: optimizer steps of the run, of which a tenth are as many batches; it may be infinite.

    Raises:
        ValueError: if the user asked for it and it cannot be done.
    """
    few_bits = any(bits_at_last(each.quantizer.spec) < 4 for each in weights(found) if each.quantizer.spec)
    if asked == "keep" or (asked == "auto" and not few_bits) or not moving(model):
        return None
    if any(isinstance(callback, DecidesStatistics) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return None
    try:
        check_can_estimate(trainer, model)
    except ValueError as error:
        if asked == "reestimate":
            raise
        rank_zero_warn(
            "Weights of fewer than 4 bits leave running statistics of BatchNorm behind that may fit no batch. They "
            f'cannot be estimated anew after the last step: {error} `BatchNormStatistics(reestimate="end", ...)` '
            'takes these; `batch_norm="keep"` leaves statistics as they are.'
        )
        return None
    return LastStatistics(int(min(max(FEWEST, length / 10), MOST)), rehearsal=Rehearsal())


def _is_last_step(trainer: L.Trainer) -> bool:
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    epochs = trainer.max_epochs
    return epochs not in (None, -1) and trainer.is_last_batch and trainer.current_epoch + 1 >= epochs
