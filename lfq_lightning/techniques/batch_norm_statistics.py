"""BatchNorm's running statistics in a Trainer's run: frozen, or estimated anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lfq_lightning.checking import check_batches, check_function, check_whole, in_words
from lfq_lightning.phases import model_phase
from lfq_lightning.running import batch_norms
from lfq_lightning.schedule import PHASES
from lfq_lightning.techniques.order import check_order, check_quantized, epochs_before
from lfq_lightning.techniques.served import Served
from lfq_lightning.training.batch_norm import Forward, check_can_estimate, estimate
from lfq_lightning.training.last_statistics import NOT_ALIKE, DecidesStatistics, LastStatistics, Rehearsal
from lfq_lightning.training.still import FixedStatistics
from lfq_lightning.training.trainer.length import is_dev_run, length_of
from lfq_lightning.training.wrapping import AtRest

Moment = int | Literal["off", "observe", "estimate", "learn", "freeze"]


class BatchNormStatistics(AtRest, DecidesStatistics):
    """Freezes BatchNorm's running statistics from a point of the run on, or estimates them anew there.

    Frozen statistics are those that BatchNorm then normalizes by, as in eval mode; its affine parameters go on
    learning. Estimating runs the module's `forward`, or the one given, in eval mode, BatchNorm apart, over batches of
    the training data (or `loader`); the random numbers of the run are not touched, and all ranks end with the same
    statistics. Where the module's own `forward` does with the first batch what training does not, a warning says so.
    A phase counts for estimating from the first epoch that starts in it, and estimating comes before freezing.

    Args:
        freeze: the epoch, or the phase, from which statistics are frozen; None for never.
        reestimate: the epoch or the phase at whose start statistics are estimated anew, or "end" for after
            the last step, before the last validation and the last checkpoints; where a fit ends unforeseen, as by early
            stopping, at its end, and what fails then is a warning. None for never.
        batches: how many batches each rank estimates from.
        loader: gives these batches in place of the training data; needed where the training loader has persistent
            workers or a state of its own.
        forward: how to run the model on a batch, as in `calibrate`.

    Raises:
        ValueError: if an argument is wrong, here; if the order of callbacks is wrong, the training loader cannot be
            used beside training, there are several and no `forward` is given, or the module has no `forward` to
            estimate with, when a fit begins.

    Example:
        >>> import lfq_lightning as lfq
        >>> callbacks = [
        ...     lfq.QuantizationAwareTraining(weight=2, activation=2),
        ...     lfq.BatchNormStatistics(reestimate="end", batches=50),
        ... ]
    """

    def __init__(
        self,
        freeze: Moment | None = None,
        reestimate: Moment | Literal["end"] | None = None,
        batches: int = 100,
        loader: Iterable[Any] | None = None,
        forward: Forward | None = None,
    ) -> None:
        _check_moment("freeze", freeze, PHASES)
        _check_moment("reestimate", reestimate, (*PHASES, "end"))
        if freeze is None and reestimate is None:
            raise ValueError("Give `freeze` or `reestimate` an epoch or a phase. Found neither.")
        check_whole("batches", batches, 1)
        if isinstance(loader, Mapping):
            raise ValueError(
                f"`loader` must give batches. Found a mapping with the keys {', '.join(map(str, loader))}."
            )
        if loader is not None:
            check_batches("loader", loader)
        check_function("forward", forward, "the module and a batch")
        self.freeze, self.reestimate, self.batches = freeze, reestimate, batches
        self.loader, self.forward = loader, forward
        self._rest()

    def _rest(self) -> None:
        self._served = Served()
        self._done = False
        self._fixed, self._last = FixedStatistics(), LastStatistics(self.batches, self.forward, self.loader)
        self._rehearsal: Rehearsal | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse an order in which the phase would be the last epoch's, and forget that another model was served."""
        check_order(trainer, self)
        self._last = LastStatistics(self.batches, self.forward, self.loader)
        guessed = self.reestimate is not None and self.forward is None and self.loader is None
        self._rehearsal = Rehearsal() if guessed else None
        if self._served.is_another(pl_module):
            self._done = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See that the module can be run, and the training loader used beside training, before anything is trained."""
        if not batch_norms(pl_module):
            rank_zero_warn(f"BatchNormStatistics has nothing to do: {type(pl_module).__name__} has no BatchNorm.")
        self._check_moments(trainer, pl_module)
        if self.reestimate is not None:
            check_can_estimate(trainer, pl_module, self.forward, self.loader)

    def _check_moments(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        epochs = length_of(trainer)[0] - epochs_before(trainer)
        for name, moment in (("freeze", self.freeze), ("reestimate", self.reestimate)):
            if isinstance(moment, str) and moment != "end":
                check_quantized(self, model)  # phases are those of quantizers
            elif isinstance(moment, int) and moment >= epochs and not is_dev_run(trainer):
                raise ValueError(
                    f"`{name}` must be an epoch of the run, counted from 0. Found epoch {moment} in a run of "
                    f"{epochs:g}: name an earlier one, or train longer."
                )

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Estimate anew where that is due."""
        if isinstance(self.reestimate, int):
            due = trainer.current_epoch - epochs_before(trainer) == self.reestimate
        else:
            due = not self._done and self.reestimate != "end" and _reached(self.reestimate, trainer, pl_module)
        if due:
            estimate(trainer, pl_module, self.batches, self.forward, self.loader)
            self._done = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep statistics frozen, whoever has called `train()` meanwhile, and try `forward` on the first batch."""
        if _reached(self.freeze, trainer, pl_module):
            self._fixed.hold(pl_module)
        if self._rehearsal is not None:
            self._rehearsal.before_batch(trainer, pl_module, batch)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say so where `forward` is no way to estimate; after the last step, estimate where that is asked for."""
        if self._rehearsal is not None and self._rehearsal.after_batch(trainer, pl_module) and self._rehearsal.differs:
            rank_zero_warn(
                f"BatchNormStatistics estimates from wrong batches: {NOT_ALIKE}{self._rehearsal.differs}. Pass "
                "`forward=lambda module, batch: ...`, which runs the module as training does."
            )
        if self.reestimate == "end":
            self._last.after_batch(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Estimate anew where the end was not foreseen, and give BatchNorm its mode back."""
        self._last.settle(trainer, pl_module)
        self._fixed.give_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give BatchNorm its mode back."""
        self._fixed.give_back()

    def state_dict(self) -> dict[str, Any]:
        """Whether statistics were estimated anew."""
        return {"done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self._done = state_dict["done"]


def _check_moment(name: str, value: object, words: Sequence[str]) -> None:
    if (
        value is None
        or (isinstance(value, str) and value in words)
        or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)
    ):
        return
    raise ValueError(
        f"`{name}` must be an epoch, counted from 0, or one of {', '.join(words)}. Found {in_words(value)}: leave "
        "it out."
    )


def _reached(moment: Moment | str | None, trainer: L.Trainer, model: nn.Module) -> bool:
    if moment is None:
        return False
    if isinstance(moment, int):
        return trainer.current_epoch - epochs_before(trainer) >= moment
    return PHASES.index(model_phase(model)) >= PHASES.index(moment)
