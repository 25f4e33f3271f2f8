"""What of a model is quantized and how, decided from names, types and the flow of a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from torch import nn

from lfq_lightning.checking import check_model
from lfq_lightning.flow.graph import Flow, Owned
from lfq_lightning.flow.operations import BY_NAME
from lfq_lightning.placement.for_target import calls_in_integers, modules_with_results, of_same_scale
from lfq_lightning.placement.layers import (
    all_names,
    candidates,
    check_quantizable,
    computes_directly,
    input_channels,
    is_lazy,
    modules_by_name,
)
from lfq_lightning.placement.meeting import input_name, operand_name
from lfq_lightning.placement.operations import Found, Operand, Parameter, look_through
from lfq_lightning.placement.placed import ASKED_FOR, PlacedLayer, PlacedOperand, Placement, label_of
from lfq_lightning.placement.quantized_layer import float_type
from lfq_lightning.private import plain_name
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.rules import Rule, check_listed
from lfq_lightning.spec import QuantSpec, SpecLike, activation_spec, weight_spec
from lfq_lightning.targets import target_of

Kind = Literal["weight", "activation"]

NO_PART = "it has no part in "
OUTSIDE_FORWARD = "code that stands in no module's `forward` reads it, and is not met; move it into one"
THE_SAME = "what it computes is the same for every batch"


@dataclass
class _Item:
    """A layer, another parameter that operations read, or an operand: what may get quantizers.

    Args:
        label: by which it is shown.
        names: by which rules may know it.
        module: that holds the quantizers.
        specs: of weight and input; None for what there is not.
        tensors: which tensors its input was, in order; empty where that is not known.
        calls: in the flow.
        asked: whether it is quantized only where a rule names it by its call.
    """

    label: str
    names: list[str]
    module: nn.Module
    parameter: Parameter | None = None
    operand: Operand | None = None
    specs: dict[Kind, QuantSpec | None] = field(default_factory=dict)
    ruled: set[Kind] = field(default_factory=set)
    calls: list[int] = field(default_factory=list)
    asked: bool = False

    @property
    def tensors(self) -> tuple[int, ...]:
        if self.operand is not None:
            return tuple(self.operand.identities)
        return tuple(self.parameter.inputs) if self.parameter is not None else ()

    @property
    def tie(self) -> int:
        """Equal for layers that have one parameter for their weight; one that is computed is nobody else's."""
        own = None if self.parameter is None else self.module._parameters.get(self.parameter.name)
        return id(self) if own is None else id(own)


