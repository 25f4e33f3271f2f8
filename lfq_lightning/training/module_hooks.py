"""A LightningModule's own hooks before training, which must meet the quantizers in the right order."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import lightning as L
import torch

from lfq_lightning.checkpoint import check_loadable
from lfq_lightning.placement.host import hosts, restore_layer
from lfq_lightning.quantizer.saved import NOTE
from lfq_lightning.state_dicts import descriptions, fit_to
from lfq_lightning.training.optimizer import hidden_qparams
from lfq_lightning.training.sharding import shards
from lfq_lightning.training.wrapping import Wrappers


def meet_quantizers(
    wrappers: Wrappers,
    model: L.LightningModule,
    attach: Callable[[bool], None],
    arranged: Callable[[], AbstractContextManager[None]],
) -> None:
    """Attach quantizers, and wrap the module's hooks.

    Args:
        wrappers: what takes them off again.
        model: the module.
        attach: puts quantizers on layers; called with False now and with True when `configure_model` has made the rest.
        arranged: what `configure_optimizers` runs in.
    """
    before = set(hosts(model).values())
    attach(False)

    def configure_model(original: Any) -> None:
        with hidden_qparams(model):  # `fully_shard` leaves them whole
            original()
        try:
            attach(True)
        except Exception:
            for layer in hosts(model).values():
                if layer not in before:
                    restore_layer(layer)
            raise

    def configure_optimizers(original: Any) -> Any:
        with arranged():
            return original()

    def on_load_checkpoint(original: Any, checkpoint: dict[str, Any]) -> None:
        original(checkpoint)
        for key in ("state_dict", "current_model_state"):
            if key in checkpoint:
                checkpoint[key] = fit_to(model, checkpoint[key])
        if not shards(model.trainer):  # such a strategy has loaded the state dict by then, and taken it out
            check_loadable(model, checkpoint)

    wrappers.around(model, "configure_model", configure_model)
    wrappers.around(model, "configure_optimizers", configure_optimizers)
    wrappers.around(model, "on_load_checkpoint", on_load_checkpoint)


def note_on_checkpoints(wrappers: Wrappers, model: L.LightningModule) -> None:
    """Have every checkpoint of this module begin with `NOTE`, also those that ask no callback (weights only)."""
    wrappers.put(model, "on_save_checkpoint", _Noting(model.on_save_checkpoint))


class _Noting:
    """A module's `on_save_checkpoint` that adds the note; it is pickled and copied with the module."""

    def __init__(self, original: Callable[[dict[str, Any]], None]) -> None:
        self.original = original

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        self.original(checkpoint)
        add_note(checkpoint)


def add_note(checkpoint: dict[str, Any]) -> None:
    """Let the state dict of a quantized model begin with `NOTE`.

    A plain `MyModule.load_from_checkpoint` runs none of our code. What can speak there is a key that it does not know.
    """
    state_dict = checkpoint.get("state_dict")
    if isinstance(state_dict, Mapping) and NOTE not in state_dict and descriptions(state_dict):
        noted = OrderedDict([(NOTE, torch.zeros(0)), *state_dict.items()])
        noted.__dict__.update(getattr(state_dict, "__dict__", {}))  # the versions of modules
        checkpoint["state_dict"] = noted
