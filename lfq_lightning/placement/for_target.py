"""What a runtime's table asks of a flow: operations in integers, tensors of one scale, and results of layers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from lfq_lightning.flow.graph import Call, Flow
from lfq_lightning.targets import Target


def calls_in_integers(flow: Flow, target: Target, quantized: Collection[int]) -> dict[int, tuple[str, ...]]:
    """The calls, by number, that a target computes in integers beside those that read a parameter.

    All that reads such a call's result reads it quantized, and as one tensor: an operation between integers and float
    would be computed in float, and pay for the conversion.

    Args:
        flow: what a batch did.
        target: the runtime.
        quantized: the tensors, by identity, that are quantized without it.

    Returns:
        The names of the operands that are to be quantized, for each call.
    """
    quantized, readers = set(quantized), _readers(flow)
    found: dict[int, tuple[str, ...]] = {}
    for number, call in reversed(list(enumerate(flow.calls))):
        if call.kernel not in target.operations or not _read_as_one(number, flow, readers, quantized):
            continue
        if all(read.is_activation and read.shape for read in call.reads):
            bare = _added_within_a_product(call, flow, readers) if target.sums == "fused" else None
            asked = [read for read in call.reads if read.name != bare]
            found[number] = tuple(read.name for read in asked)
            quantized.update(read.identity for read in asked)
    return found


def _readers(flow: Flow) -> dict[int, list[int]]:
    """As which tensors each call's result is read, by each of its readers."""
    readers: dict[int, list[int]] = {}
    for call in flow.calls:
        for read in call.reads:
            if read.source is not None:
                readers.setdefault(read.source, []).append(read.identity)
    return readers


def _read_as_one(number: int, flow: Flow, readers: Mapping[int, list[int]], quantized: Collection[int]) -> bool:
    reads = set(readers.get(number, ()))
    return len(reads) == 1 and reads.issubset(quantized) and not flow.calls[number].read_elsewhere


def _added_within_a_product(call: Call, flow: Flow, readers: Mapping[int, list[int]]) -> str | None:
    """The operand of an addition that is a product's own result and nobody else's: the last that was computed."""
    own = [
        (read.source, read.name)
        for read in call.reads
        if call.site.operation == "add"
        and read.source is not None
        and not read.clipped
        and flow.calls[read.source].kind == "product"
        and not flow.calls[read.source].read_elsewhere
        and len(readers[read.source]) == 1
    ]
    return max(own)[1] if own else None


def of_same_scale(flow: Flow, target: Target, calls: Iterable[int]) -> dict[int, int]:
    """By tensor that must have another's scale, which it is: one for each group of them."""
    same: dict[int, int] = {}

    def first(tensor: int) -> int:
        while tensor in same:
            tensor = same[tensor]
        return tensor

    for number in sorted(calls):
        call = flow.calls[number]
        if call.kernel in target.choosing | target.one_scale and call.gives is not None:
            one, *others = (first(tensor) for tensor in (*(read.identity for read in call.reads), call.gives))
            same |= {other: one for other in others if other != one}
    return {tensor: first(tensor) for tensor in same}


def modules_with_results(
    flow: Flow,
    target: Target,
    layers: Iterable[int],
    quantized: Collection[int],
    others: Mapping[int, Collection[str]],
) -> list[str]:
    """The modules that give results of layers which not all that reads them reads quantized, and as one tensor.

    Args:
        flow: what a batch did.
        target: the runtime.
        layers: the calls, by number, of layers whose weight and input are quantized.
        quantized: the tensors, by identity, that are quantized.
        others: what `calls_in_integers` found.
    """
    readers, quantized = _readers(flow), set(quantized)
    for number, names in others.items():  # also what only chooses among codes
        quantized.update(read.identity for read in flow.calls[number].reads if read.name in names)
    asked = [n for n in sorted(layers) if flow.calls[n].site.operation in target.results]
    lacking = (flow.calls[n] for n in asked if not _read_as_one(n, flow, readers, quantized))
    return list(dict.fromkeys(call.ends_in for call in lacking if call.ends_in is not None))
