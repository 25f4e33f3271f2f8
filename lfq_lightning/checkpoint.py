"""Loading states of float and quantized models, into each other and anywhere."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import lightning as L
import torch
from torch import Tensor, nn

from lfq_lightning.checking import check_flags, check_model, in_words
from lfq_lightning.observers.passing import lasting
from lfq_lightning.placement import PlacedLayer, Placement, apply
from lfq_lightning.private import converts_when_loading, plain_name
from lfq_lightning.quantizer.saved import described
from lfq_lightning.reading import read_checkpoint
from lfq_lightning.running import explained
from lfq_lightning.state_dicts import (
    Descriptions,
    descriptions,
    fit_to,
    placement_of,
    under_own_names,
    without_quantizers,
)

Module = TypeVar("Module", bound=L.LightningModule)


def load_state_dict(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Load a float or quantized state dict into a float or quantized model, strict about everything else.

    Float into quantized keeps the model's quantizers as they are; quantized into float takes the weights alone.

    Args:
        model: any module.
        checkpoint: a state dict, or a Lightning checkpoint that holds one.

    Raises:
        ValueError: if both are quantized and differently, or keys or shapes do not fit. The model is unchanged then.

    Example:
        >>> import torch, lfq_lightning as lfq
        >>> trained = torch.nn.Sequential(torch.nn.Linear(4, 2)).state_dict()
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> _ = lfq.attach(model)
        >>> lfq.load_state_dict(model, trained)
    """
    check_model(model)
    state_dict = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, Mapping) else None
    if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
        raise ValueError(
            "`checkpoint` must be a state dict or a Lightning checkpoint. Found "
            f"{type(checkpoint).__name__}: pass what `torch.load` or `model.state_dict()` gave."
        )
    fitted = fit_to(model, state_dict)
    _check_fits(model, fitted)
    model.load_state_dict(fitted)


def check_loadable(model: L.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that does not fit before any of it is copied, where loading is strict and does not convert.

    Raises:
        ValueError: if it has no state dict, or keys or shapes do not fit.
    """
    if not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ValueError(
            f"A checkpoint must hold a `state_dict`. Found the keys {', '.join(map(str, checkpoint))}: pass one that a "
            "Lightning Trainer has saved."
        )
    if model.strict_loading and not converts_when_loading(model):
        _check_fits(model, checkpoint["state_dict"])


def _check_fits(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    own, state_dict = lasting(model.state_dict()), lasting(state_dict)
    problems = [f"missing {key}" for key in own if key not in state_dict]
    problems += [f"unexpected {key}" for key in state_dict if key not in own]
    misfits = ((key, _misfit(value, state_dict[key])) for key, value in own.items() if key in state_dict)
    problems += [f"{key} {found}" for key, found in misfits if found]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(
            f"The state dict must fit {type(model).__name__}. Found {'; '.join(problems[:10])}{more}: build the model "
            "with the arguments that it was saved with."
        )


def _misfit(own: Any, other: Any) -> str:
    if described(own) is not None:  # its length is of no matter: a file may be older
        return "" if described(other) is not None else "describes no quantizer"
    if isinstance(own, Tensor) and not isinstance(other, Tensor):
        return f"is no tensor but {type(other).__name__}"
    if hasattr(own, "shape") and hasattr(other, "shape") and own.shape != other.shape:
        return f"has shape {tuple(other.shape)} for {tuple(own.shape)}"
    return ""


def attach_as_saved(model: nn.Module, saved: Descriptions, strict: bool = True) -> None:
    """Quantize a model as a checkpoint was.

    Args:
        model: whose own code has placed the quantizers of users already.
        saved: what the checkpoint says.
        strict: False leaves out layers that the model has not.

    Raises:
        ValueError: if it has not all layers, and strict.
    """
    modules = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    placement = placement_of(saved)
    missing = [layer.label for layer in placement.layers if not _has(modules, layer)]
    missing += [operand.label for operand in placement.operands if operand.module not in modules]
    if missing and strict:
        raise ValueError(
            f"The checkpoint quantizes layers that the model has not. Found {', '.join(missing[:5])}: build the model "
            "with the arguments that it was saved with."
        )
    layers = [layer for layer in placement.layers if _has(modules, layer)]
    once = {(id(modules[layer.name]), layer.parameter): layer for layer in reversed(layers)}
    operands = tuple(operand for operand in placement.operands if operand.module in modules)
    apply(model, Placement(tuple(reversed(once.values())), operands=operands))


def _has(modules: Mapping[str, nn.Module], layer: PlacedLayer) -> bool:
    return isinstance(getattr(modules.get(layer.name), layer.parameter, None), Tensor)


def load_from_checkpoint(
    module_class: type[Module],
    path: str | Path | IO[bytes],
    map_location: Any = None,
    *,
    strict: bool | None = None,
    weights_only: bool | None = None,
    **init_args: Any,
) -> Module:
    """Rebuild a quantized LightningModule from a checkpoint, without the callback at hand.

    Args:
        module_class: the LightningModule's class.
        path: a checkpoint of a quantization-aware fit; one of a float fit gives the float module. A path, a URL, any
            path that fsspec knows (`s3://...`), or an open file.
        map_location: where tensors go, as in `torch.load`.
        strict: whether keys must fit; None for what the module's `strict_loading` says. False leaves out quantizers
            of layers that the module has not.
        weights_only: as in `torch.load`; False for a trusted file whose hyper-parameters are objects of any class.
        **init_args: constructor arguments that are not among the checkpoint's hyper-parameters.

    Returns:
        The module with its quantizers, in the phase that they were saved in, and in the mode that Lightning's own
        leaves it in, which is train mode: call `eval()` before it is used.

    Raises:
        ValueError: if the file is no checkpoint or does not fit the class.

    Example:
        >>> model = lfq.load_from_checkpoint(MyModule, "best.ckpt")  # doctest: +SKIP
    """
    if not (isinstance(module_class, type) and issubclass(module_class, L.LightningModule)):
        raise TypeError(
            f"`module_class` must be a LightningModule's class. Found {in_words(module_class)}: pass its class."
        )
    given = {"strict": strict, "weights_only": weights_only}
    check_flags(**{name: flag for name, flag in given.items() if flag is not None})
    checkpoint = read_checkpoint(path, map_location, weights_only)
    if "pytorch-lightning_version" not in checkpoint:
        raise ValueError(
            f"{path} must be saved by a Lightning Trainer. Found the keys {', '.join(map(str, checkpoint))}: build the "
            "model, and use `load_state_dict`."
        )
    state = checkpoint["state_dict"]
    saved = descriptions(state)
    as_float = io.BytesIO()
    torch.save({**checkpoint, "state_dict": without_quantizers(state, only_placed=True)}, as_float)
    as_float.seek(0)
    how = {"map_location": map_location, "strict": strict, "weights_only": weights_only}
    with explained(f"{module_class.__name__} is made from its hyper-parameters and `init_args`", init_args, "by name"):
        try:
            model = module_class.load_from_checkpoint(as_float, **how, **init_args)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            reason = " ".join(str(error).split())
            raise ValueError(
                f"The checkpoint must fit {module_class.__name__}. Found another in {path} ({reason:.500}): build the "
                "model with the arguments that it was saved with."
            ) from error
    if saved:
        strict = model.strict_loading if strict is None else strict
        attach_as_saved(model, saved, strict)
        fitted = fit_to(model, state) if strict else under_own_names(model.state_dict(), state)
        if strict:
            check_loadable(model, {"state_dict": fitted})
        model.load_state_dict(fitted, strict=strict)
    return model