def plan(
    model: nn.Module,
    weight: SpecLike,
    activation: SpecLike,
    rules: Iterable[Rule],
    final: bool = True,
    flow: Flow | None = None,
    target: str | Sequence[str] | None = None,
) -> Placement:
    """What `attach` would place.

    Args:
        model: any module.
        weight: as `attach` takes it.
        activation: the same.
        rules: the same.
        final: False where rules may match nothing yet and layers may still be missing.
        flow: what a batch did; None where that is not known, which leaves layers of known types alone.
        target: as `attach` takes it.
    """
    check_model(model)
    runtime = target_of(target)
    activation_of = activation_spec if runtime is None else runtime.activation
    defaults: dict[Kind, QuantSpec | None] = {"weight": weight_spec(weight), "activation": activation_of(activation)}
    check_listed(rules)
    rules = tuple(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"`rules` must hold Rule objects. Found {rule!r} of type {type(rule).__name__}.")
    items, left, found = _items(model, rules, flow)
    outputs = _outputs(model, rules, activation_of)
    if final:
        _check_rules(model, rules, items, left, outputs)
    names = all_names(model)
    chosen = [item for item in items if _decided(item, rules, names, defaults, activation_of)]
    same: dict[int, int] = {}
    if runtime is not None and flow is not None:
        calls = calls_in_integers(flow, runtime, _quantized_tensors(chosen))
        same = of_same_scale(flow, runtime, calls)
        every = dict(calls)
        calls = {number: names for number, names in calls.items() if flow.calls[number].kernel not in runtime.choosing}
        taken = {same.get(tensor, tensor) for tensor in _quantized_tensors(chosen)}
        asked = [item for item in items if item not in chosen and _is_among(item, calls)]
        chosen = chosen + [item for item in asked if _is_asked_by_target(item, defaults["activation"], taken, same)]
        chosen.sort(key=items.index)
        if runtime.results and defaults["activation"] is not None:
            computed = [n for item in chosen if item.parameter and all(item.specs.values()) for n in item.calls]
            for name in modules_with_results(flow, runtime, computed, _quantized_tensors(chosen), every):
                outputs.setdefault(name, at_least_8_bits(defaults["activation"]))
    ends = _at_ends(chosen, found)
    # Layers that are tied to the first or the last have its weight, and so its bits.
    end_weights = {item.tie for item in ends if "weight" not in item.ruled and item.parameter is not None}
    layers: list[PlacedLayer] = []
    operands: list[PlacedOperand] = []
    weights: dict[int, PlacedLayer] = {}
    shared: dict[object, str] = {}
    for item in sorted(chosen, key=lambda item: item.parameter is None):  # what is shared stands at a layer, if at any
        at_end = item in ends
        for kind in item.specs:
            tied = kind == "weight" and item.parameter is not None and item.tie in end_weights
            if kind not in item.ruled and (at_end or tied):
                item.specs[kind] = at_least_8_bits(item.specs[kind])
        if runtime is not None:
            if "weight" in item.specs:
                item.specs["weight"] = runtime.weight(item.specs["weight"])
            runtime.check(item.label, item.specs.get("weight"), item.specs.get("activation"))
        if item.parameter is None:
            operands.append(_placed_operand(item, shared, same))
            continue
        if not final and is_lazy(item.module):
            continue
        check_quantizable(item.label, item.module, item.specs["weight"], item.specs["activation"], item.parameter.name)
        placed = _placed_layer(item, shared, same)
        layers.append(placed)
        if placed.weight is not None:
            _check_tied(weights.setdefault(item.tie, placed), placed)
    for name, spec in outputs.items():
        if spec is not None:
            operands.append(PlacedOperand(name, "", "output", "output", spec))
            if runtime is not None:
                runtime.check(operands[-1].label, None, spec)
    if final and not layers and not operands:
        warnings.warn(
            f"{type(model).__name__} has nothing to quantize: no layer of a supported type, or all were left in float.",
            stacklevel=3,
        )
    placement = Placement(tuple(layers), (), tuple(operands))
    told = {name for item in items if "weight" in item.ruled for name in names[item.module]}
    return placement.accounted(*_left(model, placement, left, told, flow), flow.source if flow is not None else "")


def _items(
    model: nn.Module, rules: tuple[Rule, ...], flow: Flow | None
) -> tuple[list[_Item], dict[str, str], Found | None]:
    """What can be quantized, what cannot with the reason, and what the flow shows; in order of registration."""
    layers, left, refused = candidates(model, rules)
    names = all_names(model)
    if flow is None:
        return [_layer_item(name, layer, names) for name, layer in layers.items()], left, None
    found = look_through(model, flow)
    modules = modules_by_name(model)
    items: list[_Item] = []
    for (owner, own), parameter in found.parameters.items():
        if owner in refused:
            continue
        label = label_of(owner, own)
        known = dict.fromkeys([*names[modules[owner]], label, *(str(flow.calls[n].site) for n in parameter.calls)])
        items.append(_Item(label, list(known), modules[owner], parameter, calls=parameter.calls))
        left.pop(owner, None)
    for (site, name), operand in found.operands.items():
        if site.module not in refused:
            known = dict.fromkeys([str(site), *names[modules[site.module]]])
            item = _Item(f"{site}/{name}", list(known), modules[site.module], operand=operand, calls=operand.numbers)
            item.asked = not operand.by_default
            items.append(item)
    met = {item.module: names[item.module][0] for item in items if item.parameter is not None}
    outside = {
        read.parameter[0]: reason
        for number, reason in found.outside.items()
        for read in flow.calls[number].reads
        if read.parameter is not None
    }
    for name, layer in layers.items():
        if layer in met:
            continue
        if any(_speaks_of(rule, layer, names[layer], names) for rule in rules) or (
            name not in outside and _has_twin(name, modules, met.values())
        ):
            items.append(_layer_item(name, layer, names))
        else:
            why = THE_SAME if name in flow.called else _why_left(name, "weight", False, flow)
            left[name] = outside.get(name, why)
    for name, reason in outside.items():
        left.setdefault(name, reason)
    order = {module: place for place, module in enumerate(model.modules())}
    items.sort(key=lambda item: order[item.module])
    return items, left, found


