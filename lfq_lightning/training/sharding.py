"""Strategies of several ranks: which cannot be followed, and gradients that nobody averages."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn


def check_strategy(trainer: L.Trainer) -> None:
    """Refuse strategies that take parameters or optimizers apart in ways that quantizers cannot follow.

    Raises:
        ValueError: for FSDP's first version, DeepSpeed, a static graph, and tensor parallelism.
    """
    strategy = trainer.strategy
    if isinstance(strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise ValueError(
            f"{type(strategy).__name__} flattens or rewrites parameters. Found it together with "
            'QuantizationAwareTraining: use `strategy="ddp"`, or ModelParallelStrategy with `fully_shard` in '
            "`configure_model`."
        )
    if isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("static_graph"):
        raise ValueError(
            "With a static graph, DDP never reduces gradients that the first step did not have, and ranks drift apart "
            "when quantizers begin to learn. Found DDPStrategy(static_graph=True): leave it out."
        )
    if isinstance(strategy, ModelParallelStrategy) and strategy._tensor_parallel_size != 1:
        raise ValueError(
            "Tensor parallelism splits layers inside their forward pass. Found ModelParallelStrategy with "
            f"tensor_parallel_size={strategy._tensor_parallel_size}: pass `tensor_parallel_size=1`."
        )


def shards(trainer: L.Trainer) -> bool:
    """Whether the strategy keeps a part of each weight on each rank, and loads checkpoints by itself."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def mean_over_shards(trainer: L.Trainer) -> Callable[[Tensor], Tensor] | None:
    """The mean over ranks for qparams, which `fully_shard` did not see; None where the strategy averages them."""
    if not shards(trainer) or trainer.world_size == 1:
        return None
    return lambda flat: trainer.strategy.reduce(flat, reduce_op="mean")


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], over_ranks: Callable[[Tensor], Tensor]) -> None:
    """Give every rank the mean gradients; one that was not used on a rank counts as zero there.

    Whether there is anything to average is known without asking the other ranks, and so without waiting for the device:
    `fully_shard` lets no rank run a layer alone.

    Args:
        parameters: those that `fully_shard` did not see.
        over_ranks: the mean of a flat tensor over all ranks.
    """
    if all(parameter.grad is None for parameter in parameters):
        return  # torch's checkpoints step an optimizer without gradients to learn what state it has
    own = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters]
    mean = over_ranks(torch.cat(own)).split([gradient.numel() for gradient in own])
    for parameter, gradient in zip(parameters, mean, strict=True):
        parameter.grad = gradient
