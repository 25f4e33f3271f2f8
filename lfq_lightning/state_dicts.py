"""What a state dict holds of quantizers, and the state dict that fits a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from lfq_lightning.placement.meeting import input_name, operand_name, weight_name
from lfq_lightning.placement.paths import follow
from lfq_lightning.placement.placed import PlacedLayer, PlacedOperand, Placement
from lfq_lightning.private import plain_name
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.quantizer.saved import NOTE, Description, described, role_in_name, site_in_model
from lfq_lightning.spec import QuantSpec

Descriptions = dict[str, Description]

_EXTRA = "._extra_state"


def descriptions(state_dict: Mapping[str, Any]) -> Descriptions:
    """What a state dict says of each quantizer, by the quantizer's dotted name; empty for a float model.

    It needs no file of its own: each quantizer's extra state describes it, so the plain state dict, a checkpoint with
    `save_weights_only=True` and a full checkpoint all say what they are. Names play no part, but in files from before
    roles were saved.
    """
    found = {}
    for key, value in state_dict.items():
        description = described(value) if key.endswith(_EXTRA) else None
        if description is not None:
            name = plain_name(key.removesuffix(_EXTRA))
            if isinstance(value, Mapping):
                role = role_in_name(name)
                description = replace(description, role=role, site=None if role is None else "")
            found[name] = description
    return found


def spec_of(name: str, description: Description) -> QuantSpec | None:
    """The specification of a quantizer in a state dict; None for one that was made without.

    Raises:
        ValueError: if it is none here.
    """
    if description.spec is None:
        return None
    try:
        return QuantSpec(**description.spec)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"A checkpoint must say how {name} quantizes. Found {description.spec}, which is no QuantSpec here "
            f"({error}): load it with the version of lfq_lightning that saved it."
        ) from error


def stored_quantizer(
    name: str, description: Description, state_dict: Mapping[str, Any]
) -> LearnableFakeQuantize | None:
    """A quantizer made anew from a state dict; None for one that the user's own code made without a specification.

    Raises:
        ValueError: if the state dict does not hold all of it.
    """
    spec = spec_of(name, description)
    if spec is None:
        return None
    state = {key.removeprefix(f"{name}."): value for key, value in state_dict.items() if key.startswith(f"{name}.")}
    try:
        channels = None if spec.has_one_scale else state["scale"].numel()
        weight, axis = description.role == "weight", description.axis
        made = LearnableFakeQuantize.from_spec(spec, channels, weight=weight, axis=axis)
        made.load_state_dict(state)
    except (KeyError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"A checkpoint must hold all of a quantizer. Found another state for {name} ({error}): load it with the "
            "version of lfq_lightning that saved it."
        ) from error
    return made


def other_names(saved: Descriptions) -> dict[str, str]:
    """Of quantizers that `attach` has put under several names: each further name, and the first."""
    found: dict[str, str] = {}
    for name, description in saved.items():
        if name in found or description.site is None:
            continue
        holder = site_in_model(name, description.site)
        for path, parameter, call, operand in description.place.also:
            name_of = weight_name if description.role == "weight" else input_name
            child = operand_name(call, operand) if call else name_of(parameter)
            found[".".join(filter(None, (follow(holder, path), child)))] = name
    return found


def placement_of(saved: Descriptions) -> Placement:
    """What `attach` has placed where in the model that was saved; what was left in float a file does not know.

    Raises:
        ValueError: if a specification is none here.
    """
    layers: dict[tuple[str, str], dict[str, Any]] = {}
    operands: list[PlacedOperand] = []
    known = other_names(saved)

    def layer(holder: str, parameter: str, **settings: Any) -> None:
        start = {"weight": None, "activation": None}
        layers.setdefault((holder, parameter), start).update(settings)

    for name, description in saved.items():
        spec = None if description.site is None else spec_of(name, description)
        if spec is None or name in known:
            continue
        holder, place, role = site_in_model(name, description.site), description.place, description.role
        features = {"features": place.features, "inputs": place.size}
        if role == "output":
            operands.append(PlacedOperand(holder, "", "output", "output", spec))
        elif place.call:
            kind: Literal["weight", "operand"] = "weight" if role == "weight" else "operand"
            axis = description.axis if role == "weight" else place.features
            operands.append(PlacedOperand(holder, place.call, place.operand, kind, spec, axis, place.size))
        elif role == "weight":
            readers = tuple(follow(holder, reader) for reader in place.readers)
            layer(holder, place.parameter, weight=spec, readers=readers, axis=description.axis)
        else:
            layer(holder, place.parameter, activation=spec, **features)
        for path, parameter, call, operand in place.also:
            other = follow(holder, path)
            if call:
                more = PlacedOperand(other, call, operand, "operand", spec, place.features, place.size, name)
                operands.append(more)
            elif role == "weight":
                layer(other, parameter, weight=spec, axis=description.axis)
            else:
                layer(other, parameter, activation=spec, **features, shares=name)
    order = {name: place for place, name in enumerate(saved)}  # in which the modules' children stood
    operands.sort(key=lambda o: order.get(o.quantizer_name, len(order)))
    made = (PlacedLayer(holder, "", parameter=own, **settings) for (holder, own), settings in layers.items())
    return Placement(tuple(made), operands=tuple(operands))


def belonging(names: Iterable[str]) -> Callable[[str], bool]:
    """Whether a key of a state dict belongs to one of these quantizers."""
    known = set(names)

    def belongs(key: str) -> bool:
        path = plain_name(key)
        while path:
            path = path.rpartition(".")[0]
            if path in known:
                return True
        return False

    return belongs


def without_quantizers(state_dict: Mapping[str, Any], only_placed: bool = False) -> dict[str, Any]:
    """The float model's part of a state dict.

    Args:
        state_dict: of any model.
        only_placed: keep the quantizers that the user has placed, which are part of the model's own code.
    """
    left_out = [name for name, d in descriptions(state_dict).items() if d.site is not None or not only_placed]
    belongs = belonging(left_out)
    return {key: value for key, value in state_dict.items() if key != NOTE and not belongs(key)}


def under_own_names(own: Mapping[str, Any], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under the keys of another, which may differ by what torch.compile puts into them."""
    own_names = {plain_name(key): key for key in own}
    return {own_names.get(plain_name(key), key): value for key, value in state_dict.items() if key != NOTE}