def _has_twin(name: str, modules: Mapping[str, nn.Module], met: Iterable[str]) -> bool:
    """Whether the same layer of another module in the same list ran: an expert that no token of the batch chose."""
    parts = name.split(".")
    for place in range(1, len(parts)):
        container = ".".join(parts[:place])
        if isinstance(modules[container], (nn.ModuleList, nn.ModuleDict)):
            rest = parts[place + 1 :]
            if any(
                other.startswith(f"{container}.") and other.removeprefix(f"{container}.").split(".")[1:] == rest
                for other in met
            ):
                return True
    return False


def _layer_item(name: str, layer: nn.Module, names: Mapping[nn.Module, list[str]]) -> _Item:
    takes_input = not isinstance(layer, nn.Embedding)
    size, features = (None, -1) if not takes_input or is_lazy(layer) else input_channels(layer)
    parameter = Parameter(name, "weight", None, True, channels_of_input=size, features=features)
    parameter.takes_input = takes_input
    return _Item(name, list(names[layer]), layer, parameter)


# ---- specifications -------------------------------------------------------------------------------------------------


def _decided(
    item: _Item,
    rules: tuple[Rule, ...],
    names: Mapping[nn.Module, list[str]],
    defaults: Mapping[Kind, QuantSpec | None],
    activation_of: Callable[[SpecLike], QuantSpec | None],
) -> bool:
    """Settle an item's specifications; whether any is left."""
    decides = next((rule for rule in rules if _speaks_of_item(rule, item, names)), None)
    if item.asked and decides is None:
        return False
    kinds: list[Kind] = ["weight", "activation"]
    if item.operand is not None:
        kinds = ["weight" if item.operand.weight else "activation"]
    for kind in kinds:
        given: Any = "default" if decides is None else getattr(decides, kind)
        if given == "default":
            item.specs[kind] = None if item.asked else defaults[kind]
        else:
            item.specs[kind] = (weight_spec if kind == "weight" else activation_of)(given)
            item.ruled.add(kind)
    if item.parameter is not None and not item.parameter.takes_input:
        if "activation" in item.ruled and item.specs["activation"] is not None:
            raise ValueError(
                f"The input of an Embedding is integers and cannot be quantized. Found {decides!r} for {item.label!r}: "
                "leave `activation` out."
            )
        item.specs["activation"] = None
    return any(spec is not None for spec in item.specs.values())


def _at_ends(chosen: list[_Item], found: Found | None) -> list[_Item]:
    """The items that are first or last: by the flow, or else in order of registration."""
    if found is None:
        return chosen[:1] + [item for item in chosen[-1:] if item not in chosen[:1]]
    ends = found.first | found.last
    return [item for item in chosen if not ends.isdisjoint(item.calls)]


def at_least_8_bits(spec: QuantSpec | None) -> QuantSpec | None:
    """What the first and the last layer have instead, unless a rule speaks of them."""
    if spec is None or spec.bits >= 8 or spec.quant_min is not None:
        return spec
    return spec.replace(bits=8)


def alike_but_at_ends(one: QuantSpec | None, other: QuantSpec | None) -> bool:
    """Whether two specifications are one, but for the bits of a first or last layer: which it is shows in a flow."""
    one, other = (None if spec is None else spec.with_usual_steps() for spec in (one, other))
    return one == other or at_least_8_bits(one) == other or one == at_least_8_bits(other)


def _check_tied(first: PlacedLayer, other: PlacedLayer) -> None:
    if first.weight != other.weight:
        raise ValueError(
            f"Layers that share one weight need one specification for it. Found {first.weight!r} for {first.label!r} "
            f"and {other.weight!r} for {other.label!r}: give both the same `weight`, each with a Rule."
        )


