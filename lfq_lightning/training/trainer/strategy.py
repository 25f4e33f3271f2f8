"""Strategies of several ranks: which are refused, gradients that nobody averages, and what loading leaves out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lfq_lightning.observers.passing import is_passing
from lfq_lightning.placement.points import points
from lfq_lightning.placement.quantized_layer import quantizers
from lfq_lightning.private import ddp_options, plain_name, tensor_parallel_size
from lfq_lightning.training.wrapping import Wrappers

_STATE = "state_dict"
_EXTRA = "_extra_state"


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
    if isinstance(strategy, DDPStrategy) and ddp_options(strategy).get("static_graph"):
        raise ValueError(
            "With a static graph, DDP never reduces gradients that the first step did not have, and ranks drift apart "
            "when quantizers begin to learn. Found DDPStrategy(static_graph=True): leave it out."
        )
    if isinstance(strategy, ModelParallelStrategy) and tensor_parallel_size(strategy) != 1:
        raise ValueError(
            "Tensor parallelism splits layers inside their forward pass. Found ModelParallelStrategy with "
            f"tensor_parallel_size={tensor_parallel_size(strategy)}: pass `tensor_parallel_size=1`."
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


def load_quantizers_whole(wrappers: Wrappers, trainer: L.Trainer, model: L.LightningModule) -> None:
    """Have a strategy that shards load all of a checkpoint's quantizers, whichever kind the checkpoint is.

    From a sharded checkpoint torch loads the keys that the model has, and a fresh one has no histogram to go on with.
    From a whole one Lightning loads parameters and buffers one by one, and torch hands stand-ins to whatever has an
    extra state. Quantizers are whole on every rank, so that each rank can read the rest by itself.

    Args:
        wrappers: what takes it off again.
        trainer: with any strategy; others load everything.
        model: the run's module.
    """
    if not shards(trainer):
        return
    strategy = trainer.strategy

    def load_checkpoint(original: Any, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        rest = _left_out(Path(strategy.broadcast(checkpoint_path)), weights_only)
        _take_in(model, rest)  # before, as what optimizers remember depends on it, and after, as some of it is lost
        with _as_optimizers_left_them(model):
            checkpoint = original(checkpoint_path, weights_only=weights_only)
        _take_in(model, rest)
        return checkpoint

    wrappers.around(strategy, "load_checkpoint", load_checkpoint)


def _take_in(model: L.LightningModule, rest: Mapping[str, Tensor]) -> None:
    """Give each quantizer its part."""
    for name, quantizer in quantizers(model).items():
        start = f"{name}."
        own = {key.removeprefix(start): value for key, value in rest.items() if key.startswith(start)}
        quantizer.load_state_dict(own, strict=False)


@contextmanager
def _as_optimizers_left_them(model: L.LightningModule) -> Iterator[None]:
    """Within it, qparams learn if an optimizer remembers something of them, and extra states stay as they are.

    Torch has the fresh optimizer step once, and asks the checkpoint for the state of every parameter that requires a
    gradient. With `optimizer="user"` there is none of qparams that have yet to learn, or keep still in a frozen layer.
    """
    found, aside = quantizers(model).values(), Wrappers()
    before = [quantizer.learning_enabled for quantizer in found]
    still = {point.quantizer for point in points(model).values() if not point.learns}
    for quantizer in found:
        aside.around(quantizer, "set_extra_state", lambda original, state: None)
        quantizer.learning_enabled = quantizer.learned and quantizer not in still
    unknown = [p for q in found if not q.learning_enabled for p in q.parameters(recurse=False) if p.requires_grad]
    for parameter in unknown:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        aside.remove()
        for parameter in unknown:
            parameter.requires_grad_(True)
        for quantizer, learning in zip(found, before, strict=True):
            quantizer.learning_enabled = learning


def _left_out(path: Path, weights_only: bool | None) -> dict[str, Tensor]:
    """What strategies leave out of a checkpoint of either kind, by its name in a state dict."""
    if not path.is_dir():
        saved: Mapping[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)[_STATE]
        return {plain_name(key): value for key, value in saved.items() if _is_left_out(key)}
    reader = FileSystemReader(path)
    found = {
        key: torch.empty(kept.size, dtype=kept.properties.dtype, device="cpu")
        for key, kept in reader.read_metadata().state_dict_metadata.items()
        if isinstance(kept, TensorStorageMetadata) and _is_left_out(key)
    }
    load(found, storage_reader=reader)
    return {plain_name(key.removeprefix(f"{_STATE}.")): value for key, value in found.items()}


def _is_left_out(key: str) -> bool:
    return is_passing(key) or key.rpartition(".")[2] == _EXTRA
