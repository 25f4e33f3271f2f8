"""BatchNorm's running statistics under quantization: frozen, or estimated anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lfq_lightning.calibration import _forward
from lfq_lightning.phases import model_phase
from lfq_lightning.schedule import PHASES, check_phase
from lfq_lightning.techniques.order import check_order
from lfq_lightning.techniques.served import Served


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers of a model that keep running statistics, SyncBatchNorm among them."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


@contextmanager
def _only_batch_norm_training(model: nn.Module) -> Iterator[list[_BatchNorm]]:
    """Within it, BatchNorm averages batches equally, and everything else is in eval mode."""
    norms = batch_norms(model)
    modes = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = None
    try:
        yield norms
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def reestimate_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Replace BatchNorm's running statistics by the mean of those of some batches, of the model as it is quantized now.

    Weights that oscillate leave running statistics behind that fit none of their values (Nagel et al. 2022, arXiv
    2203.11086, section 3.1). Quantizers observe nothing here, dropout is off, and affine parameters, momentum and
    training modes stay as they are.

    Args:
        model: any module; without BatchNorm nothing happens.
        batches: what it is run on.
        forward: how to run the model on one batch. By default a mapping is passed as keywords, of a tuple or list the
            first entry is passed, and anything else is passed as it is.
        total: the sum of a flat tensor over all ranks, where each rank has its own batches.

    Raises:
        ValueError: if `batches` is empty. The statistics are unchanged then.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
        >>> reestimate_batch_norm(model, [torch.ones(4, 2), 3 * torch.ones(4, 2)])
        >>> model[0].running_mean
        tensor([2., 2.])
    """
    with _only_batch_norm_training(model) as norms:
        if not norms:
            return
        count = 0
        for batch in batches:
            if count == 0:
                for norm in norms:
                    norm.reset_running_stats()
            (forward or _forward)(model, batch)
            count += 1
    if count == 0:
        raise ValueError("`batches` must hold at least one batch. Found none: an iterator may have been used up.")
    if total is not None:
        _average(norms, count, total)


def _average(norms: list[_BatchNorm], count: int, total: Callable[[Tensor], Tensor]) -> None:
    """Give every rank the mean over all ranks' batches."""
    buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
    flat = torch.cat([b.flatten().float() for b in buffers])
    summed = total(torch.cat((flat * count, flat.new_tensor([float(count)]))))
    mean = summed[:-1] / summed[-1]
    for buffer, part in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


Moment = int | Literal["off", "observe", "estimate", "learn", "freeze"]


class BatchNormStatistics(L.Callback):
    """Freezes BatchNorm's running statistics from a point of the run on, or estimates them anew there.

    Frozen statistics are those that BatchNorm then normalizes by, as in eval mode; its affine parameters go on
    learning. Estimating runs the module's `forward`, or the one given, in eval mode, BatchNorm apart, over batches of
    the training data (or `loader`); the random numbers of the run are not touched, and all ranks end with the same
    statistics. A phase counts for estimating from the first epoch that starts in it, and estimating comes before
    freezing.

    Args:
        freeze: the epoch, or the phase, from which statistics are frozen; None for never.
        reestimate: the epoch or the phase at whose start statistics are estimated anew, or "end" for the end of the
            fit: checkpoints that are saved during the fit are then from before, so save one with
            `trainer.save_checkpoint`. None for never.
        batches: how many batches each rank estimates from.
        loader: gives these batches in place of the training data; needed where the training loader has persistent
            workers or a state of its own.
        forward: how to run the model on a batch, as in `calibrate`.

    Raises:
        ValueError: if an argument is wrong, here; if the order of callbacks is wrong, the training loader cannot be
            used beside training, or the module has no `forward` to estimate with, when a fit begins.

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
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        if isinstance(freeze, str):
            check_phase(freeze)
        if isinstance(reestimate, str) and reestimate != "end":
            check_phase(reestimate)
        if freeze is None and reestimate is None:
            raise ValueError("Give `freeze` or `reestimate` an epoch or a phase. Found neither.")
        if batches < 1:
            raise ValueError(f"`batches` must be at least 1. Found {batches}.")
        self.freeze, self.reestimate, self.batches = freeze, reestimate, batches
        self.loader, self.forward = loader, forward
        self._served = Served()
        self._done = False
        self._frozen: dict[_BatchNorm, bool] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse an order in which the phase would be the last epoch's, and forget that another model was served."""
        check_order(trainer, self)
        if self._served.is_another(pl_module):
            self._done = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See that the module can be run, and the training loader used beside training, before anything is trained."""
        loader = trainer.train_dataloader
        if self.reestimate is None:
            return
        if self.forward is None and type(pl_module).forward is L.LightningModule.forward:
            raise ValueError(
                f"Estimating BatchNorm runs the module on batches. Found no `forward` in {type(pl_module).__name__}: "
                "define it, or pass `forward=lambda module, batch: module.network(batch[0])`."
            )
        if self.loader is not None:
            return
        if getattr(loader, "persistent_workers", False) or hasattr(loader, "state_dict"):
            raise ValueError(
                "Estimating BatchNorm must not disturb the training loader. Found one with persistent workers or a "
                "state: pass another as `loader`."
            )

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Estimate anew where that is due."""
        if isinstance(self.reestimate, int):
            due = trainer.current_epoch == self.reestimate
        else:
            due = not self._done and self.reestimate != "end" and _reached(self.reestimate, trainer, pl_module)
        if due:
            self._estimate(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep statistics frozen, whoever has called `train()` meanwhile."""
        if _reached(self.freeze, trainer, pl_module):
            for norm in self._frozen or batch_norms(pl_module):
                self._frozen.setdefault(norm, norm.training)
                norm.eval()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Estimate anew where that is asked for at the end, and give BatchNorm its mode back."""
        if self.reestimate == "end":
            self._estimate(trainer, pl_module)
        self._let_go()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give BatchNorm its mode back."""
        self._let_go()

    def _let_go(self) -> None:
        for norm, mode in self._frozen.items():
            norm.training = mode
        self._frozen = {}

    def _estimate(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        loader: Iterable[Any] = self.loader if self.loader is not None else trainer.train_dataloader or ()
        strategy, precision = trainer.strategy, trainer.precision_plugin
        # In a copy of the random numbers' state, as a shuffling loader draws from it.
        with isolate_rng(), precision.forward_context():
            moved = (precision.convert_input(strategy.batch_to_device(b)) for b in islice(loader, self.batches))
            total = (lambda flat: strategy.reduce(flat, reduce_op="sum")) if trainer.world_size > 1 else None
            reestimate_batch_norm(model, moved, self.forward, total)
        self._done = True

    def state_dict(self) -> dict[str, Any]:
        """Whether statistics were estimated anew."""
        return {"done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self._done = state_dict["done"]


def _reached(moment: Moment | str | None, trainer: L.Trainer, model: nn.Module) -> bool:
    if moment is None:
        return False
    if isinstance(moment, int):
        return trainer.current_epoch >= moment
    return PHASES.index(model_phase(model)) >= PHASES.index(moment)
