"""What a state dict says of a quantizer beside its tensors, as one tensor, and how it is read again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Role = Literal["weight", "input", "operand", "output"]

# The first key of a quantized checkpoint. A model without quantizers does not know it, and torch names it first.
NOTE = "quantized by lfq_lightning: use lfq_lightning.load_from_checkpoint, or QuantizationAwareTraining as a callback"

_MARK = '{"quantizer": "lfq_lightning"'
_NUMBERS = 10


@dataclass(frozen=True)
class Place:
    """What a quantizer stands before, where that is not the `weight` or the input of the layer that holds it.

    Args:
        parameter: the own name of the parameter, of the module that holds the quantizer.
        readers: the modules whose own code reads the parameter by a function, as paths from the module that holds the
            quantizer ("." is that module itself, ".." the one around it); empty where a layer reads its own.
        call: the call in the holder's own code whose operand it is, such as `add_1`; empty for a parameter's.
        operand: the operand's name.
        features: of an activation, the dimension of its features, counted from the last.
        size: how many these are; None where the layer knows.
        also: other places that read the same tensor or have the same parameter: for each, the path to the module that
            holds the quantizer too, the parameter there, call and operand; what does not apply is empty.
    """

    parameter: str = "weight"
    readers: tuple[str, ...] = ()
    call: str = ""
    operand: str = ""
    features: int = -1
    size: int | None = None
    also: tuple[tuple[str, str, str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what is at its default is left out."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Place:
        """What `to_dict` gave, through JSON."""
        known: dict[str, Any] = dict(values)
        for name in ("readers", "also"):
            known[name] = tuple(tuple(v) if isinstance(v, list) else v for v in known.get(name, ()))
        return cls(**known)


@dataclass(frozen=True)
class Description:
    """A quantizer's phase, range and specification, which are together what a checkpoint needs to be made anew.

    Args:
        switches: fake_quant_enabled, static_enabled and learning_enabled.
        estimated: whether the qparams were ever set from the observer.
        learned: whether the qparams have begun to learn.
        late: whether it had no range when the others began to learn.
        quant_min: smallest integer code.
        quant_max: largest integer code.
        axis: the dimension with one scale per index, or None.
        role: what it quantizes; None where only the user who has placed it knows.
        site: the module in whose forward the tensor is read, as a dotted name below the module that holds the
            quantizer; empty for that module itself. None for a quantizer that the user has placed.
        spec: the fields of its QuantSpec, or None without one.
        place: what it stands before.
    """

    switches: tuple[bool, bool, bool]
    estimated: bool
    learned: bool
    late: bool
    quant_min: int
    quant_max: int
    axis: int | None
    role: Role | None
    site: str | None
    spec: dict[str, Any] | None
    place: Place = Place()

    def to_tensor(self, device: torch.device | None = None) -> Tensor:
        """Float32, of a size that does not change while a model trains: ten numbers, then text in ASCII.

        What changes in training is numbers, and all are whole and small, so that loops over a state dict may treat
        this entry as they treat weights: clone it, cast it, average it. A mean of equal entries is that entry again;
        of different phases it is one of them.
        """
        ends = (*divmod(self.quant_min, 256), *divmod(self.quant_max, 256))
        # Files of shards load into tensors of the same length, so what goes without saying is left out.
        role, site = (None, {}) if self.site is None else (self.role, {"site": self.site} if self.site else {})
        place = {} if self.place == Place() else {"place": self.place.to_dict()}
        kind = {"axis": self.axis, "is_weight": self.role == "weight", "role": role}
        constants = {**kind, **site, **place, "spec": self.spec}
        text = f"{_MARK}, {json.dumps(constants)[1:]}"
        numbers = [*self.switches, self.estimated, self.learned, self.late, *ends, *text.encode("ascii")]
        return torch.tensor(numbers, dtype=torch.float32, device=device)


def described(value: Any) -> Description | None:
    """What an extra state says; None where it is not that of a quantizer.

    Args:
        value: what `Description.to_tensor` made, in any floating dtype and on any device; or, of earlier files, a
            mapping, which does not know the role.
    """
    if isinstance(value, Mapping):
        known = "switches" in value and "quant_max" in value
        return _of_numbers(_listed(value), value) if known else None
    if not isinstance(value, Tensor) or value.is_meta or value.ndim != 1 or value.numel() <= _NUMBERS + len(_MARK):
        return None
    if _text(value[_NUMBERS : _NUMBERS + len(_MARK)]) != _MARK:
        return None
    try:
        constants = json.loads(_text(value[_NUMBERS:]))
        return _of_numbers([round(number) for number in value[:_NUMBERS].tolist()], constants)
    except (ValueError, OverflowError):  # no JSON, or no number
        return None


def role_in_name(name: str) -> Role | None:
    """The role that a quantizer's name tells, as `attach` gives names.

    For rows of a record, and checkpoints from before roles were saved: nothing else there says it. Whoever has the
    quantizer or its description asks these.
    """
    return next((role for role in get_args(Role) if name.rpartition(".")[2] == f"{role}_quantizer"), None)


def site_in_model(name: str, site: str | None) -> str:
    """The dotted name in a model of a quantizer's site, from the quantizer's own name there."""
    return ".".join(filter(None, (name.rpartition(".")[0], site)))


def _of_numbers(numbers: list[int], constants: Mapping[str, Any]) -> Description:
    fake_quant, static, learning, estimated, learned, late = (bool(number) for number in numbers[:6])
    role = constants.get("role")
    return Description(
        (fake_quant, static, learning),
        estimated,
        learned,
        late,
        quant_min=256 * numbers[6] + numbers[7],
        quant_max=256 * numbers[8] + numbers[9],
        axis=constants.get("axis"),
        role=role or ("weight" if constants.get("is_weight") else None),
        site=None if role is None else constants.get("site", ""),
        spec=constants.get("spec"),
        place=Place.of(constants.get("place", {})),
    )


def _listed(state: Mapping[str, Any]) -> list[int]:
    """The numbers of a mapping."""
    ends = (*divmod(state["quant_min"], 256), *divmod(state["quant_max"], 256))
    return [*state["switches"], state["estimated"], state["learned"], state.get("late", False), *ends]


def _text(codes: Tensor) -> str:
    return bytes(codes.detach().float().nan_to_num().round().clamp(0, 127).to(torch.uint8).tolist()).decode("ascii")
