"""What one runtime computes in integers, and which specifications it has kernels for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lfq_lightning.spec import QuantSpec, SpecLike, activation_spec

Codes = Literal["any", "unsigned", "centred"]
Sums = Literal["any", "operands", "fused"]


@dataclass(frozen=True)
class Target:
    """A runtime that executes quantized networks.

    Args:
        name: by which a user asks for it.
        operations: beside those that read a parameter, the operations that it computes in integers where all their
            operands and their result are quantized; names of the table of operations, of interpolation with its mode.
        choosing: those among them that choose among values: their result has their operand's scale, and they need no
            quantizer of their own.
        one_scale: those among them whose operands and result must all have one scale.
        codes: of activations: "unsigned" ones, "centred" ones, which are signed with their zero point at 0, or "any".
        sums: what it wants of an addition: both "operands" quantized; that of a product bare, to which it adds the
            other within the product ("fused"); or "any" of these.
        results: operations of layers that it computes in integers only where their result is quantized too.
        narrow: whether weights of 8 bits have as many codes above zero as below, -127 to 127, so that a normalization
            with a negative factor can go into them.
        least_bits: of activations: fewer than 8 saturate by an operation of their own before they are quantized; 1 for
            any.
        least_group: how many inputs share a scale at least where a weight has groups; powers of two from there on; 1
            for any, None where it has no kernels for groups.
    """

    name: str
    operations: frozenset[str]
    choosing: frozenset[str]
    one_scale: frozenset[str]
    codes: Codes
    sums: Sums
    results: frozenset[str]
    narrow: bool
    least_bits: int
    least_group: int | None

    def together_with(self, other: Target) -> Target:
        """What holds for both.

        Raises:
            ValueError: if one network cannot serve both.
        """
        groups = self.least_group, other.least_group
        return Target(
            name=f"{self.name} and {other.name}",
            operations=self.operations & other.operations,
            choosing=self.choosing & other.choosing,
            one_scale=self.one_scale | other.one_scale,
            codes=self._agreed(self.codes, other.codes, other, "codes of activations"),  # type: ignore[arg-type]
            sums=self._agreed(self.sums, other.sums, other, "operands of additions"),  # type: ignore[arg-type]
            results=self.results | other.results,
            narrow=self.narrow or other.narrow,
            least_bits=max(self.least_bits, other.least_bits),
            least_group=None if groups[0] is None or groups[1] is None else max(groups[0], groups[1]),
        )

    def _agreed(self, own: str, others: str, other: Target, what: str) -> str:
        if "any" not in (own, others) and own != others:
            raise ValueError(
                f"`target` must name runtimes that one network serves. Found {self.name!r} and {other.name!r}, whose "
                f"{what} differ ({own} and {others}): train for one of them, or for each by itself."
            )
        return others if own == "any" else own

    def weight(self, spec: QuantSpec | None) -> QuantSpec | None:
        """A weight's specification, with codes that the runtime takes where the one given leaves them open."""
        if spec is None or not self.narrow or spec.bits != 8 or not spec.symmetric or spec.quant_min is not None:
            return spec
        return spec if spec.signed is False else spec.replace(quant_min=-127, quant_max=127)

    def activation(self, given: SpecLike) -> QuantSpec | None:
        """An activation's specification, with codes that the runtime takes where the one given leaves them open."""
        spec = activation_spec(given)
        if spec is None or self.codes != "centred" or spec.quant_min is not None:
            return spec
        if isinstance(given, int):
            return spec.replace(symmetric=True, signed=True)
        return spec.replace(signed=True) if spec.symmetric and spec.signed is None else spec

    def check(self, label: str, weight: QuantSpec | None, activation: QuantSpec | None) -> None:
        """Raise ValueError for specifications that the runtime would compute in float.

        Args:
            label: of the layer or the operand that is to have them.
            weight: of its weight; None for float.
            activation: of what meets it; None for float.
        """
        found = self._against_weight(weight)
        if not found and activation is not None:
            found = self._against_activation(weight, activation)
        if found:
            raise ValueError(
                f"`target` {self.name!r} must have integer kernels for what is quantized. Found {found[0]} for "
                f"{label!r}, which it computes in float: {found[1]}."
            )

    def _against_weight(self, weight: QuantSpec | None) -> tuple[str, str] | None:
        if weight is None:
            return None
        found, remedy = f"weight={weight!r}", ""
        if not weight.symmetric:
            remedy = "use symmetric codes, with symmetric=True"
        elif weight.signed is False:
            remedy = "leave `signed` out, for codes below zero too"
        elif weight.bits > 8:
            remedy = "use at most 8 bits"
        elif weight.group_size is not None and self.least_group is None:
            remedy = "use granularity='per_channel'"
        elif weight.group_size is not None and not self._has_groups_of(weight.group_size):
            remedy = f"use a group_size of {self.least_group}, or a greater power of two"
        return (found, remedy) if remedy else None

    def _against_activation(self, weight: QuantSpec | None, activation: QuantSpec) -> tuple[str, str] | None:
        found, remedy = f"activation={activation!r}", ""
        low, high = activation.code_range(signed=True)
        if activation.granularity == "per_token":
            remedy = "leave `target` out, and the runtime quantizes inputs itself as they come"
        elif weight is not None and weight.granularity == "per_group":
            found, remedy = f"weight={weight!r} with a quantized input", "use activation=None, or per_channel weights"
        elif activation.granularity != "per_tensor":
            remedy = "use granularity='per_tensor'"
        elif activation.bits > 8:
            remedy = "use at most 8 bits"
        elif self.codes == "unsigned" and activation.symmetric and activation.signed is not False:
            remedy = "use symmetric=False, whose codes are unsigned"
        elif self.codes == "centred" and not (activation.symmetric and low < 0):
            remedy = "use symmetric=True and signed=True, or the number of bits alone"
        elif high - low < 2**self.least_bits - 1:
            remedy = f"use {self.least_bits} bits and all their codes"
        return (found, remedy) if remedy else None

    def _has_groups_of(self, size: int) -> bool:
        least = self.least_group or 1
        return least == 1 or (size >= least and not size & (size - 1))
