"""Modules whose own code calls operations: what these read is quantized on the way, wherever it comes from."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lfq_lightning.flow.operations import BY_FUNCTION, BY_NAME, CHANGES, MOVES, Operation
from lfq_lightning.flow.spelling import SPELLED
from lfq_lightning.placement.sharing import quantized_once

OUTPUT = "output_quantizer"


def weight_name(parameter: str) -> str:
    """Under which name a module holds the quantizer of one of its parameters."""
    return f"{parameter}_quantizer"


def input_name(parameter: str) -> str:
    """Under which name a module holds the quantizer of what meets one of its parameters."""
    return "input_quantizer" if parameter == "weight" else f"{parameter}_input_quantizer"


def operand_name(call: str, operand: str) -> str:
    """Under which name a module holds the quantizer of an operand of one of its calls."""
    return f"{call}_{operand}_quantizer"


def _child(module: nn.Module, name: str) -> Any:
    """A quantizer, or what stands in for it in an export; None without one."""
    return module._modules.get(name)


class Reads(NamedTuple):
    """A parameter that a module's own code reads by a function, and the module that has it."""

    owner: nn.Module
    parameter: str


class MeetsOperations(nn.Module):
    """Mixed into a module's class at run time, as `QuantizedLayer` is into a layer's.

    While its own forward runs, a `TorchFunctionMode` looks at every call. Parameters that are noted here are quantized
    where a function first meets them, so that transposes, slices and casts of them are quantized too; operands of calls
    are known by the call's name and by how many of that name came before it. What its submodules call is not looked at.
    """

    of_float_type = True
    met_reads: tuple[Reads, ...] = ()
    met_operands: tuple[tuple[str, str], ...] = ()  # of a call, such as `add_1`, and of the operand, such as `other`

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        kinds = type(self).__mro__
        return _rebuild, (kinds[kinds.index(MeetsOperations) + 1],), self.__getstate__()


@cache
def meeting_type(module_type: type[nn.Module]) -> type[nn.Module]:
    """The class that a module of this type takes while operations in its code are quantized."""

    @wraps(module_type.forward)  # whose signature says which inputs of a batch are the model's
    def forward(self: MeetsOperations, *args: Any, **kwargs: Any) -> Any:
        with _meeting(self):
            return module_type.forward(self, *args, **kwargs)

    if issubclass(module_type, nn.RNNBase):
        forward = torch.compiler.disable(forward)  # Dynamo leaves torch's own to eager execution as well
    members = {"__module__": __name__, "forward": forward}
    return type(f"Quantized{module_type.__name__}", (MeetsOperations, module_type), members)


def _rebuild(module_type: type[nn.Module]) -> nn.Module:
    made = meeting_type(module_type)  # type: ignore[arg-type]
    return made.__new__(made)


class _Meetings(threading.local):
    """The forwards that run in a thread, of modules that meet operations; the innermost last."""

    def __init__(self) -> None:
        self.running: list[_Meeting] = []


_meetings = _Meetings()
_traced: list[_Meeting] = []  # while a compiler looks on, which does so in one thread at a time


def _running() -> list[_Meeting]:
    return _traced if torch.compiler.is_compiling() else _meetings.running


@contextmanager
def _meeting(module: MeetsOperations) -> Iterator[None]:
    running, meeting = _running(), _Meeting(module)
    running.append(meeting)
    try:
        with meeting:
            yield
    finally:
        running.pop()


def enter_submodule(module: nn.Module, args: Any) -> None:
    """A forward pre-hook: what is called from here on is not the caller's own."""
    running = _running()
    if running:
        running[-1].depth += 1