def _placed_layer(item: _Item, shared: dict[object, str], same: Mapping[int, int]) -> PlacedLayer:
    parameter = item.parameter
    assert parameter is not None
    direct = computes_directly(item.module) or not parameter.readers
    spec = item.specs["activation"]
    name = ".".join(filter(None, (parameter.module, input_name(parameter.name))))
    return PlacedLayer(
        parameter.module,
        float_type(item.module).__name__,
        item.specs["weight"],
        spec,
        parameter.name,
        tuple(parameter.readers),
        None if direct else parameter.channels,
        parameter.features,
        parameter.channels_of_input,
        _shared(shared, item.tensors, spec, name, same),
    )


def _placed_operand(item: _Item, shared: dict[object, str], same: Mapping[int, int]) -> PlacedOperand:
    operand = item.operand
    assert operand is not None
    (spec,) = item.specs.values()
    assert spec is not None
    if operand.weight and operand.size is None and spec.granularity == "per_channel":
        spec = spec.replace(granularity="per_tensor")  # no index of a dimension has outputs of its own
    site, role = operand.site, "weight" if operand.weight else "operand"
    name = ".".join(filter(None, (site.module, operand_name(site.call, operand.name))))
    shares = "" if operand.weight else _shared(shared, item.tensors, spec, name, same)
    return PlacedOperand(site.module, site.call, operand.name, role, spec, operand.channels, operand.size, shares)  # type: ignore[arg-type]


def _shared(
    shared: dict[object, str], tensors: tuple[int, ...], spec: QuantSpec | None, name: str, same: Mapping[int, int]
) -> str:
    """The name of the quantizer that quantizes the same tensors in the same way; empty for the first.

    A tensor that is in `same` must have the scale of the one that stands there for it.
    """
    if spec is None or not tensors:
        return ""
    first = shared.setdefault((tuple(same.get(tensor, tensor) for tensor in tensors), spec), name)
    return "" if first == name else first


# ---- what a target asks for ------------------------------------------------------------------------------------------


def _quantized_tensors(chosen: Iterable[_Item]) -> set[int]:
    return {tensor for item in chosen if item.specs.get("activation") is not None for tensor in item.tensors}


def _is_among(item: _Item, calls: Mapping[int, Collection[str]]) -> bool:
    """Whether an item is one of the operands that are named for each call."""
    return item.operand is not None and any(item.operand.name in calls.get(number, ()) for number in item.calls)


def _is_asked_by_target(item: _Item, spec: QuantSpec | None, taken: Collection[int], same: Mapping[int, int]) -> bool:
    """Whether a target asks for an operand of which no rule speaks; it gets its specification then.

    That has at least 8 bits, unless a layer reads the tensor in fewer: a runtime quantizes each tensor once.
    """
    if not item.asked or item.ruled or spec is None:
        return False
    also_read = any(same.get(tensor, tensor) in taken for tensor in item.tensors)
    item.specs["activation"] = spec if also_read else at_least_8_bits(spec)
    return True


def _outputs(
    model: nn.Module, rules: tuple[Rule, ...], activation_of: Callable[[SpecLike], QuantSpec | None]
) -> dict[str, QuantSpec | None]:
    """The modules whose output is quantized."""
    asked = [rule for rule in rules if rule.output != "default"]
    if not asked:
        return {}
    names = all_names(model)
    found: dict[str, QuantSpec | None] = {}
    for module, known in names.items():
        decides = next((rule for rule in rules if _speaks_of(rule, module, known, names)), None)
        if decides is not None and decides.output != "default":
            found[known[0]] = activation_of(decides.output)
    return found


# ---- what is left ---------------------------------------------------------------------------------------------------


