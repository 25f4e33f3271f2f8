"""What of a flow is quantized: parameters and who reads them, operands of calls, and what several read at once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lfq_lightning.flow.graph import Call, Flow, Owned, Site
from lfq_lightning.flow.graph import Tensor as Read
from lfq_lightning.placement.layers import computes_directly, modules_by_name

Key = tuple[Owned, str] | tuple[Site, str]


@dataclass
class Parameter:
    """A parameter that operations read.

    Args:
        module: the name of the module that holds its quantizer.
        name: its own name there.
        channels: its dimension with one output each.
        direct: whether its layer's own forward is all that reads it.
        readers: the modules whose own code reads it by a function.
        calls: where, by number in the flow.
        inputs: the tensors that meet it, by identity, in order.
        channels_of_input: how many features these have.
        features: the dimension of these, counted from the last.
        takes_input: whether what meets it can be quantized.
    """

    module: str
    name: str
    channels: int | None
    direct: bool = False
    readers: dict[str, None] = field(default_factory=dict)
    calls: list[int] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    channels_of_input: int | None = None
    features: int = -1
    takes_input: bool = False


@dataclass
class Operand:
    """An operand of a call that is known by the call's place in its module's code.

    Args:
        site: the call.
        name: of the operand.
        weight: whether it is the same for every batch.
        channels: the dimension of the channels: of a weight from the first, of an activation from the last.
        size: how many channels.
        numbers: of the calls in the flow.
        identities: of the tensors that it was, in order.
        rides: the parameter or the operand whose specification it has unless somebody asks; None if nobody asks, none.
    """

    site: Site
    name: str
    weight: bool
    channels: int | None
    size: int | None
    numbers: list[int] = field(default_factory=list)
    identities: list[int] = field(default_factory=list)
    by_default: bool = False


@dataclass
class Found:
    """What a flow shows of a model."""

    parameters: dict[Owned, Parameter]
    operands: dict[tuple[Site, str], Operand]
    first: set[int]
    last: set[int]
    outside: dict[int, str]


def look_through(model: nn.Module, flow: Flow) -> Found:
    """Sort what one batch read into parameters, operands of their calls, and operands that are quantized on request."""
    modules = modules_by_name(model)
    outside = _outside(modules, flow)
    parameters: dict[Owned, Parameter] = {}
    operands: dict[tuple[Site, str], Operand] = {}
    split = _split_by_input(flow)
    for number, call in enumerate(flow.calls):
        if number in outside or call.site.number < 0:
            continue
        weights = [read for read in call.reads if read.is_weight]
        others = [read for read in call.reads if read.is_activation]
        if call.kind == "activation" or not weights:
            for read in call.reads:
                if read.origin != "constant":
                    _operand(operands, call, read, number, by_default=False)
            continue
        one: Parameter | None = None
        for read in weights:
            met = _parameter(parameters, modules, call, read, number)
            if met is None:
                _operand(operands, call, read, number, by_default=True)
            one = met
        for position, read in enumerate(others):
            whole = one is not None and len(weights) == 1 and position == 0
            if (
                whole
                and one is not None
                and (call.site.module not in one.readers or (one.module, one.name) not in split)
            ):
                one.inputs.append(read.identity)
                one.features, one.channels_of_input = read.features, _size(read)
                one.takes_input = one.takes_input or call.kind == "product"
            else:
                _operand(operands, call, read, number, by_default=True)
    ends = _ends(flow, outside)
    return Found(parameters, operands, *ends, outside)


def _parameter(
    parameters: dict[Owned, Parameter], modules: Mapping[str, nn.Module], call: Call, read: Read, number: int
) -> Parameter | None:
    """The entry of a weight; None for one that is made in the code of a module that computes otherwise."""
    site = call.site.module
    module = modules[site]
    own = module._parameters.get("weight")
    direct = computes_directly(module) and (
        (read.parameter is None and own is None)
        or (read.parameter is not None and own is modules[read.parameter[0]]._parameters[read.parameter[1]])
    )
    if direct:
        key, direct_owner = (site, "weight"), True
    elif read.parameter is not None:
        key, direct_owner = read.parameter, computes_directly(modules[read.parameter[0]])
    else:
        return None
    entry = parameters.setdefault(key, Parameter(*key, read.channels))
    entry.direct = entry.direct or direct_owner
    if not direct:
        entry.readers[site] = None
    entry.calls.append(number)
    return entry


def _operand(operands: dict[tuple[Site, str], Operand], call: Call, read: Read, number: int, by_default: bool) -> None:
    if not read.shape:
        return  # a number
    weight = read.origin == "made" and by_default
    channels = read.channels if weight else read.features
    size = (read.shape[channels] if channels is not None else None) if weight else _size(read)
    entry = operands.setdefault((call.site, read.name), Operand(call.site, read.name, weight, channels, size))
    entry.numbers.append(number)
    entry.identities.append(read.identity)
    entry.by_default = entry.by_default or by_default


def _size(read: Read) -> int | None:
    return read.shape[read.features] if len(read.shape) >= -read.features else None


def _split_by_input(flow: Flow) -> set[Owned]:
    """Parameters of which different parts meet different tensors, as a packed projection of query, key and value."""
    met: dict[Owned, dict[object, set[int]]] = {}
    for call in flow.calls:
        weights = [read for read in call.reads if read.parameter is not None and len(read.shape) > 1]
        others = [read for read in call.reads if read.is_activation]
        if len(weights) == 1 and others and weights[0].parameter is not None:
            met.setdefault(weights[0].parameter, {}).setdefault(weights[0].part, set()).add(others[0].identity)
    return {
        parameter
        for parameter, parts in met.items()
        if len(parts) > 1 and len(set(map(frozenset, parts.values()))) > 1 and len(parts) <= 3
    }


# ---- what is outside, first and last --------------------------------------------------------------------------------


def _with_weights(flow: Flow) -> list[bool]:
    return [
        call.kind == "table" or (call.kind == "product" and any(read.is_weight for read in call.reads))
        for call in flow.calls
    ]


def _before(flow: Flow, kept: Collection[int]) -> dict[int, frozenset[int]]:
    """For each call, the kept ones whose results reach it through none that is kept."""
    before: dict[int, frozenset[int]] = {}
    for number, call in enumerate(flow.calls):
        found = frozenset[int]()
        for earlier in call.after:
            found |= frozenset([earlier]) if earlier in kept else before[earlier]
        before[number] = found
    return before


_FEW = 0.01


def _outside(modules: Mapping[str, nn.Module], flow: Flow) -> dict[int, str]:
    """Calls that are no part of what is trained and used, with the reason."""
    numbers = [number for number, has in enumerate(_with_weights(flow)) if has]
    before = _before(flow, numbers)
    outside: dict[int, str] = {}
    learning = {number for number in numbers if flow.calls[number].learns}
    if learning:
        reaches_learning = _reach(numbers, before, learning)[0]
        for number in numbers:
            if number not in learning and number not in reaches_learning:
                outside[number] = "it runs without gradients, and what it gives reaches nothing that learns"
    frozen = {number for number in learning if not _is_trained(modules, flow.calls[number])}
    _, after_trained, reaches = _reach(numbers, before, learning - frozen)
    if all(number in after_trained and not reaches[number] for number in frozen):
        # A detector's layer of constants. An adapter's base and a finetuned backbone are frozen elsewhere too.
        sizes = {n: sum(p.numel() for p in _parameters_of(modules, flow.calls[n])) for n in learning}
        if sum(sizes[number] for number in frozen) <= _FEW * sum(sizes.values()):
            outside |= dict.fromkeys(frozen, "its weights are constants, behind all that learns")
    return outside


def _reach(
    numbers: Iterable[int], before: Mapping[int, frozenset[int]], wanted: Collection[int]
) -> tuple[set[int], set[int], dict[int, bool]]:
    """Which calls lead to a wanted one, which follow one, and which lead to any."""
    numbers = list(numbers)
    leads, follows = set[int](), set[int]()
    reaches = dict.fromkeys(numbers, False)
    for number in numbers:
        if any(earlier in wanted or earlier in follows for earlier in before[number]):
            follows.add(number)
        for earlier in before[number]:
            reaches[earlier] = True
    for number in reversed(numbers):
        if number in wanted or number in leads:
            leads.update(before[number])
    return leads, follows, reaches


def _parameters_of(modules: Mapping[str, nn.Module], call: Call) -> list[Tensor]:
    owned = (read.parameter for read in call.reads if read.parameter is not None)
    found = (modules[owner]._parameters[name] for owner, name in owned)
    return [parameter for parameter in found if parameter is not None]


def _is_trained(modules: Mapping[str, nn.Module], call: Call) -> bool:
    made = any(read.origin == "made" for read in call.reads)
    return made or any(p.requires_grad for p in _parameters_of(modules, call))


def _ends(flow: Flow, outside: Mapping[int, str]) -> tuple[set[int], set[int]]:
    """The calls that read the network's input, and those whose results leave it, through no other that has weights."""
    kept = [number for number, has in enumerate(_with_weights(flow)) if has and number not in outside]
    before = _before(flow, kept)
    followed = frozenset[int]().union(*(before[number] for number in kept))
    return {number for number in kept if not before[number]}, {number for number in kept if number not in followed}
