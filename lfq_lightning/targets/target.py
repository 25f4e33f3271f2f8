"""What one runtime computes in integers, and which specifications it has kernels for."""

from __future__ import annotations

from dataclasses import dataclass

from lfq_lightning.spec import QuantSpec


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
        unsigned: whether activations must have unsigned codes.
        least_group: how many inputs share a scale at least where a weight has groups; powers of two from there on;
            1 for any.
    """

    name: str
    operations: frozenset[str]
    choosing: frozenset[str]
    one_scale: frozenset[str]
    unsigned: bool
    least_group: int

    def together_with(self, other: Target) -> Target:
        """What holds for both."""
        return Target(
            name=f"{self.name} and {other.name}",
            operations=self.operations & other.operations,
            choosing=self.choosing & other.choosing,
            one_scale=self.one_scale | other.one_scale,
            unsigned=self.unsigned or other.unsigned,
            least_group=max(self.least_group, other.least_group),
        )

    def check(self, label: str, weight: QuantSpec | None, activation: QuantSpec | None) -> None:
        """Raise ValueError for specifications that the runtime would compute in float.

        Args:
            label: of the layer or the operand that is to have them.
            weight: of its weight; None for float.
            activation: of what meets it; None for float.
        """
        found = ""
        if weight is not None and not weight.symmetric:
            found, remedy = f"weight={weight!r}", "use symmetric codes, with symmetric=True"
        elif weight is not None and weight.signed is False:
            found, remedy = f"weight={weight!r}", "leave `signed` out, for codes below zero too"
        elif weight is not None and weight.bits > 8:
            found, remedy = f"weight={weight!r}", "use at most 8 bits"
        elif weight is not None and weight.group_size is not None and not self._has_groups_of(weight.group_size):
            found, remedy = (
                f"weight={weight!r}",
                f"use a group_size of {self.least_group}, or a greater power of two",
            )
        elif activation is None:
            return
        elif activation.granularity == "per_token":
            found = f"activation={activation!r}"
            remedy = "leave `target` out, and the runtime quantizes inputs itself as they come"
        elif weight is not None and weight.granularity == "per_group":
            found, remedy = f"weight={weight!r} with a quantized input", "use activation=None, or per_channel weights"
        elif activation.granularity != "per_tensor":
            found, remedy = f"activation={activation!r}", "use granularity='per_tensor'"
        elif activation.bits > 8:
            found, remedy = f"activation={activation!r}", "use at most 8 bits"
        elif self.unsigned and activation.symmetric and activation.signed is not False:
            found, remedy = f"activation={activation!r}", "use symmetric=False, whose codes are unsigned"
        if found:
            raise ValueError(
                f"`target` {self.name!r} must have integer kernels for what is quantized. Found {found} for "
                f"{label!r}, which it computes in float: {remedy}."
            )

    def _has_groups_of(self, size: int) -> bool:
        return self.least_group == 1 or (size >= self.least_group and not size & (size - 1))
