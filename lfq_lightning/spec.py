"""What a quantizer is: bits, range, granularity and learning rule, as plain values."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, final, get_args

from lfq_lightning.checking import in_words
from lfq_lightning.ops import Saturation, check_range
from lfq_lightning.schedule import PhaseSchedule

Granularity = Literal["per_tensor", "per_channel", "per_group", "per_token"]
ObserverName = Literal["minmax", "moving_average", "percentile", "mse", "lsq", "lsq+"]
ScaleDomain = Literal["linear", "log", "power_of_two"]
Kind = TypeVar("Kind", bound=type)


def plain_object(kind: Kind) -> Kind:
    """Keep OmegaConf from taking a dataclass for a schema.

    It does wherever it meets one, in a list or mapping that Hydra instantiates without `_convert_`, and its schemas
    know no unions.
    """
    delattr(kind, "__dataclass_fields__")
    return kind


@plain_object
@final  # jsonargparse then takes the fields alone, without a class path
@dataclass(frozen=True)
class QuantSpec:
    """One quantizer's settings.

    Args:
        bits: width of the integer codes, 2 to 16.
        symmetric: True fixes the zero point at 0; False (affine) learns it, with unsigned codes.
        granularity: which elements share one scale. "per_token", for inputs of layers with features in their last
            dimension: each vector of features has the scale of its own range, in training and afterwards, and nothing
            is learned of it (dynamic quantization).
        axis: with "per_channel", the dimension with one scale per index; None for the output channels of a weight
            and the channels of an activation, which are the last dimension for a Linear, and the one before the
            spatial ones for a convolution.
        group_size: with "per_group", how many neighbouring inputs of a weight share one scale.
        signed: for a symmetric quantizer, whether codes are signed; None decides from the data (a weight is signed).
        quant_min: smallest code, with `quant_max`, in place of the range that `bits` gives; -7 and 7 with 4 bits are
            the narrow range.
        quant_max: largest code.
        observer: how the first range is found. "mse": the least mean-square error; "minmax": all that was seen;
            "moving_average": an exponential moving average of the batches' ranges; "percentile": all but outliers;
            "lsq": LSQ's 2 E|x| / sqrt(quant_max); "lsq+": LSQ+'s, 3 sigma for symmetric and "mse" for affine codes.
        grad_factor: multiplies the qparams' gradients. "lsq": 1 / sqrt(N * max(|quant_min|, |quant_max|)), with N the
            elements that share one scale, the batch not counted (Esser et al. 2020, section 2.2).
        saturation: which elements count as saturated in the gradients; see `lfq_lightning.fake_quantize`. None takes
            the rule of the scale's domain: "exclusive" for "power_of_two" (Jain et al. 2020, equation 7), else "lsq".
        scale_domain: how the callback's optimizer steps a scale s. "linear": s itself (LSQ); "log": log2 s (TQT, Jain
            et al. 2020); "power_of_two": log2 s, and the scale used is 2^round(log2 s), for hardware that shifts. An
            optimizer of your own, without the callback, steps s itself in each.
        learn_zero_point: whether an affine quantizer's zero point learns (LSQ+), or stays as it was estimated.
        lr_factor: multiplies the steps that the optimizer takes on a weight while it is quantized, under the callback.
            A code changes when its weight has crossed half a quantization step, twice as long with each bit less.
            "path": below 4 bits, what a weight needs to travel 4 quantization steps on average in what is left of the
            run, as measured in its first quantized steps, and from 1 to 8; else 1. "bits": 8 at 2 bits, 4 at 3, else 1,
            whatever the run. Three codes are 2 bits, whatever `bits` says.

    Raises:
        TypeError: if a value has the wrong type.
        ValueError: if a value is out of range or two contradict each other.

    Example:
        >>> from lfq_lightning import QuantSpec
        >>> QuantSpec(bits=4, granularity="per_channel")
        QuantSpec(bits=4, granularity='per_channel')
    """

    bits: int = 8
    symmetric: bool = True
    granularity: Granularity = "per_tensor"
    axis: int | None = None
    group_size: int | None = None
    signed: bool | None = None
    quant_min: int | None = None
    quant_max: int | None = None
    observer: ObserverName = "mse"
    grad_factor: float | Literal["lsq"] = "lsq"
    saturation: Saturation | None = None
    scale_domain: ScaleDomain = "linear"
    learn_zero_point: bool = True
    lr_factor: float | Literal["path", "bits"] = "path"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise TypeError(f"`bits` must be an int. Found {self.bits!r} of type {type(self.bits).__name__}.")
        if not 2 <= self.bits <= 16:
            remedy = "2 are the fewest" if self.bits < 2 else "leave the module in float with None"
            raise ValueError(f"`bits` must be between 2 and 16. Found {self.bits}: {remedy}.")
        for name in ("symmetric", "signed", "learn_zero_point"):
            if not isinstance(getattr(self, name), bool) and not (name == "signed" and self.signed is None):
                raise TypeError(f"`{name}` must be true or false. Found {getattr(self, name)!r}.")
        if self.saturation is None:
            object.__setattr__(self, "saturation", self._usual_saturation)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(choices)}. Found {getattr(self, name)!r}.")
        self._check_granularity()
        self._check_range()
        self._check_factor("grad_factor", "lsq")
        self._check_factor("lr_factor", "path", "bits")

    def _check_factor(self, name: str, *words: str) -> None:
        value, allowed = getattr(self, name), " or ".join(f'"{word}"' for word in words)
        if value in words:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise TypeError(f"`{name}` must be {allowed} or a number. Found {value!r}.")
        if isinstance(value, str) or not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be {allowed} or a positive number. Found {value!r}.")
        object.__setattr__(self, name, float(value))

    def _check_granularity(self) -> None:
        for name in ("axis", "group_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"`{name}` must be an int. Found {value!r} of type {type(value).__name__}.")
        if (self.group_size is not None) != (self.granularity == "per_group"):
            raise ValueError(
                f"`group_size` goes with granularity 'per_group'. Found group_size={self.group_size} with "
                f"{self.granularity!r}: give both or neither."
            )
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"`group_size` must be at least 1. Found {self.group_size}: 32, 64 and 128 are usual.")
        if self.axis is not None and self.granularity != "per_channel":
            raise ValueError(
                f"`axis` goes with granularity 'per_channel'. Found axis={self.axis} with {self.granularity!r}."
            )

        if self.granularity == "per_token":
            self._check_nothing_to_learn()

    def _check_nothing_to_learn(self) -> None:
        usual = {p.name: p.default for p in inspect.signature(QuantSpec).parameters.values()}
        of_learning = ("observer", "grad_factor", "scale_domain", "learn_zero_point", "lr_factor", "signed")
        given = [name for name in of_learning if getattr(self, name) != usual[name]]
        if given:
            raise ValueError(
                f"Each token brings its own scale, of which nothing is learned. Found {given[0]}="
                f"{getattr(self, given[0])!r} with 'per_token': leave it out."
            )
        ends = self.quant_min, self.quant_max
        if self.symmetric and None not in ends and not (ends[0] or 0) < 0 < (ends[1] or 0):
            raise ValueError(
                "Symmetric codes of tokens have both signs, as what is yet to come may. Found quant_min="
                f"{self.quant_min} and quant_max={self.quant_max}: leave them out, or use symmetric=False."
            )

    def _check_range(self) -> None:
        if not self.symmetric and self.signed:
            raise ValueError(
                "An affine quantizer (symmetric=False) has unsigned codes. Found signed=True: leave it out."
            )
        if (self.quant_min is None) != (self.quant_max is None):
            raise ValueError(f"Give `quant_min` and `quant_max` together. Found {self.quant_min} and {self.quant_max}.")
        if self.quant_min is not None and self.quant_max is not None:
            check_range(self.quant_min, self.quant_max)
            if self.quant_max - self.quant_min >= 2**self.bits:
                raise ValueError(
                    f"{self.bits} bits hold {2**self.bits} codes. Found quant_min={self.quant_min} and quant_max="
                    f"{self.quant_max}, which are {self.quant_max - self.quant_min + 1}: use more bits."
                )

    def code_range(self, signed: bool) -> tuple[int, int]:
        """The smallest and largest integer code, with this sign where the specification leaves it open."""
        if self.quant_min is not None and self.quant_max is not None:
            return self.quant_min, self.quant_max
        if self.symmetric and (signed if self.signed is None else self.signed):
            return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        return 0, 2**self.bits - 1

    @property
    def _usual_saturation(self) -> Saturation:
        return "exclusive" if self.scale_domain == "power_of_two" else "lsq"

    def lr_factor_at(self, bits: int) -> float | None:
        """By how much a weight's steps are multiplied while it has so many bits; None where the run decides."""
        if isinstance(self.lr_factor, float):
            return self.lr_factor
        if bits >= 4:
            return 1.0
        return None if self.lr_factor == "path" else 2.0 ** (5 - bits)

    def with_usual_steps(self) -> QuantSpec:
        """These settings with the default `lr_factor`, which is no part of what is computed."""
        return self.replace(lr_factor="path")

    @property
    def has_one_scale(self) -> bool:
        """Whether no dimension says how many scales there are: one in all, or what each token brings."""
        return self.granularity in ("per_tensor", "per_token")

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, as `QuantSpec(**values)` takes them."""
        return {name: getattr(self, name) for name in inspect.signature(QuantSpec).parameters}

    def replace(self, **changes: Any) -> QuantSpec:
        """These settings with some of them changed; a saturation rule that was the domain's goes with the domain."""
        usual = {"saturation": None} if self.saturation == self._usual_saturation else {}
        return QuantSpec(**{**self.to_dict(), **usual, **changes})

    @property
    def label(self) -> str:
        """A few words: `4 bit symmetric per_channel`."""
        group = f"({self.group_size})" if self.group_size else ""
        return f"{self.bits} bit {'symmetric' if self.symmetric else 'affine'} {self.granularity}{group}"

    def __repr__(self) -> str:
        known = inspect.signature(QuantSpec).parameters.values()
        usual = {p.name: p.default for p in known} | {"saturation": self._usual_saturation}
        changed = (name for name in usual if name == "bits" or getattr(self, name) != usual[name])
        return f"QuantSpec({', '.join(f'{name}={getattr(self, name)!r}' for name in changed)})"