def _left(
    model: nn.Module, placement: Placement, left: Mapping[str, str], told: set[str], flow: Flow | None
) -> tuple[dict[str, str], dict[str, int], tuple[int, int]]:
    """Every module with a parameter of two or more dimensions that no quantizer serves; and counts of elements.

    A layer of a known type, or one that a rule has `told` about, is in float because that was asked for.
    """
    modules = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    served = _served(modules, placement, flow)
    asked = told | {name for name, module in modules.items() if computes_directly(module)}
    inside = {
        inner for module in model.modules() if isinstance(module, LearnableFakeQuantize) for inner in module.modules()
    }
    counted: set[int] = set()
    quantized = every = 0
    reasons = {name: why for name, why in left.items() if not _serves_all(served, modules[name])}
    sizes: dict[str, int] = {}
    for name, module in modules.items():
        for own, parameter in module._parameters.items():
            if parameter is None or module in inside or id(parameter) in counted or is_lazy(module):
                continue
            counted.add(id(parameter))
            if parameter.ndim < 2 or not parameter.is_floating_point():
                continue
            every += parameter.numel()
            if id(parameter) in served:
                quantized += parameter.numel()
                continue
            sizes[name] = sizes.get(name, 0) + parameter.numel()
            reasons.setdefault(name, _why_left(name, own, name in asked, flow))
    for call in flow.calls if flow is not None else ():
        if call.site.number < 0 and call.kind != "activation":  # also of what is quantized where modules read it
            reasons |= {read.parameter[0]: OUTSIDE_FORWARD for read in call.reads if read.parameter is not None}
    return reasons, sizes, (quantized, every)


def _served(modules: Mapping[str, nn.Module], placement: Placement, flow: Flow | None) -> set[int]:
    """The parameters that are quantized, or that what is quantized is made of."""
    made_of: dict[tuple[str, str, str], frozenset[Owned]] = {
        (call.site.module, call.site.call, read.name): read.made_of
        for call in (flow.calls if flow is not None else ())
        for read in call.reads
    }
    served: set[int] = set()
    for layer in placement.layers:
        if layer.weight is not None:
            own = modules[layer.name]._parameters.get(layer.parameter)
            # One that is computed (weight_norm, a parametrization) comes from all that the layer has.
            served.update([id(own)] if own is not None else map(id, modules[layer.name].parameters()))
    for operand in placement.operands:
        if operand.role == "weight":
            parameters = made_of.get((operand.module, operand.call, operand.operand), frozenset())
            served.update(id(modules[owner]._parameters[own]) for owner, own in parameters)
    return served


def _serves_all(served: set[int], module: nn.Module) -> bool:
    own = [id(p) for p in module._parameters.values() if p is not None and p.ndim > 1]
    return bool(own) and served.issuperset(own)


def _why_left(name: str, own: str, asked: bool, flow: Flow | None) -> str:
    if asked:
        return ASKED_FOR
    if flow is None:
        return "only layers of known types are quantized without an example batch"
    if name not in flow.called and (name, own) not in flow.read:
        return NO_PART + flow.source
    operation = BY_NAME.get(flow.read.get((name, own), ""))
    if operation is not None and operation.kind != "activation":
        return THE_SAME
    if (name, own) not in flow.read:
        return "no function of torch that could be met reads it"
    reader = flow.read[name, own]
    if reader.endswith(".apply"):
        return f"the autograd Function `{reader.removesuffix('.apply')}` takes it, and computes by itself"
    return f"`{reader}` reads it, and no sum of products"


# ---- rules ----------------------------------------------------------------------------------------------------------


def _speaks_of(rule: Rule, module: nn.Module, known: Iterable[str], names: Mapping[nn.Module, list[str]]) -> bool:
    if isinstance(rule.match, str):
        return any(rule.matches(name, nn.Module) for name in known)
    if float_type(module) is rule.match:
        return True
    around = [name for holder, several in names.items() if float_type(holder) is rule.match for name in several]
    return any(name.startswith(f"{holder}.") or not holder for holder in around for name in known if name != holder)


def _speaks_of_item(rule: Rule, item: _Item, names: Mapping[nn.Module, list[str]]) -> bool:
    if item.asked:
        named = isinstance(rule.match, str) and "/" in rule.match
        return named and rule.matches(item.names[0], nn.Module)
    return _speaks_of(rule, item.module, item.names, names)


