"""The operations that a machine runs on integers: their names, their functions in torch, and what they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import GetSetDescriptorType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lfq_lightning.private import GROUPED_PRODUCT

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Kind = Literal["product", "table", "activation"]


@dataclass(frozen=True)
class Operand:
    """One argument that holds what an operation computes with: a tensor, or several.

    Args:
        name: by which rules and quantizers know it; of several, each has its number behind it.
        place: among the positional arguments.
        keyword: the argument's name.
        channels: of a weight in this place, the dimension with one output each; None where an index of no dimension
            has outputs of its own.
        features: of an activation in this place, the dimension of its features, counted from the last.
        several: whether the argument is a list of tensors.
        most: how many of several count, from the first.
    """

    name: str
    place: int
    keyword: str
    channels: int | None = None
    features: int = -1
    several: bool = False
    most: int | None = None


class Read(NamedTuple):
    """One tensor that a call reads."""

    name: str
    operand: Operand
    value: Tensor


@dataclass(frozen=True)
class Operation:
    """One kind of call.

    Args:
        name: of the operation.
        operands: what it computes with, and a machine would hold as integers.
        kind: "product" for sums of products, which weights are made for; "table" for a choice of rows; "activation"
            for what a network does between products, which is quantized where somebody asks for it.
        functions: what calls it in torch.
    """

    name: str
    operands: tuple[Operand, ...]
    kind: Kind
    functions: tuple[Callable[..., Any], ...]

    def reads(self, args: Args, kwargs: Kwargs) -> list[Read]:
        """The floating tensors among the operands of a call."""
        return [
            Read(name, operand, value)
            for operand in self.operands
            for name, value in self._values(operand, args, kwargs)
            if isinstance(value, Tensor) and value.is_floating_point()
        ]

    def replaced(self, args: Args, kwargs: Kwargs, new: Mapping[str, Tensor]) -> tuple[Args, dict[str, Any]]:
        """The arguments of a call with other operands, by name."""
        positional, named = list(args), dict(kwargs)
        for operand in self.operands:
            values = self._values(operand, args, kwargs)
            if not any(name in new for name, _ in values):
                continue
            made: list[Any] = [new.get(name, value) for name, value in values]
            place = self._place(operand, args)
            if place < len(args) and operand.several and self._spread and isinstance(args[place], Tensor):
                positional[place:] = made
                continue
            given = args[place] if place < len(args) else kwargs[operand.keyword]
            if isinstance(given, (list, tuple)):
                rest = list(given)[len(made) :]
                value: Any = type(given)([*made, *rest])
            else:
                value = made[0]
            if place < len(args):
                positional[place] = value
            else:
                named[operand.keyword] = value
        return tuple(positional), named

    def _values(self, operand: Operand, args: Args, kwargs: Kwargs) -> list[tuple[str, Any]]:
        place = self._place(operand, args)
        value = args[place] if place < len(args) else kwargs.get(operand.keyword)
        if not operand.several:
            return [(operand.name, value)]
        if isinstance(value, Tensor):
            value = args[place:] if self._spread and place < len(args) else [value]
        values = list(value or ())[: operand.most]
        return [(f"{operand.name}{number}", each) for number, each in enumerate(values)]

    _spread = False  # whether tensors may also stand side by side among the arguments

    def _place(self, operand: Operand, args: Args) -> int:
        return operand.place


class _Spread(Operation):
    _spread = True


class _Recurrent(Operation):
    """Packed sequences bring the sizes of their batches in second place."""

    def _place(self, operand: Operand, args: Args) -> int:
        packed = len(args) > 3 and isinstance(args[3], (list, tuple))
        return operand.place + int(packed and operand.place > 0)


def _product(name: str, *operands: Operand, functions: Sequence[Callable[..., Any]]) -> Operation:
    return Operation(name, operands, "product", tuple(functions))


def _activation(name: str, *operands: Operand, functions: Sequence[Callable[..., Any]]) -> Operation:
    return Operation(name, operands, "activation", tuple(functions))


def _convolution(name: str, dims: int, channels: int) -> Operation:
    function = getattr(torch, name)
    operands = Operand("input", 0, "input", features=-1 - dims), Operand("weight", 1, "weight", channels)
    return _product(name, *operands, functions=[function])


def _two(name: str, *functions: Callable[..., Any]) -> Operation:
    return _activation(name, Operand("input", 0, "input"), Operand("other", 1, "other"), functions=functions)


def _one(name: str, features: int, *functions: Callable[..., Any]) -> Operation:
    return _activation(name, Operand("input", 0, "input", features=features), functions=functions)


_LEFT = Operand("input", 0, "input", channels=-2)


def _recurrent(name: str) -> Operation:
    # The state of an LSTM is hidden and cell; the cell is in no product.
    hidden = Operand("hidden", 1, "hx", several=True, most=1)
    operands = Operand("input", 0, "input"), hidden, Operand("weight", 2, "params", 0, several=True)
    return _Recurrent(name, operands, "product", (getattr(torch, name),))


def _cell(name: str) -> Operation:
    hidden = Operand("hidden", 1, "hx", several=True, most=1)
    weights = Operand("weight_ih", 2, "w_ih", 0), Operand("weight_hh", 3, "w_hh", 0)
    return _product(name, Operand("input", 0, "input"), hidden, *weights, functions=[getattr(torch, name)])


_T = Tensor

OPERATIONS: tuple[Operation, ...] = (
    _product("linear", Operand("input", 0, "input"), Operand("weight", 1, "weight", 0), functions=[F.linear]),
    *(_convolution(f"conv{d}d", d, 0) for d in (1, 2, 3)),
    *(_convolution(f"conv_transpose{d}d", d, 1) for d in (1, 2, 3)),
    _product(
        "bilinear",
        *(Operand(f"input{n}", n - 1, f"input{n}") for n in (1, 2)),
        Operand("weight", 2, "weight", 0),
        functions=[F.bilinear],
    ),
    _product(
        "matmul",
        _LEFT,
        Operand("other", 1, "other", channels=-1),
        functions=[torch.matmul, _T.matmul, _T.__matmul__],
    ),
    _product("mm", _LEFT, Operand("mat2", 1, "mat2", channels=-1), functions=[torch.mm, _T.mm]),
    _product("bmm", _LEFT, Operand("mat2", 1, "mat2", channels=-1), functions=[torch.bmm, _T.bmm]),
    _product(
        "grouped_mm",
        Operand("input", 0, "mat_a"),
        Operand("mat2", 1, "mat_b", channels=-1),
        functions=[f for f in (getattr(F, "grouped_mm", None), GROUPED_PRODUCT) if f is not None],
    ),
    _product("mv", _LEFT, Operand("vec", 1, "vec"), functions=[torch.mv, _T.mv]),
    *(
        _product(
            name,
            Operand(first, 1, first, channels=-2),
            Operand(second, 2, second, channels=-1),
            functions=[getattr(torch, name), getattr(_T, name)],
        )
        for name, first, second in (
            ("addmm", "mat1", "mat2"),
            ("baddbmm", "batch1", "batch2"),
            ("addbmm", "batch1", "batch2"),
        )
    ),
    _Spread("einsum", (Operand("operand", 1, "operands", several=True),), "product", (torch.einsum,)),
    _product(
        "scaled_dot_product_attention",
        *(Operand(name, place, name) for place, name in enumerate(("query", "key", "value"))),
        functions=[F.scaled_dot_product_attention],
    ),
    *(_recurrent(name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
    *(_cell(name) for name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")),
    Operation("embedding", (Operand("weight", 1, "weight", 0),), "table", (F.embedding,)),
    Operation("embedding_bag", (Operand("weight", 1, "weight", 0),), "table", (F.embedding_bag,)),
    _two("add", torch.add, _T.add, _T.add_, _T.__add__, _T.__radd__, _T.__iadd__),
    _two("sub", torch.sub, _T.sub, _T.sub_, _T.__sub__, _T.__rsub__, _T.__isub__),
    _two("mul", torch.mul, _T.mul, _T.mul_, _T.__mul__, _T.__rmul__, _T.__imul__),
    _activation("cat", Operand("tensor", 0, "tensors", several=True), functions=[torch.cat, torch.concat]),
    _activation("stack", Operand("tensor", 0, "tensors", several=True), functions=[torch.stack]),
    _one("mean", -1, torch.mean, _T.mean),
    *(_one(f"max_pool{d}d", -1 - d, getattr(F, f"max_pool{d}d")) for d in (1, 2, 3)),
    *(_one(f"avg_pool{d}d", -1 - d, getattr(F, f"avg_pool{d}d")) for d in (1, 2, 3)),
    *(_one(f"adaptive_avg_pool{d}d", -1 - d, getattr(F, f"adaptive_avg_pool{d}d")) for d in (1, 2, 3)),
    *(_one(f"adaptive_max_pool{d}d", -1 - d, getattr(F, f"adaptive_max_pool{d}d")) for d in (1, 2, 3)),
    _one("interpolate", -3, F.interpolate),
)

BY_FUNCTION: dict[Any, Operation] = {function: o for o in OPERATIONS for function in o.functions}
BY_NAME: dict[str, Operation] = {o.name: o for o in OPERATIONS}


def channels_of(operation: Operation, read: Read, args: Args) -> int | None:
    """The dimension of a weight along which each index has outputs of its own, counted from the first."""
    dims = read.value.ndim
    if operation.name == "einsum":
        return _channels_in_einsum(str(args[0]), int(read.name.removeprefix("operand")), dims)
    channels = read.operand.channels
    if channels is None or not -dims <= channels < dims:
        return None
    return channels % dims


def _channels_in_einsum(equation: str, number: int, dims: int) -> int | None:
    """The last dimension that is in the output and in no other operand."""
    terms, _, result = equation.replace(" ", "").partition("->")
    operands = terms.split(",")
    own = operands[number]
    if "." in own or len(own) != dims:
        return None
    others = "".join(operands[:number] + operands[number + 1 :])
    return next((d for d in reversed(range(dims)) if own[d] not in others and own[d] in (result or own)), None)


# What gives the elements of its first argument again, in another place, order or number type: of a parameter, the same
# parameter. Whether a weight is quantized before or after makes no difference.
_MOVING = """
    t transpose swapaxes swapdims permute movedim moveaxis mT T H mH adjoint reshape view view_as flatten unflatten
    ravel squeeze unsqueeze select narrow split chunk unbind tensor_split expand expand_as contiguous clone index_select
    to type type_as float half bfloat16 double detach requires_grad_ alias
