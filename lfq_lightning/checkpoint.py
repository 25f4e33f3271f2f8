"""What a quantized state dict holds, and loading it anywhere."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import lightning as L
import torch
from torch import Tensor, nn

from lfq_lightning.placement import PlacedLayer, Placement, apply
from lfq_lightning.placement.host import INPUT, WEIGHT, plain_name, quantizers
from lfq_lightning.reading import read_checkpoint
from lfq_lightning.spec import QuantSpec

Module = TypeVar("Module", bound=L.LightningModule)
Manifest = dict[str, QuantSpec]

_EXTRA = "._extra_state"


def manifest(state_dict: Mapping[str, Any]) -> Manifest:
    """The specification of each quantizer in a state dict, by the quantizer's dotted name; empty for a float model.

    It needs no file of its own: each quantizer's extra state holds its specification, so the plain state dict, a
    checkpoint with `save_weights_only=True` and a full checkpoint all say what they are.
    """
    found = {}
    for key, value in state_dict.items():
        name = plain_name(key.removesuffix(_EXTRA))
        if key.endswith(_EXTRA) and _is_quantizer(name) and isinstance(value, Mapping) and value.get("spec"):
            try:
                found[name] = QuantSpec(**value["spec"])
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"A checkpoint must say how {name} quantizes. Found {value['spec']}, which is no QuantSpec here "
                    f"({error}): load it with the version of lfq_lightning that saved it."
                ) from error
    return found


def _is_quantizer(name: str) -> bool:
    return name.rpartition(".")[2] in (WEIGHT, INPUT)


def _belongs_to_quantizer(key: str) -> bool:
    return any(part in (WEIGHT, INPUT) for part in key.split("."))


def without_quantizers(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The float model's part of a state dict."""
    return {key: value for key, value in state_dict.items() if not _belongs_to_quantizer(key)}


def fit_to(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict that loads strictly into a model, from a float or quantized one.

    A float state dict takes the model's own quantizers along; quantizers that a float model has no place for are left
    out; keys are compared without what torch.compile puts into them.

    Raises:
        ValueError: if both are quantized and differently (both are shown).
    """
    own_names = {plain_name(key): key for key in model.state_dict()}
    state_dict = {own_names.get(plain_name(key), key): value for key, value in state_dict.items()}
    here = {n: q.spec for n, q in quantizers(model).items()}
    saved = manifest(state_dict)
    if not here:
        return without_quantizers(state_dict)
    if not saved:
        own = {key: value for key, value in model.state_dict().items() if _belongs_to_quantizer(key)}
        return {**state_dict, **own}
    # A shared quantizer has a name for each of its layers in a state dict, and one in the model.
    every = {plain_name(k.removesuffix(_EXTRA)) for k in model.state_dict() if k.endswith(_EXTRA)}
    differences = [
        f"{name}: the checkpoint has {saved.get(name, 'float')}, the model has {here.get(name, 'float')}"
        for name in sorted(saved.keys() | here.keys())
        if saved.get(name) != here.get(name) and not (name in every and name in saved and name not in here)
    ]
    if differences:
        shown = "\n  ".join(differences[:10] + ["..."] * (len(differences) > 10))
        raise ValueError(
            "A checkpoint must be quantized as the model is. Found these differences:\n  "
            f"{shown}\nGive the callback (or `attach`) the settings that the checkpoint was trained with, or start "
            "from its float weights with `lfq_lightning.load_state_dict` into a model before `attach`."
        )
    return dict(state_dict)


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
    if model.strict_loading and not any(module._load_state_dict_pre_hooks for module in model.modules()):
        _check_fits(model, checkpoint["state_dict"])


def _check_fits(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    own = model.state_dict()
    problems = [f"missing {key}" for key in own if key not in state_dict]
    problems += [f"unexpected {key}" for key in state_dict if key not in own]
    problems += [
        f"{key} is no tensor but {type(state_dict[key]).__name__}"
        for key, value in own.items()
        if isinstance(value, Tensor) and not isinstance(state_dict.get(key, value), Tensor)
    ]
    problems += [
        f"{key} has shape {tuple(state_dict[key].shape)} for {tuple(value.shape)}"
        for key, value in own.items()
        if hasattr(value, "shape") and hasattr(state_dict.get(key), "shape") and state_dict[key].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(
            f"The state dict must fit {type(model).__name__}. Found {'; '.join(problems[:10])}{more}: build the model "
            "with the arguments that it was saved with."
        )


def attach_manifest(model: nn.Module, specs: Manifest) -> None:
    """Quantize a model as a checkpoint was."""
    layers: dict[str, dict[str, QuantSpec]] = {}
    for name, spec in specs.items():
        host, _, role = name.rpartition(".")
        layers.setdefault(host, {})[role] = spec
    modules = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    missing = [name for name in layers if name not in modules]
    if missing:
        raise ValueError(
            f"The checkpoint quantizes layers that the model has not. Found {', '.join(missing[:5])}: build the model "
            "with the arguments that it was saved with."
        )
    placed: dict[int, PlacedLayer] = {}
    for name, by_role in layers.items():
        layer = PlacedLayer(name, type(modules[name]).__name__, by_role.get(WEIGHT), by_role.get(INPUT))
        placed.setdefault(id(modules[name]), layer)
    apply(model, Placement(tuple(placed.values())))


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
        path: a checkpoint of a quantization-aware fit; one of a float fit gives the float module.
        map_location: where tensors go, as in `torch.load`.
        strict: whether keys must fit; None for what the module's `strict_loading` says.
        weights_only: as in `torch.load`; False for a trusted file whose hyper-parameters are objects of any class.
        **init_args: constructor arguments that are not among the checkpoint's hyper-parameters.

    Returns:
        The module in eval mode with its quantizers, in the phase that it was saved in.

    Raises:
        ValueError: if the file is no checkpoint or does not fit the class.

    Example:
        >>> model = lfq.load_from_checkpoint(MyModule, "best.ckpt")  # doctest: +SKIP
    """
    checkpoint = read_checkpoint(path, map_location, weights_only)
    if "pytorch-lightning_version" not in checkpoint:
        raise ValueError(
            f"{path} must be saved by a Lightning Trainer. Found the keys {', '.join(map(str, checkpoint))}: build the "
            "model, and use `load_state_dict`."
        )
    saved = checkpoint["state_dict"]
    as_float = io.BytesIO()
    torch.save({**checkpoint, "state_dict": without_quantizers(saved)}, as_float)
    as_float.seek(0)
    how = {"map_location": map_location, "strict": strict, "weights_only": weights_only}
    model = module_class.load_from_checkpoint(as_float, **how, **init_args)
    specs = manifest(saved)
    if specs:
        attach_manifest(model, specs)
        fitted, strict = fit_to(model, saved), model.strict_loading if strict is None else strict
        if strict:
            check_loadable(model, {"state_dict": fitted})
        model.load_state_dict(fitted, strict=strict)
    return model.eval()
