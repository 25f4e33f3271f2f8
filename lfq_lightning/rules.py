"""Exceptions by name or type from what a model's layers are given."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, final

from torch import nn

from lfq_lightning.checking import in_words
from lfq_lightning.spec import QuantSpec, SpecLike, activation_spec, made, plain_object, weight_spec


@plain_object
@final
@dataclass(frozen=True)
class Rule:
    """Settings for the modules it matches; the first rule that matches a module decides.

    Args:
        match: a glob on the module's dotted name ("encoder.*.fc1", case counts); a name with a dot behind it for all
            that is below ("encoder."); a module type, exactly, for such a layer or all that is below such a module; or
            a glob on a call in a module's own code, by the module's name and the operation ("layer1.*/add"; the second
            of a name is "add_1").
        weight: bits, a QuantSpec, or None to leave the weights in float; "default" takes what `attach` was given.
        activation: the same for the inputs of the matched modules, or for the operands of the matched calls.
        output: bits or a QuantSpec for what the matched modules give; "default" leaves it as it is.

    Raises:
        TypeError: if `match` is neither a glob nor a module type.
        ValueError: if a setting is out of range.

    Example:
        >>> from lfq_lightning import Rule
        >>> Rule("head", weight=8, activation=None)
        Rule('head', weight=8, activation=None)
    """

    match: str | type[nn.Module]
    weight: SpecLike | Literal["default"] = "default"
    activation: SpecLike | Literal["default"] = "default"
    output: SpecLike | Literal["default"] = "default"

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) and not (isinstance(self.match, type) and issubclass(self.match, nn.Module)):
            raise TypeError(f"`match` must be a glob on module names or a module type. Found {self.match!r}.")
        if not self.match:
            raise ValueError('`match` must name something. Found an empty glob: "*" matches every module.')
        for name, check in (("weight", weight_spec), ("activation", activation_spec), ("output", activation_spec)):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                object.__setattr__(self, name, dict(value))
            if value != "default":
                check(value)

    def matches(self, name: str, module_type: type[nn.Module]) -> bool:
        """Whether the rule speaks of a module with this dotted name and type."""
        if isinstance(self.match, str):
            return name.startswith(self.match) if self.match.endswith(".") else fnmatchcase(name, self.match)
        return module_type is self.match

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, as `Rule(**values)` takes them; what is left at its default is left out."""
        if not isinstance(self.match, str):
            raise ValueError(f"A rule in plain values goes by a name. Found {self!r}: match a glob of names instead.")
        values: dict[str, Any] = {"match": self.match}
        for role in ("weight", "activation", "output"):
            value = getattr(self, role)
            if isinstance(value, QuantSpec):
                known = inspect.signature(QuantSpec).parameters.values()
                value = {p.name: getattr(value, p.name) for p in known if getattr(value, p.name) != p.default}
            if not isinstance(value, str):
                values[role] = value
        return values

    def __repr__(self) -> str:
        match = repr(self.match) if isinstance(self.match, str) else self.match.__qualname__
        given = ((k, getattr(self, k)) for k in ("weight", "activation", "output"))
        return f"Rule({', '.join([match, *(f'{k}={v!r}' for k, v in given if v != 'default')])})"


def check_listed(values: object) -> None:
    """Raise TypeError unless it is several rules, or none; a mapping would be read as its keys."""
    if isinstance(values, (Rule, Mapping, str)) or not isinstance(values, Iterable):
        raise TypeError(f"`rules` must be a list of rules, even of one. Found {in_words(values)}: put it in brackets.")


def as_rules(values: Iterable[Rule | Mapping[str, Any]]) -> tuple[Rule, ...]:
    """Rules, or mappings of their fields."""
    check_listed(values)
    rules = []
    for number, value in enumerate(values):
        key = f"rules[{number}]"
        if not isinstance(value, (Rule, Mapping)):
            raise TypeError(
                f"`{key}` must be a Rule or a mapping of its fields. Found {in_words(value)}: write Rule(...)."
            )
        rules.append(value if isinstance(value, Rule) else made(key, Rule, value))
    return tuple(rules)