"""


def _moves() -> Iterator[Any]:
    for name in _MOVING.split():
        for place in (torch, torch.Tensor):
            function = getattr(place, name, None)
            if function is not None:
                yield function.__get__ if isinstance(function, GetSetDescriptorType) else function
    yield torch.Tensor.__getitem__
    yield torch.Tensor.data.__get__  # type: ignore[attr-defined]


MOVES = frozenset(_moves())

# What runtimes compute within the operation before it, and dropout, which they do not compute; by name.
CLIPS = frozenset(("relu", "relu_", "relu6", "hardtanh", "hardtanh_"))
FUSED = CLIPS | {"dropout", "dropout1d", "dropout2d", "dropout3d"}

# What takes no more than shape and kind from its arguments.
FACTORIES = frozenset((torch.zeros, torch.ones, torch.empty)) | frozenset(
    function
    for name in ("zeros", "ones", "empty", "full")
    for function in (getattr(torch.Tensor, f"new_{name}"), getattr(torch, f"{name}_like"))
)

# What draws anew for each batch, by name: in place, alike or of a given size.
DRAWN = frozenset(
    f"{name}{ending}"
    for name in ("rand", "randn", "randint", "randperm", "random", "uniform", "normal", "bernoulli", "multinomial")
    for ending in ("", "_", "_like")
)


def is_in_place(function: Any) -> bool:
    """Whether a function changes its first argument."""
    name = getattr(function, "__name__", "")
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


CHANGES = frozenset(function for function in BY_FUNCTION if is_in_place(function))  # of the operations' functions
