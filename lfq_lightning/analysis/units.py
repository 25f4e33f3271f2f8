"""What can be quantized alone: a parameter with what meets it, a call with its operands, an output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lfq_lightning.placement.meeting import OUTPUT, input_name, operand_name, weight_name
from lfq_lightning.placement.points import points
from lfq_lightning.placement.quantized_layer import tensor_of, whole
from lfq_lightning.private import plain_name
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.records.summary import packed_bytes
from lfq_lightning.spec import QuantSpec
from lfq_lightning.state_dicts import descriptions, placement_of


@dataclass
class Unit:
    """What is quantized together, and by itself.

    Args:
        names: by which rules know it; several where a parameter is tied.
        quantizers: all of its own.
        weight: the one of its weight, or None.
        holders: the modules that hold that one.
        child: under which name they do.
        parameter: the weight, where it is one; what is made in forward is known once it was seen.
    """

    names: tuple[str, ...]
    quantizers: list[LearnableFakeQuantize] = field(default_factory=list)
    weight: LearnableFakeQuantize | None = None
    holders: list[nn.Module] = field(default_factory=list)
    child: str = ""
    parameter: Tensor | None = None

    def weight_bytes(self) -> int:
        """Of the weight as it is quantized now, or in float where it is not; 0 without one."""
        if self.parameter is None:
            return 0
        now = self.holders[0]._modules[self.child] if self.holders else None
        if isinstance(now, LearnableFakeQuantize):
            return packed_bytes(self.parameter, now)
        return 4 * self.parameter.numel()

    @contextmanager
    def quantized(self, spec: QuantSpec | None) -> Iterator[None]:
        """Within it this is quantized: by its own quantizers, or the weight alone by a specification."""
        if spec is None:
            for quantizer in self.quantizers:
                quantizer.phase = "freeze"
            try:
                yield
            finally:
                for quantizer in self.quantizers:
                    quantizer.phase = "off"
            return
        before, weight = self.weight, self.parameter
        assert before is not None and weight is not None
        channels = None if spec.has_one_scale else before.scale.numel()
        made = LearnableFakeQuantize.from_spec(
            spec, channels, weight=True, axis=before.axis, device=before.scale.device
        )
        if before.place.call:  # it takes its range from what it is given
            made.site, made.place, made.gathering, made.phase = before.site, before.place, True, "estimate"
        else:
            made.estimate_from(whole(weight))
            made.phase = "freeze"
        for holder in self.holders:
            holder._modules[self.child] = made
        try:
            yield
        finally:
            for holder in self.holders:
                holder._modules[self.child] = before


def units(model: nn.Module) -> list[Unit]:
    """Everything that `attach` has quantized, in its order, and then what the user has placed."""
    modules = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    placement = placement_of(descriptions(model.state_dict()))
    found: dict[object, Unit] = {}

    def add(key: object, name: str) -> Unit:
        unit = found.setdefault(key, Unit(()))
        unit.names = tuple(dict.fromkeys((*unit.names, name)))
        return unit

    def take(unit: Unit, holder: nn.Module, child: str, weight: bool) -> None:
        quantizer = holder._modules.get(child)
        if isinstance(quantizer, LearnableFakeQuantize):
            if quantizer not in unit.quantizers:
                unit.quantizers.append(quantizer)
            if weight:
                unit.weight, unit.child = quantizer, child
                unit.holders.append(holder)

    for layer in placement.layers:
        holder = modules[layer.name]
        quantizer = holder._modules.get(weight_name(layer.parameter))
        unit = add((holder, layer.parameter) if quantizer is None else quantizer, layer.label)
        unit.parameter = tensor_of(holder, layer.parameter)
        take(unit, holder, weight_name(layer.parameter), weight=True)
        take(unit, holder, input_name(layer.parameter), weight=False)
    for operand in placement.operands:
        holder = modules[operand.module]
        if operand.role == "output":
            take(add((holder, OUTPUT), operand.label), holder, OUTPUT, weight=False)
            continue
        unit = add((holder, operand.call), f"{operand.module}/{operand.call}")
        take(unit, holder, operand_name(operand.call, operand.operand), operand.role == "weight")
    users = [point for point in points(model).values() if point.owner is None]
    made = [unit for unit in found.values() if unit.quantizers]
    return made + [Unit((point.name,), [point.quantizer]) for point in users]


@contextmanager
def seeing_weights(found: list[Unit]) -> Iterator[None]:
    """Within it weights that are made in forward become known as they are quantized."""
    handles = [
        unit.weight.register_forward_hook(_See(unit))
        for unit in found
        if unit.weight is not None and unit.parameter is None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _See:
    def __init__(self, unit: Unit) -> None:
        self.unit = unit

    def __call__(self, quantizer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.unit.parameter = torch.empty_like(args[0], device="meta")
