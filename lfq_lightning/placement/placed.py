"""What was placed where, and what was left in float and why; prints as a table and as a short account."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from lfq_lightning.checking import check_rows
from lfq_lightning.placement.meeting import OUTPUT, operand_name
from lfq_lightning.spec import QuantSpec
from lfq_lightning.tables import Table

ASKED_FOR = "it was asked for"


def label_of(module: str, parameter: str) -> str:
    """By which a parameter is known: the module's name alone where it is its weight."""
    return module if module and parameter == "weight" else ".".join(filter(None, (module, parameter)))


@dataclass(frozen=True)
class PlacedLayer:
    """A layer, or a parameter that operations read, and its specifications; None is float.

    Args:
        name: dotted name of the module that has the parameter.
        type_name: of that module.
        weight: for the parameter.
        activation: for what meets it.
        parameter: its own name there.
        readers: dotted names of the modules whose own code reads it by a function; empty where a layer reads its own.
        axis: the parameter's dimension with one output each, where that is not the layer's own.
        features: the dimension of the features of what meets it, counted from the last.
        inputs: how many features that has; None where the layer knows.
        shares: the name of the quantizer that quantizes the same input; empty for one of its own.
    """

    name: str
    type_name: str
    weight: QuantSpec | None
    activation: QuantSpec | None
    parameter: str = "weight"
    readers: tuple[str, ...] = ()
    axis: int | None = None
    features: int = -1
    inputs: int | None = None
    shares: str = ""

    @property
    def label(self) -> str:
        """By which it is shown."""
        return label_of(self.name, self.parameter)


@dataclass(frozen=True)
class PlacedOperand:
    """An operand of one call, or what a module gives, and its specification.

    Args:
        module: dotted name of the module in whose code the call stands.
        call: the call's name there, such as `add_1`; empty for the module's output.
        operand: the operand's name.
        role: what the quantizer serves.
        spec: its specification.
        axis: the dimension of the channels: of a weight from the first, of an activation from the last.
        size: how many channels; None where that is not known.
        shares: the name of the quantizer that quantizes the same tensor; empty for one of its own.
    """

    module: str
    call: str
    operand: str
    role: Literal["weight", "operand", "output"]
    spec: QuantSpec
    axis: int | None = -1
    size: int | None = None
    shares: str = ""

    @property
    def quantizer_name(self) -> str:
        """Dotted name of its quantizer."""
        child = OUTPUT if self.role == "output" else operand_name(self.call, self.operand)
        return ".".join(filter(None, (self.module, child)))

    @property
    def label(self) -> str:
        """By which it is shown."""
        if self.role == "output":
            return f"{self.module} output" if self.module else "output"
        return "/".join(filter(None, (self.module, self.call, self.operand)))