_CHOICES = {
    "granularity": get_args(Granularity),
    "observer": get_args(ObserverName),
    "saturation": get_args(Saturation),
    "scale_domain": get_args(ScaleDomain),
}

SpecLike = int | QuantSpec | Mapping[str, Any] | None
Made = TypeVar("Made")


def made(key: str, kind: Callable[..., Made], values: Mapping[str, Any]) -> Made:
    """`kind(**values)`, whose errors begin with the key that the values stand under."""
    known = inspect.signature(kind).parameters
    unknown = sorted(map(str, set(values) - set(known)))
    if unknown:
        raise ValueError(f"`{key}` has unknown keys {unknown}. Known are {', '.join(known)}.")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise type(error)(f"`{key}`: {error}") from None


def weight_spec(value: SpecLike) -> QuantSpec | None:
    """A weight's specification; an int means that many bits, symmetric and per channel."""
    if isinstance(value, int) and not isinstance(value, bool):
        return made("weight", QuantSpec, {"bits": value, "granularity": "per_channel"})
    spec = _as_spec(value, "weight")
    if spec is not None and spec.granularity == "per_token":
        raise ValueError(f"A weight is no token. Found {spec!r}: use 'per_channel' or 'per_group'.")
    return spec


def activation_spec(value: SpecLike) -> QuantSpec | None:
    """An activation's specification; an int means that many bits, affine and per tensor."""
    if isinstance(value, int) and not isinstance(value, bool):
        return made("activation", QuantSpec, {"bits": value, "symmetric": False})
    spec = _as_spec(value, "activation")
    if spec is not None and spec.granularity == "per_group":
        raise ValueError(f"An activation is quantized per tensor, channel or token. Found {spec!r}.")
    if spec is not None and isinstance(spec.lr_factor, float):
        raise ValueError(f"`lr_factor` goes with a weight, which an optimizer steps. Found {spec!r} for an activation.")
    return spec


def _as_spec(value: Any, role: str) -> QuantSpec | None:
    if value is None or isinstance(value, QuantSpec):
        return value
    if isinstance(value, Mapping):
        return made(role, QuantSpec, value)
    remedy = f": write {value} without quotes" if isinstance(value, str) and value.isdigit() else ""
    raise TypeError(
        f"`{role}` must be a number of bits, a QuantSpec, a mapping of its fields, or None for float. "
        f"Found {value!r} of type {type(value).__name__}{remedy}."
    )


def as_schedule(value: object) -> PhaseSchedule | None:
    """A schedule, or a mapping of its fields."""
    schedule = made("schedule", PhaseSchedule, value) if isinstance(value, Mapping) else value
    if schedule is not None and not isinstance(schedule, PhaseSchedule):
        raise TypeError(f"`schedule` must be a PhaseSchedule or None. Found {in_words(schedule)}.")
    return schedule
