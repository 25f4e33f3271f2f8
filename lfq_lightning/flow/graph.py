"""The flow of one batch: calls of operations in order, what each reads, and which calls' results that was made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Origin = Literal["parameter", "made", "constant", "batch"]
Owned = tuple[str, str]  # a parameter: the dotted name of the module that has it, and its own name there


@dataclass(frozen=True)
class Site:
    """One call in a network's code, by names that a checkpoint keeps.

    Args:
        module: dotted name of the module in whose own forward the call stands.
        operation: its name in the table of operations.
        number: how many calls of that operation stand before it there.
    """

    module: str
    operation: str
    number: int = 0

    @property
    def call(self) -> str:
        """The call's name within its module, such as `add` or, for the second, `add_1`."""
        return f"{self.operation}_{self.number}" if self.number else self.operation

    def __str__(self) -> str:
        return f"{self.module}/{self.call}"


@dataclass(frozen=True)
class Tensor:
    """One tensor that a call reads.

    Args:
        name: of the operand.
        identity: equal for what is one tensor.
        shape: in elements.
        parameter: which parameter it is, or a part or a turn of; None for what is computed.
        origin: "parameter" for one, or a part or a turn of one; "made" for what is computed from parameters without the
            batch; "constant" for what comes from neither; "batch" for the rest.
        made_of: of what is computed from parameters without the batch, these.
        part: which part of the parameter, by offset and count of elements; None for anything else.
        channels: the parameter's dimension with one output each, or, of what is made of parameters, the tensor's own.
        features: the dimension of an activation's features, counted from the last.
        source: the number of the call whose result it is, at most clipped, dropped out or in another place, or of a
            product, normalized by BatchNorm; or None.
        clipped: whether it is that result clipped.
    """

    name: str
    identity: int
    shape: tuple[int, ...]
    parameter: Owned | None = None
    origin: Origin = "batch"
    made_of: frozenset[Owned] = frozenset()
    part: tuple[int, int] | None = None
    channels: int | None = None
    features: int = -1
    source: int | None = None
    clipped: bool = False

    @property
    def is_weight(self) -> bool:
        """Whether it is a parameter, or computed from some, of two or more dimensions."""
        return self.origin in ("parameter", "made") and len(self.shape) > 1

    @property
    def is_activation(self) -> bool:
        """Whether it comes from the batch."""
        return self.origin == "batch"


@dataclass(frozen=True)
class Call:
    """One call of an operation.

    Args:
        site: where.
        kind: of the operation.
        reads: its operands.
        after: which calls of products and tables, by number, made what it reads, with none between.
        learns: whether gradients are computed there.
        gives: the identity of its result; None where no call reads it as it is.
        mode: of interpolation; empty for other operations.
        read_elsewhere: whether its result, clipped or not, meets a function that is no operation.
        ends_in: the first module that gives its result as others read it: clipped or normalized, where it is.
    """

    site: Site
    kind: str
    reads: tuple[Tensor, ...]
    after: frozenset[int]
    learns: bool
    gives: int | None = None
    mode: str = ""
    read_elsewhere: bool = False
    ends_in: str | None = None

    @property
    def kernel(self) -> str:
        """By which a table of kernels knows it, such as `add` or `interpolate nearest`."""
        return f"{self.site.operation} {self.mode}".strip()


@dataclass(frozen=True)
class Flow:
    """What one batch did.

    Args:
        calls: in order.
        called: the modules that ran, by dotted name, in order.
        within: for each module that makes calls of its own, the modules that it calls.
        read: parameters that something read, with the name of the function that did so first; `Name.apply` for the
            autograd Function of that name.
        source: what was run, in words.
    """

    calls: tuple[Call, ...]
    called: tuple[str, ...]
    within: dict[str, tuple[str, ...]]
    read: dict[Owned, str]
    source: str