def _check_rules(
    model: nn.Module,
    rules: tuple[Rule, ...],
    items: list[_Item],
    left: Mapping[str, str],
    outputs: Mapping[str, QuantSpec | None],
) -> None:
    names = all_names(model)
    in_float = [(module, known) for module, known in names.items() if known[0] in left]
    free = list(items)
    for rule in rules:
        taken = [item for item in free if _speaks_of_item(rule, item, names)]
        asked = rule.weight, rule.activation
        excludes = None in asked and all(value is None or value == "default" for value in asked)
        gives = rule.output != "default" and any(
            _speaks_of(rule, module, known, names) for module, known in names.items() if known[0] in outputs
        )
        if (
            not taken
            and not gives
            and not (excludes and any(_speaks_of(rule, module, known, names) for module, known in in_float))
        ):
            raise ValueError(
                f"A rule must match what can be quantized. Found that {rule!r} applies to nothing: "
                f"{_why_unused(rule, names, items, left)}"
            )
        free = [item for item in free if item not in taken]


def _is_users(module: nn.Module) -> bool:
    return isinstance(module, LearnableFakeQuantize) and module.site is None


def _why_unused(rule: Rule, names: Mapping[nn.Module, list[str]], items: list[_Item], left: Mapping[str, str]) -> str:
    if isinstance(rule.match, str) and "/" in rule.match:
        return _why_no_call(rule.match, items)
    shadowed = [item.label for item in items if _speaks_of_item(rule, item, names)]
    if shadowed:
        return f"an earlier rule already decides for {', '.join(shadowed)}. Put it before that rule."
    other = [known[0] for module, known in names.items() if _speaks_of(rule, module, known, names) and known[0]]
    users = [known[0] for module, known in names.items() if known[0] in other and _is_users(module)]
    if users:
        return (
            f"{', '.join(users[:5])} is a quantizer that you have placed, and has the QuantSpec that you made it with. "
            "Change that, and remove the rule."
        )
    reasons = [f"{name} ({left[name]})" for name in other if name in left]
    if reasons:
        return f"left in float is {', '.join(reasons[:5])}. Remove the rule, or what stands in the way."
    labels = [item.label for item in items]
    inside = [f"`{name}.*`" for name in other if any(label.startswith(f"{name}.") for label in labels)]
    if inside:
        return f"a rule speaks of layers, and not of what holds them. Match {' or '.join(inside[:5])}."
    if other:
        return f"{', '.join(other[:5])} has no floating weights of a kind that can be quantized. Remove the rule."
    owners = [f"`{item.label}`" for item in items if _speaks_of_parameters(rule, item)]
    if owners:
        return f"a rule speaks of layers, and not of their parameters. Match {' or '.join(owners[:5])}."
    known = [name for several in names.values() for name in several]
    near = get_close_matches(rule.match, known, n=3, cutoff=0.3) if isinstance(rule.match, str) else []
    return (
        f"no module has that {'name' if isinstance(rule.match, str) else 'type'}. "
        f"Near are {', '.join(near or labels[:5]) or 'none'}."
    )


def _why_no_call(match: str, items: list[_Item]) -> str:
    """Of a rule that names a call, such as `layer1.*/add`."""
    operation = match.rpartition("/")[2].rstrip("*?").rstrip("0123456789").rstrip("_")
    if operation and operation not in BY_NAME:
        return f"{operation!r} is no operation that can be quantized. Those are {', '.join(sorted(BY_NAME))}."
    calls = list(dict.fromkeys(item.names[0] for item in items if "/" in item.names[0]))
    if not calls:
        return "no batch was run to see the model's calls. Give `example`."
    near = get_close_matches(match, calls, n=5, cutoff=0.3)
    return f"no call has that name. Near are {', '.join(near or calls[:5])}."


def _speaks_of_parameters(rule: Rule, item: _Item) -> bool:
    if item.parameter is None:
        return False
    parameters = (f"{item.label}.{own}" for own, _ in item.module.named_parameters())
    return isinstance(rule.match, str) and any(rule.matches(parameter, nn.Module) for parameter in parameters)
