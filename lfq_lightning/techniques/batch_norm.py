"""BatchNorm's running statistics, estimated anew from some batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lfq_lightning.checking import check_batches, check_function, check_model
from lfq_lightning.private import BatchNorm
from lfq_lightning.running import batch_norms, in_eval_mode, run_by


@contextmanager
def _only_batch_norm_training(model: nn.Module) -> Iterator[list[BatchNorm]]:
    """Within it, BatchNorm averages batches equally, and all else is in eval mode; an error undoes what it averaged."""
    norms = batch_norms(model)
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    try:
        with in_eval_mode(model):
            for norm in norms:
                norm.train()
                norm.momentum = None
            yield norms
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for name, buffer in buffers.items():
                norm.get_buffer(name).copy_(buffer)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


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
    with _only_batch_norm_training(model) as norms:
        if not norms:
            return
        count = 0
        for batch in batches:
            if count == 0:
                for norm in norms:
                    norm.reset_running_stats()
            run_by(forward, model, batch)
            count += 1
        if count == 0:
            raise ValueError("`batches` must hold at least one batch. Found none: an iterator may have been used up.")
        if total is not None:
            _average(norms, count, total)


def _average(norms: list[BatchNorm], count: int, total: Callable[[Tensor], Tensor]) -> None:
    """Give every rank the mean over all ranks' batches."""
    buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var) if b is not None]
    flat = torch.cat([b.flatten().float() for b in buffers])
    summed = total(torch.cat((flat * count, flat.new_tensor([float(count)]))))
    mean = summed[:-1] / summed[-1]
    for buffer, part in zip(buffers, mean.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))