def fit_to(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict that loads strictly into a model, from a float or quantized one.

    A float state dict takes the model's own quantizers along; quantizers that a float model has no place for are left
    out; keys are compared without what torch.compile puts into them. Quantizers that `attach` put on layers and those
    that the user has placed count apart.

    Raises:
        ValueError: if both are quantized and differently (both are shown).
    """
    own = model.state_dict()
    fitted = under_own_names(own, state_dict)
    here, saved = descriptions(own), descriptions(fitted)
    differences: list[str] = []
    for placed in (True, False):
        mine, theirs = (
            {name: d for name, d in found.items() if (d.site is not None) is placed} for found in (here, saved)
        )
        if not mine:
            belongs = belonging(theirs)
            fitted = {key: value for key, value in fitted.items() if not belongs(key)}
        elif not theirs:
            belongs = belonging(mine)
            fitted |= {key: value for key, value in own.items() if belongs(key)}
        else:
            differences += _differences(mine, theirs)
    if differences:
        shown = "\n  ".join(differences[:10] + ["..."] * (len(differences) > 10))
        raise ValueError(
            "A checkpoint must be quantized as the model is. Found these differences:\n  "
            f"{shown}\nGive the callback (or `attach`) the settings that the checkpoint was trained with, or start "
            "from its float weights with `lfq_lightning.load_state_dict` into a model before `attach`."
        )
    return fitted


def _computed(spec: QuantSpec | None) -> QuantSpec | str:
    return "no QuantSpec" if spec is None else spec.with_usual_steps()


def _differences(mine: Descriptions, theirs: Descriptions) -> list[str]:
    specs = [
        {name: _computed(spec_of(name, description)) for name, description in found.items()} for found in (mine, theirs)
    ]
    return [
        f"{name}: the checkpoint has {specs[1].get(name, 'float')}, the model has {specs[0].get(name, 'float')}"
        for name in sorted(mine.keys() | theirs.keys())
        if specs[0].get(name) != specs[1].get(name)
    ]
