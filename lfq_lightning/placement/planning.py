"""Which layers are quantized and how, decided from names and types."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from lfq_lightning.checking import check_model, check_rows
from lfq_lightning.placement.layers import all_names, candidates, check_quantizable, is_lazy
from lfq_lightning.placement.quantized_layer import float_type
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.rules import Rule, check_listed
from lfq_lightning.spec import QuantSpec, SpecLike, activation_spec, weight_spec
from lfq_lightning.tables import Table


@dataclass(frozen=True)
class PlacedLayer:
    """One layer and its specifications; None is float."""

    name: str
    type_name: str
    weight: QuantSpec | None
    activation: QuantSpec | None


@dataclass(frozen=True)
class Placement:
    """Every quantized layer, and every layer with weights that was left in float with the reason; prints as a table."""

    layers: tuple[PlacedLayer, ...]
    left_in_float: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        check_rows("layers", self.layers, PlacedLayer)
        check_rows("left_in_float", self.left_in_float, tuple)

    def __str__(self) -> str:
        rows = []
        for layer in self.layers:
            weight, activation = (s.label if s else "float" for s in (layer.weight, layer.activation))
            rows.append((layer.name, layer.type_name, weight, activation))
        rows += [(name, "", "float", "float") for name, _ in self.left_in_float]
        why: dict[str, list[str]] = {}
        for name, reason in self.left_in_float:
            why.setdefault(reason, []).append(name)
        notes = [f"left in float, as {reason}: {', '.join(names)}" for reason, names in why.items()]
        return str(Table({"layer": "<", "type": "<", "weight": "<", "input": "<"}, rows, notes))


def plan(
    model: nn.Module, weight: SpecLike, activation: SpecLike, rules: Iterable[Rule], final: bool = True
) -> Placement:
    """What `attach` would place; with `final` False, rules may match nothing yet and layers may still be missing."""
    check_model(model)
    defaults = weight_spec(weight), activation_spec(activation)
    check_listed(rules)
    rules = tuple(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"`rules` must hold Rule objects. Found {rule!r} of type {type(rule).__name__}.")
    found, left = candidates(model, rules)
    names = all_names(model)
    if final:
        _check_rules(rules, names, found, left)
    chosen: list[tuple[str, nn.Module, list[QuantSpec | None], list[bool]]] = []
    for name, layer in found.items():
        decides = next((r for r in rules if _speaks_of(r, layer, names)), None)
        specs, ruled = list(defaults), [False, False]
        if decides is not None and decides.weight != "default":
            specs[0], ruled[0] = weight_spec(decides.weight), True
        if decides is not None and decides.activation != "default":
            specs[1], ruled[1] = activation_spec(decides.activation), True
        if isinstance(layer, nn.Embedding):
            if ruled[1] and specs[1] is not None:
                raise ValueError(
                    f"The input of an Embedding is integers and cannot be quantized. Found {decides!r} for {name!r}: "
                    "leave `activation` out."
                )
            specs[1] = None
        if specs != [None, None]:
            chosen.append((name, layer, specs, ruled))
    ends = [layer for _, layer, _, _ in chosen[:1] + chosen[-1:]]
    # Layers that are tied to the first or the last have its weight, and so its bits.
    end_weights = {id(layer.weight) for _, layer, _, ruled in chosen if layer in ends and not ruled[0]}
    placed: list[PlacedLayer] = []
    weights: dict[int, PlacedLayer] = {}
    for name, layer, specs, ruled in chosen:
        at_end = id(layer.weight) in end_weights, layer in ends
        specs = [_at_least_8_bits(s) if e and not r else s for s, r, e in zip(specs, ruled, at_end, strict=True)]
        if not final and is_lazy(layer):
            continue
        check_quantizable(name, layer, *specs)
        placed.append(PlacedLayer(name, float_type(layer).__name__, specs[0], specs[1]))
        if specs[0] is not None:
            _check_tied(weights.setdefault(id(layer.weight), placed[-1]), placed[-1])
    if final and not placed:
        warnings.warn(
            f"{type(model).__name__} has nothing to quantize: no layer of a supported type, or all were left in float.",
            stacklevel=3,
        )
    return Placement(tuple(placed), tuple(left.items()))


def _at_least_8_bits(spec: QuantSpec | None) -> QuantSpec | None:
    if spec is None or spec.bits >= 8 or spec.quant_min is not None:
        return spec
    return spec.replace(bits=8)


def _check_tied(first: PlacedLayer, other: PlacedLayer) -> None:
    if first.weight != other.weight:
        raise ValueError(
            f"Layers that share one weight need one specification for it. Found {first.weight!r} for {first.name!r} "
            f"and {other.weight!r} for {other.name!r}: give both the same `weight`, each with a Rule."
        )


def _speaks_of(rule: Rule, module: nn.Module, names: Mapping[nn.Module, list[str]]) -> bool:
    return any(rule.matches(name, float_type(module)) for name in names[module])


def _check_rules(
    rules: tuple[Rule, ...],
    names: Mapping[nn.Module, list[str]],
    found: Mapping[str, nn.Module],
    left: Mapping[str, str],
) -> None:
    in_float = [module for module, (name, *_) in names.items() if name in left]
    free = dict(found)
    for rule in rules:
        taken = [name for name, layer in free.items() if _speaks_of(rule, layer, names)]
        asked = rule.weight, rule.activation
        excludes = None in asked and all(value is None or value == "default" for value in asked)
        if not taken and not (excludes and any(_speaks_of(rule, module, names) for module in in_float)):
            raise ValueError(
                f"A rule must match a layer that can be quantized. Found that {rule!r} applies to nothing: "
                f"{_why_unused(rule, names, found, left)}"
            )
        for name in taken:
            del free[name]


def _speaks_of_parameters(rule: Rule, name: str, layer: nn.Module) -> bool:
    parameters = (f"{name}.{own}" for own, _ in layer.named_parameters())
    return isinstance(rule.match, str) and any(rule.matches(parameter, nn.Module) for parameter in parameters)


def _is_users(module: nn.Module) -> bool:
    return isinstance(module, LearnableFakeQuantize) and module.site is None


def _why_unused(
    rule: Rule, names: Mapping[nn.Module, list[str]], found: Mapping[str, nn.Module], left: Mapping[str, str]
) -> str:
    shadowed = [name for name, layer in found.items() if _speaks_of(rule, layer, names)]
    if shadowed:
        return f"an earlier rule already decides for {', '.join(shadowed)}. Put it before that rule."
    other = [name for module, (name, *_) in names.items() if _speaks_of(rule, module, names) and name]
    users = [name for module, (name, *_) in names.items() if name in other and _is_users(module)]
    if users:
        return (
            f"{', '.join(users[:5])} is a quantizer that you have placed, and has the QuantSpec that you made it with. "
            "Change that, and remove the rule."
        )
    reasons = [f"{name} ({left[name]})" for name in other if name in left]
    if reasons:
        return f"left in float is {', '.join(reasons[:5])}. Remove the rule, or what stands in the way."
    inside = [f"`{name}.*`" for name in other if any(layer.startswith(f"{name}.") for layer in found)]
    if inside:
        return f"a rule speaks of layers, and not of what holds them. Match {' or '.join(inside[:5])}."
    if other:
        return f"{', '.join(other[:5])} has no floating weights of a kind that can be quantized. Remove the rule."
    owners = [f"`{name}`" for name, layer in found.items() if _speaks_of_parameters(rule, name, layer)]
    if owners:
        return f"a rule speaks of layers, and not of their parameters. Match {' or '.join(owners[:5])}."
    known = [name for several in names.values() for name in several]
    near = get_close_matches(rule.match, known, n=3, cutoff=0.3) if isinstance(rule.match, str) else []
    return (
        f"no module has that {'name' if isinstance(rule.match, str) else 'type'}. "
        f"Near are {', '.join(near or list(found)[:5]) or 'none'}."
    )
