"""A LightningModule's own hooks, which must meet the quantizers in the right order and no gradient that is missing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lfq_lightning.checkpoint import attach_as_saved, check_loadable
from lfq_lightning.placement import Placement
from lfq_lightning.placement.planning import alike_but_at_ends
from lfq_lightning.placement.quantized_layer import quantized_layers, quantizers, restore_layer
from lfq_lightning.quantizer.saved import NOTE
from lfq_lightning.state_dicts import descriptions, fit_to, placement_of, spec_of
from lfq_lightning.training.hiding import any_parameter, hidden, hidden_qparams
from lfq_lightning.training.trainer.strategy import shards
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
    before = set(quantized_layers(model).values())
    attach(False)

    def configure_model(original: Any) -> None:
        with hidden_qparams(model):  # `fully_shard` leaves them whole
            original()
        try:
            attach(True)
        except Exception:
            for layer in quantized_layers(model).values():
                if layer not in before:
                    restore_layer(layer)
            raise

    def on_load_checkpoint(original: Any, checkpoint: dict[str, Any]) -> None:
        original(checkpoint)
        if model.trainer.state.fn != "fit" and isinstance(checkpoint.get("state_dict"), Mapping):
            _quantize_as_saved(model, checkpoint["state_dict"])
        for key in ("state_dict", "current_model_state"):
            if key in checkpoint:
                checkpoint[key] = fit_to(model, checkpoint[key])
        if not shards(model.trainer):  # such a strategy has loaded the state dict by then, and taken it out
            check_loadable(model, checkpoint)

    wrappers.around(model, "configure_model", configure_model)
    wrappers.within(model, "configure_optimizers", arranged)
    wrappers.around(model, "on_load_checkpoint", on_load_checkpoint)


def _quantize_as_saved(model: L.LightningModule, state_dict: Mapping[str, Any]) -> None:
    """Outside of a fit no batch shows what the model does: what the checkpoint holds says where it is quantized.

    A checkpoint of other bits than the callback asks for is left for `fit_to` to refuse.
    """
    saved = descriptions(state_dict)
    placed = {name: quantizer for name, quantizer in quantizers(model).items() if quantizer.site is not None}
    if any(quantizer.learned or quantizer.saw_data() for quantizer in placed.values()):
        return
    both = ((placed[name].spec, spec_of(name, saved[name])) for name in placed.keys() & saved.keys())
    if all(alike_but_at_ends(*specs) for specs in both) and any(d.site is not None for d in saved.values()):
        attach_as_saved(model, saved, strict=False)


def as_placed(model: L.LightningModule, planned: Placement) -> Placement | None:
    """What a model is quantized as already, where that is what was planned for it without a flow; None elsewhere.

    A flow shows more than types do: operands, parameters that functions read, and which layers are first and last.
    """
    found = placement_of(descriptions(model.state_dict()))
    own = {(layer.name, layer.parameter): layer for layer in found.layers}
    for layer in planned.layers:
        other = own.get((layer.name, layer.parameter))
        specs = () if other is None else ((layer.weight, other.weight), (layer.activation, other.activation))
        if not all(alike_but_at_ends(*both) for both in specs):
            return None
    return found if found.layers or found.operands else None


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


def complete_gradients(wrappers: Wrappers, model: L.LightningModule, apart: bool) -> None:
    """See to it that a loop over `self.parameters()` that takes every gradient for given works as it does in float.

    Outside `learn`, and in frozen layers, qparams have no gradient. The module's hooks do not meet those then, and
    where gradients are clipped they do not meet any that has an optimizer of its own: clipping is for the others. After
    `manual_backward`, which a loop of the user's own may follow, what is missing is zero.

    Args:
        wrappers: what takes the arrangement off again.
        model: the module, whose optimizers are made.
        apart: whether qparams have an optimizer of their own.
    """
    found = list(quantizers(model).values())

    def manual_backward(original: Any, *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        for parameter in (p for quantizer in found for p in quantizer.parameters(recurse=False) if _is_missing(p)):
            parameter.grad = torch.zeros_like(parameter)

    for name in ("on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping"):
        if is_overridden(name, model):  # others do not look
            every = apart and name == "configure_gradient_clipping"
            wrappers.within(model, name, partial(hidden, found, any_parameter if every else _is_missing))
    if not model.automatic_optimization:
        wrappers.around(model, "manual_backward", manual_backward)


def _is_missing(parameter: Tensor) -> bool:
    return parameter.grad is None