def leave_submodule(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook: what is called from here on is the caller's own again."""
    running = _running()
    if running:
        running[-1].depth -= 1


# Methods of tensors that are written in Python. Dynamo knows them by name alone, traces a call of one, but not what is
# in it.
_IN_PYTHON = {name: value for name, value in vars(Tensor).items() if isinstance(value, FunctionType)}
_BY_NAME_ALONE = {name: BY_FUNCTION[value] for name, value in _IN_PYTHON.items() if value in BY_FUNCTION}
_BY_NAME_ALONE["grouped_mm_fallback"] = BY_NAME["grouped_mm"]  # transformers' own, where compiled in float32
_MOVES_IN_PYTHON = frozenset(name for name, value in _IN_PYTHON.items() if value in MOVES)


def _is_traced_by_name(function: Any) -> bool:
    return torch.compiler.is_compiling() and function.__name__ in _IN_PYTHON


def _operation(function: Any) -> Operation | None:
    if torch.compiler.is_compiling() and function.__name__ in _BY_NAME_ALONE:
        return _BY_NAME_ALONE[function.__name__]
    return BY_FUNCTION.get(function)


def _moves(function: Any) -> bool:
    return function.__name__ in _MOVES_IN_PYTHON if _is_traced_by_name(function) else function in MOVES


def _called(function: Any, args: Any, kwargs: Any) -> Any:
    if _is_traced_by_name(function) and isinstance(args[0], Tensor):
        return getattr(args[0], function.__name__)(*args[1:], **kwargs)
    return function(*args, **kwargs)


class _Meeting(TorchFunctionMode):
    """One forward of one module."""

    def __init__(self, module: MeetsOperations) -> None:
        super().__init__()
        self.depth = 0
        self._module = module
        self._counted: dict[str, int] = {}
        self._parameters = [(reads.owner._parameters[reads.parameter], reads) for reads in module.met_reads]
        self._made: list[tuple[Tensor, Reads]] = []  # quantized parameters, and what was made of them by moves
        self._whole: list[tuple[Tensor, Tensor]] = []  # a parameter, and its quantized values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.depth:
            return _called(func, args, kwargs)
        if func in SPELLED:
            with self:
                return SPELLED[func](*args, **kwargs)
        operation = _operation(func)
        if operation is not None:
            call = self._next(operation)
            if func in CHANGES and (call, operation.operands[0].name) in self._module.met_operands:
                # A copy is quantized, kept for backward and changed; then the caller's tensor has what came of it.
                new = self._met(operation, call, (args[0].clone(), *args[1:]), kwargs)
                return args[0].copy_(_called(func, *new))
            return _called(func, *self._met(operation, call, args, kwargs))
        if self._parameters and args and _moves(func):
            reads = self._reads(args[0])
            if reads is not None:
                result = _called(func, (self._quantized(args[0], reads), *args[1:]), kwargs)
                several = result if isinstance(result, (list, tuple)) else (result,)
                self._made += [(each, reads) for each in several if isinstance(each, Tensor)]
                return result
        return _called(func, args, kwargs)

    def _reads(self, value: Any) -> Reads | None:
        for parameter, reads in self._parameters:
            if value is parameter:
                return reads
        for made, reads in self._made:
            if value is made:
                return reads
        return None

    def _quantized(self, value: Tensor, reads: Reads) -> Tensor:
        """The whole parameter's quantized values; what was made of these is quantized already."""
        parameter = reads.owner._parameters[reads.parameter]
        if value is not parameter:
            return value
        for known, made in self._whole:
            if known is parameter:
                return made
        quantizer = _child(reads.owner, weight_name(reads.parameter))
        made = value
        if quantizer is not None:
            made = quantizer.in_graph(quantizer(value, self._learns(reads)))
        self._whole.append((value, made))
        return made

    def _learns(self, reads: Reads) -> bool:
        parameter = reads.owner._parameters[reads.parameter]
        return bool(reads.owner.__dict__.get("learns_alone")) or (parameter is not None and parameter.requires_grad)

    def _next(self, operation: Operation) -> str:
        """The name of the next call of an operation."""
        number = self._counted.get(operation.name, 0)
        self._counted[operation.name] = number + 1
        return f"{operation.name}_{number}" if number else operation.name

    def _met(self, operation: Operation, call: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of a call with what is quantized of them."""
        new: dict[str, Tensor] = {}
        meets: Reads | None = None  # the one parameter that it reads
        parameters = 0
        reads = operation.reads(args, kwargs)
        for name, _, value in reads:
            if (call, name) in self._module.met_operands:
                quantizer = _child(self._module, operand_name(call, name))
                if quantizer is not None:
                    new[name] = _in_graph(quantizer, quantized_once(quantizer, value, True), value)
                continue
            found = self._reads(value)
            if found is not None:
                new[name], meets, parameters = self._quantized(value, found), found, parameters + 1
        if meets is not None and parameters == 1 and operation.kind == "product":
            quantizer = _child(meets.owner, input_name(meets.parameter))
            first = next((read for read in reads if read.name not in new), None)
            if quantizer is not None and first is not None:
                made = quantized_once(quantizer, first.value, self._learns(meets))
                new[first.name] = _in_graph(quantizer, made, first.value)
        return operation.replaced(args, kwargs, new) if new else (args, kwargs)


def _in_graph(quantizer: Any, made: Tensor, given: Tensor) -> Tensor:
    """Of an activation that is not quantized yet, a copy: a view would forbid the user's code to change it in place."""
    in_graph: Tensor = quantizer.in_graph(made)
    return in_graph.clone() if made is given and in_graph is not made else in_graph


class QuantizedOutput:
    """A forward hook that quantizes what a module gives: a tensor, or the first of several."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        quantizer = _child(module, OUTPUT)
        if quantizer is None:
            return None
        if isinstance(output, Tensor):
            return quantizer.in_graph(quantizer(output)) if output.is_floating_point() else None
        if isinstance(output, (list, tuple)) and output and isinstance(output[0], Tensor):
            return type(output)([quantizer.in_graph(quantizer(output[0])), *output[1:]])
        return None


# ---- putting on and taking off --------------------------------------------------------------------------------------

_HOOKS = "_hooks_of_operations"


def meet_operations(
    module: nn.Module, reads: Iterable[tuple[nn.Module, str]], operands: Iterable[tuple[str, str]]
) -> None:
    """Have a module meet the operations in its own code, beside those that it meets already."""
    if not isinstance(module, MeetsOperations):
        module.__class__ = meeting_type(type(module))  # type: ignore[arg-type]
    assert isinstance(module, MeetsOperations)
    known = list(module.met_reads)
    for owner, parameter in reads:
        if not any(owner is each.owner and parameter == each.parameter for each in known):
            known.append(Reads(owner, parameter))
    module.met_reads = tuple(known)
    module.met_operands = tuple(dict.fromkeys((*module.met_operands, *operands)))
    for submodule in module.modules():
        runs = type(submodule).forward is not nn.Module.forward
        if submodule is not module and runs and _HOOKS not in submodule.__dict__:
            submodule.__dict__[_HOOKS] = (
                submodule.register_forward_pre_hook(enter_submodule, prepend=True),
                submodule.register_forward_hook(leave_submodule, always_call=True),
            )


def quantize_output(module: nn.Module) -> None:
    """Have what a module gives pass through its `output_quantizer`."""
    if "_hook_of_output" not in module.__dict__:
        module.__dict__["_hook_of_output"] = module.register_forward_hook(QuantizedOutput(), prepend=True)


def leave_operations(model: nn.Module, keep: Collection[nn.Module] = ()) -> None:
    """Take off all that `meet_operations` and `quantize_output` have put on a model's modules, but the quantizers.

    Args:
        model: any module.
        keep: modules that go on meeting operations, and quantizing what they give.
    """
    watched = {inner for module in keep for inner in module.modules() if inner is not module}
    for module in model.modules():
        if module not in watched:
            for handle in module.__dict__.pop(_HOOKS, ()):
                handle.remove()
        if module in keep:
            continue
        if "_hook_of_output" in module.__dict__:
            module.__dict__.pop("_hook_of_output").remove()
        if isinstance(module, MeetsOperations):
            for name in ("met_reads", "met_operands"):
                module.__dict__.pop(name, None)
            kinds = type(module).__mro__
            module.__class__ = kinds[kinds.index(MeetsOperations) + 1]


def meeting_modules(model: nn.Module) -> Mapping[str, MeetsOperations]:
    """The modules of a model that meet operations, by dotted name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MeetsOperations)}