@dataclass(frozen=True)
class Placement:
    """All that is quantized, and every module with weights that was left in float with the reason; prints as a table.

    Args:
        layers: layers, and parameters that operations read elsewhere.
        left_in_float: dotted name and reason, for each module that has a parameter of two or more dimensions which no
            quantizer serves.
        operands: operands of calls, and outputs.
        elements: of parameters of two or more dimensions: how many are quantized, and how many there are.
        left_elements: how many are left in float, by dotted name.
        source: the batch by whose flow they were found, in words; empty where only layers of known types were sought.
        unseen: why no batch was run, where one was sought.
    """

    layers: tuple[PlacedLayer, ...]
    left_in_float: tuple[tuple[str, str], ...] = ()
    operands: tuple[PlacedOperand, ...] = ()
    elements: tuple[int, int] = (0, 0)
    left_elements: tuple[tuple[str, int], ...] = ()
    source: str = ""
    unseen: str = ""

    def __post_init__(self) -> None:
        check_rows("layers", self.layers, PlacedLayer)
        check_rows("left_in_float", self.left_in_float, tuple)
        check_rows("operands", self.operands, PlacedOperand)

    def accounted(
        self, left: Mapping[str, str], left_elements: Mapping[str, int], elements: tuple[int, int], source: str
    ) -> Placement:
        """With what is left in float."""
        made = replace(self, left_in_float=tuple(left.items()), left_elements=tuple(left_elements.items()))
        return replace(made, elements=elements, source=source)

    @property
    def share(self) -> float:
        """The part of the elements of parameters of two or more dimensions that is quantized, from 0 to 1."""
        quantized, every = self.elements
        return quantized / every if every else 1.0

    @property
    def share_asked_for(self) -> float:
        """The part that is in float because a rule or an argument says so."""
        asked = {name for name, reason in self.left_in_float if reason == ASKED_FOR}
        return sum(n for name, n in self.left_elements if name in asked) / max(self.elements[1], 1)

    def shortfall(self, where: str) -> str:
        """What to warn of where less than half of the weights are quantized and nobody asked for that, or nothing.

        Args:
            where: the placement is at the user's hand.
        """
        if not self.elements[1] or self.share + self.share_asked_for >= 0.5:
            return ""
        without = "" if self.source else ", and give an `example`, which shows every operation that reads a weight"
        return (
            f"Most of a model's weights should be quantized. Found {self.share:.1%} of them: print {where} for all "
            f"that is in float, and why{without}."
        )

    def __str__(self) -> str:
        rows = []
        for layer in self.layers:
            weight, activation = (s.label if s else "float" for s in (layer.weight, layer.activation))
            rows.append((layer.label, layer.type_name, weight, activation))
        for operand in self.operands:
            label = operand.spec.label
            pair = (label, "") if operand.role == "weight" else ("", label)
            rows.append((operand.label, operand.call or "output", *pair))
        rows += [(name or "(model)", "", "float", "float") for name, _ in self.left_in_float]
        notes = [f"left in float, as {reason}: {', '.join(names)}" for reason, names in self._why().items()]
        return str(Table({"layer": "<", "type": "<", "weight": "<", "input": "<"}, rows, notes))

    def _why(self) -> dict[str, list[str]]:
        why: dict[str, list[str]] = {}
        for name, reason in self.left_in_float:
            why.setdefault(reason, []).append(name or "(model)")
        return why

    @property
    def account(self) -> list[str]:
        """What is quantized and what is not, in at most five lines."""
        weights = [layer.weight for layer in self.layers if layer.weight] + [
            operand.spec for operand in self.operands if operand.role == "weight"
        ]
        activations = [layer.activation for layer in self.layers if layer.activation and not layer.shares]
        activations += [o.spec for o in self.operands if o.role != "weight" and not o.shares]
        lines = [
            f"Quantized: {len(weights)} weights{_widths(weights)}, {self.share:.1%} of {_millions(self.elements[1])} "
            f"weight parameters; {len(activations)} activations{_widths(activations)}."
        ]
        if not self.source:
            reason = f" ({self.unseen})" if self.unseen else ""
            lines.append(
                f"No batch was run to see what the model does{reason}: layers of known types are quantized, first and "
                "last by their order. Give `example` to quantize every operation that reads a parameter."
            )
        sizes = dict(self.left_elements)
        why = sorted(self._why().items(), key=lambda item: -sum(sizes.get(_plain(n), 0) for n in item[1]))
        for reason, names in why[: 5 - len(lines)]:
            part = sum(sizes.get(_plain(name), 0) for name in names) / max(self.elements[1], 1)
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            lines.append(f"In float ({part:.1%}), as {reason}: {shown}.")
        return lines


def _plain(name: str) -> str:
    return "" if name == "(model)" else name


def _widths(specs: list[QuantSpec]) -> str:
    """The numbers of bits with how often each occurs, the most frequent first."""
    counts: dict[int, int] = {}
    for spec in specs:
        counts[spec.bits] = counts.get(spec.bits, 0) + 1
    shown = [f"{bits} bits" if len(counts) == 1 else f"{n} in {bits}" for bits, n in counts.items()]
    return f" in {shown[0]}" if len(counts) == 1 else f" ({', '.join(shown)} bits)" if shown else ""


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
