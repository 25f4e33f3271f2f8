"""What a strategy that shards leaves out of a checkpoint, which quantizers need to go on where they stood."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lfq_lightning.observers.passing import is_passing
from lfq_lightning.placement.host import plain_name, quantizers
from lfq_lightning.training.sharding import shards
from lfq_lightning.training.wrapping import Wrappers

_STATE = "state_dict"
_EXTRA = "_extra_state"


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
        found, aside = quantizers(model), Wrappers()
        for quantizer in found.values():
            aside.around(quantizer, "set_extra_state", lambda original, state: None)
        try:
            checkpoint = original(checkpoint_path, weights_only=weights_only)
        finally:
            aside.remove()
        rest = _left_out(Path(strategy.broadcast(checkpoint_path)), weights_only)
        for name, quantizer in found.items():
            start = f"{name}."
            own = {key.removeprefix(start): value for key, value in rest.items() if key.startswith(start)}
            quantizer.load_state_dict(own, strict=False)
        return checkpoint

    wrappers.around(strategy, "load_checkpoint", load_checkpoint)


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
