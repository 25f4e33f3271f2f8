"""BatchNorm's running statistics, estimated anew from some batches: of any model, or in a Trainer's run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lfq_lightning.checking import check_batches, check_function, check_model
from lfq_lightning.private import BatchNorm, on_its_device, training_loaders
from lfq_lightning.running import batch_norms, in_eval_mode, run_by

Forward = Callable[[nn.Module, Any], Any]


@contextmanager
def only_training(model: nn.Module, norms: Sequence[BatchNorm]) -> Iterator[Callable[[Iterable[BatchNorm]], None]]:
    """Within it these average batches equally, and all else is in eval mode; an error undoes what they averaged.

    It gives what undoes that for some of them.
    """
    before = {norm: {name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms}
    momenta = {norm: norm.momentum for norm in norms}

    def undo(some: Iterable[BatchNorm]) -> None:
        for norm in some:
            for name, buffer in before[norm].items():
                norm.get_buffer(name).copy_(buffer)

    try:
        with in_eval_mode(model):
            for norm in norms:
                norm.train()
                norm.momentum = None
            yield undo
    except BaseException:
        undo(norms)
        raise
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum


def reestimate_batch_norm(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Replace BatchNorm's running statistics by the mean of those of some batches, of the model as it is quantized now.

    Weights that oscillate leave running statistics behind that fit none of their values (Nagel et al. 2022, arXiv
    2203.11086, section 3.1). Quantizers observe nothing here, dropout is off, and affine parameters, momentum and
    training modes stay as they are. A layer that no batch has reached keeps its statistics.

    Args:
        model: any module; without BatchNorm nothing happens.
        batches: what it is run on.
        forward: how to run the model on one batch. By default a mapping is passed as keywords, of a tuple or list as
            many entries as `forward` must be given, and anything else as it is.
        total: the sum of a flat tensor over all ranks, where each rank has its own batches.

    Raises:
        ValueError: if `batches` is empty. After an error, the statistics are as they were.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
        >>> reestimate_batch_norm(model, [torch.ones(4, 2), 3 * torch.ones(4, 2)])
        >>> model[0].running_mean
        tensor([2., 2.])
    """
    check_model(model)
    check_batches("batches", batches)
    check_function("forward", forward, "the model and a batch")
    check_function("total", total, "a flat tensor")
    _reestimate(model, batches, forward, total, batch_norms(model))


@torch.no_grad()
def _reestimate(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None,
    total: Callable[[Tensor], Tensor] | None,
    norms: Sequence[BatchNorm],
) -> None:
    """Of these layers."""
    if not norms:
        return
    with only_training(model, norms) as undo:
        count = 0
        for batch in batches:
            if count == 0:
                for norm in norms:
                    norm.reset_running_stats()
            run_by(forward, model, batch)
            count += 1
        if count == 0:
            raise ValueError("`batches` must hold at least one batch. Found none: an iterator may have been used up.")
        undo(norm for norm in norms if norm.num_batches_tracked is not None and norm.num_batches_tracked == 0)
        if total is not None:
            _average(norms, count, total)


def _average(norms: Sequence[BatchNorm], count: int, total: Callable[[Tensor], Tensor]) -> None:
    """Give every rank the mean over all ranks' batches."""
    buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
    flat = torch.cat([b.flatten().float() for b in buffers])
    summed = total(torch.cat((flat * count, flat.new_tensor([float(count)]))))
    mean = summed[:-1] / summed[-1]
    for buffer, part in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


# ---- in a Trainer's run ---------------------------------------------------------------------------------------------


def moving(model: nn.Module) -> list[BatchNorm]:
    """The BatchNorm layers whose running statistics training moves: those in training mode."""
    return [norm for norm in batch_norms(model) if norm.training]


def check_can_estimate(
    trainer: L.Trainer, model: L.LightningModule, forward: Forward | None = None, loader: Iterable[Any] | None = None
) -> None:
    """Raise ValueError unless the module can be run, and the training loader used beside training."""
    combined = training_loaders(trainer)
    if forward is None and type(model).forward is L.LightningModule.forward:
        raise ValueError(
            f"Estimating BatchNorm runs the module on batches. Found no `forward` in {type(model).__name__}: "
            "define it, or pass `forward=lambda module, batch: module.network(batch[0])`."
        )
    if loader is not None:
        return
    if forward is None and combined.flattened != [combined.iterables]:
        raise ValueError(
            "Estimating BatchNorm runs the module on inputs alone. Found training loaders in a "
            f"{type(combined.iterables).__name__}, which give one batch of them all: pass `forward`, such as "
            '`lambda module, batch: module(batch["name"][0])`, or one `loader`.'
        )
    if any(getattr(part, "persistent_workers", False) or hasattr(part, "state_dict") for part in combined.flattened):
        raise ValueError(
            "Estimating BatchNorm must not disturb the training loader. Found one with persistent workers or a "
            "state: pass another as `loader`."
        )


def estimate(
    trainer: L.Trainer,
    model: L.LightningModule,
    batches: int,
    forward: Forward | None = None,
    loader: Iterable[Any] | None = None,
    norms: Sequence[BatchNorm] | None = None,
) -> None:
    """Estimate anew from so many batches of each rank, of an epoch or of a loader; all ranks end alike.

    The random numbers of the run are not touched.
    """
    with beside_training(trainer):  # in a copy of the random numbers' state, as a shuffling loader draws from it
        if loader is None:  # which a limit of the Trainer's makes shorter
            loader, batches = _batches(training_loaders(trainer)), int(min(batches, trainer.num_training_batches))
        moved = (on_its_device(trainer, batch) for batch in islice(loader, batches))
        total = (lambda flat: trainer.strategy.reduce(flat, reduce_op="sum")) if trainer.world_size > 1 else None
        _reestimate(model, moved, forward, total, batch_norms(model) if norms is None else norms)


@contextmanager
def beside_training(trainer: L.Trainer) -> Iterator[None]:
    """Within it a model can be run in the run's precision, eagerly, and the run's random numbers stay as they are."""
    with isolate_rng(), trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
        yield


def _batches(combined: CombinedLoader) -> Iterator[Any]:
    """From the beginning, in an iterator of its own: the training loop's may be in use."""
    for batch, _, _ in copy.copy(combined):
        yield batch
