"""An example batch run for its flow: nothing is computed where that can be helped, and nothing of the model changes."""

from __future__ import annotations

import copy
import inspect
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset

from lfq_lightning.flow.graph import Call, Flow, Origin, Owned, Site, Tensor
from lfq_lightning.flow.operations import (
    BY_FUNCTION,
    CLIPS,
    DRAWN,
    FACTORIES,
    FUSED,
    MOVES,
    Operation,
    channels_of,
    is_in_place,
)
from lfq_lightning.flow.spelling import SPELLED
from lfq_lightning.private import FakeTensor, FakeTensorMode, plain_name, tree_leaves, tree_map_only, version_of

Run = Callable[[nn.Module], Any]


def trace(
    model: nn.Module,
    run: Run,
    source: str,
    untouched: tuple[Any, ...] = (),
    prepare: Callable[[nn.Module], None] | None = None,
) -> Flow:
    """What one batch does in a model.

    The model is copied without its tensors, and the copy is run without values (`FakeTensorMode`), so that this takes
    no memory and a fraction of a second, and works on the meta device. Where values decide what happens it is run with
    them, on copies of its buffers. Random states, parameters, buffers and what modules know in Python stay as they are.

    Args:
        model: in the mode in which it will train.
        run: runs the copy on the batch.
        source: what that is, in words.
        untouched: objects that the copy shares with the model, such as its Trainer.
        prepare: changes the copy before it runs.

    Raises:
        Exception: what the model raises where the batch cannot be run; with notes of what was tried.
    """
    try:
        copied = _copied(model, untouched, prepare, with_values=False)
        with states_kept(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return _run(copied, run, source, mode)
    except Exception as error:  # of any kind: the model's own code meets tensors without values
        reason = f"{type(error).__name__}: {error}"
    try:
        copied = _copied(model, untouched, prepare, with_values=True)
        with states_kept():
            return _run(copied, run, source, None)
    except Exception as error:
        error.add_note(f"Without values it could not be run either: {reason:.300}")
        raise


def _copied(
    model: nn.Module, untouched: tuple[Any, ...], prepare: Callable[[nn.Module], None] | None, with_values: bool
) -> nn.Module:
    """A copy for what the model's code notes in Python, with the model's own tensors unless they are to have values."""
    known: dict[int, Any] = {id(each): each for each in untouched}
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, (Dataset, DataLoader)):
                known[id(value)] = value
        for holder in (module.__dict__, module._parameters, module._buffers):
            for tensor in tree_leaves(list(holder.values())):
                if isinstance(tensor, torch.Tensor) and not with_values:
                    known[id(tensor)] = tensor
                elif isinstance(tensor, torch.Tensor) and not tensor.is_leaf:  # as old weight_norm leaves one
                    known[id(tensor)] = tensor.detach().clone()
    copied = copy.deepcopy(model, known)
    if prepare is not None:
        prepare(copied)
    return copied


@contextmanager
def states_kept() -> Iterator[None]:
    """Within it random numbers may be drawn; afterwards every generator of the process is as it was."""
    python = random.getstate()
    with ExitStack() as stack:
        stack.callback(random.setstate, python)
        try:
            import numpy

            stack.callback(numpy.random.set_state, numpy.random.get_state())
        except ImportError:
            pass
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count()), enabled=True))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def _run(model: nn.Module, run: Run, source: str, without_values: FakeTensorMode | None) -> Flow:
    tracer = _Tracer(model, without_values)
    with torch.compiler.set_stance("force_eager"), torch.enable_grad(), tracer:
        run(model)
    return tracer.flow(source)


@dataclass
class _Known:
    """What is known of a tensor."""

    after: frozenset[int] = frozenset()
    origin: Origin = "batch"
    parameter: Owned | None = None
    made_of: frozenset[Owned] = frozenset()
    source: int | None = None
    clipped: bool = False


@dataclass
class _Frame:
    """A module's forward that is running, or what runs it all."""

    name: str | None
    counted: Counter[str] = field(default_factory=Counter)


class _Tracer(TorchFunctionMode):
    def __init__(self, model: nn.Module, without_values: FakeTensorMode | None) -> None:
        super().__init__()
        self._without_values = without_values
        self._names: dict[nn.Module, str] = {}
        self._known: dict[int, _Known] = {}
        self._kept: list[Any] = []  # so that no identity is used twice
        self._by_node: dict[Any, _Known] = {}
        self._calls: list[Call] = []
        self._called: dict[str, None] = {}
        self._within: dict[str, dict[str, None]] = {}
        self._read: dict[Owned, str] = {}
        self._shapes: dict[Owned, Any] = {}
        self._frames = [_Frame(None)]
        self._identities: dict[tuple[int, int], int] = {}
        self._gives: dict[int, tuple[int, int]] = {}
        self._read_elsewhere: set[int] = set()
        self._ends_in: dict[int, tuple[str, tuple[int, int]]] = {}
        for path, module in model.named_modules():
            name = self._names[module] = plain_name(path)
            for own, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in self._known:
                    self._known[id(parameter)] = _Known(origin="parameter", parameter=(name, own))
            for buffer in module.buffers(recurse=False):
                self._known[id(buffer)] = _Known(origin="constant")
            module.register_forward_pre_hook(self._enter, prepend=True)
            module.register_forward_hook(self._leave, always_call=True)

    def __deepcopy__(self, memo: Any) -> _Tracer:
        return self  # a model that copies itself copies its hooks, which still belong here

    def flow(self, source: str) -> Flow:
        """What was seen."""
        within = {name: tuple(inner) for name, inner in self._within.items()}
        calls = (
            replace(
                call,
                gives=self._identities.get(self._gives.get(number, (0, 0))),
                read_elsewhere=number in self._read_elsewhere,
                ends_in=self._ends_in[number][0] if number in self._ends_in else None,
            )
            for number, call in enumerate(self._calls)
        )
        return Flow(tuple(calls), tuple(self._called), within, dict(self._read), source)

    def _enter(self, module: nn.Module, args: Any) -> None:
        name, caller = self._names.get(module), self._frames[-1].name
        if name is not None:
            self._called[name] = None
        if caller is not None and name is not None:
            self._within.setdefault(caller, {})[name] = None
        self._frames.append(_Frame(name))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if len(self._frames) > 1:
            self._frames.pop()
        known = self._known.get(id(output)) if isinstance(output, torch.Tensor) else None
        if known is not None and known.source is not None and module in self._names:
            tensor = id(output), version_of(output)
            if self._ends_in.get(known.source, ("", None))[1] != tensor:
                self._ends_in[known.source] = self._names[module], tensor

    # ---- one call -------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in SPELLED:
            with self:
                return SPELLED[func](*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = [self._of(tensor) for tensor in given]  # before the call may change one in place
        operation, custom = BY_FUNCTION.get(func), _custom_function()
        call = None
        if operation is not None:
            number = self._frames[-1].counted[operation.name]
            self._frames[-1].counted[operation.name] += 1
            if custom is None:
                call = self._count(operation, number, args, kwargs)
        if self._without_values is not None:  # which would change what has values in place
            args, kwargs = tree_map_only(torch.Tensor, self._valueless, (args, kwargs))
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        moved = func in MOVES and known and known[0].parameter is not None
        if not moved and made:
            for each in known:  # an operand is noted by now
                if each.parameter is not None:
                    self._read.setdefault(each.parameter, custom or _name_of(func) or str(func))
        after = frozenset[int]().union(*(each.after for each in known))
        if call is not None and self._calls[call].kind != "activation":
            after = frozenset([call])
        new = known[0] if moved else _result(func, known, after)
        if made and not moved:
            source = self._source(func, call, known)
            clipped = call is None and source is not None and (known[0].clipped or _name_of(func) in CLIPS)
            new = replace(new, source=source, clipped=clipped)
            if call is not None:
                self._gives[call] = id(made[0]), version_of(made[0])
        for tensor in made:
            self._note(tensor, new)
        if given and not moved and (result is None or is_in_place(func)):
            for changed in (given[0], given[0]._base):
                if changed is not None and not isinstance(changed, nn.Parameter):
                    self._note(changed, new)
        return result

    def _source(self, func: Any, call: int | None, known: list[_Known]) -> int | None:
        """The call whose result a function gives; where it makes something else of results, these are read."""
        source = call
        if call is None and known and func in MOVES:
            return known[0].source
        if call is None and known and (_name_of(func) in FUSED or self._folds(func, known[0])):
            source = known[0].source
        if source is not None:
            return source
        self._read_elsewhere.update(each.source for each in known if each.source is not None)
        return None

    def _folds(self, func: Any, given: _Known) -> bool:
        """Whether a function is a normalization that goes into the product before it when that is exported."""
        source = None if given.clipped else given.source
        return _name_of(func) == "batch_norm" and source is not None and self._calls[source].kind == "product"

    def _count(self, operation: Operation, number: int, args: Any, kwargs: Any) -> int | None:
        """Note a call, unless it computes with parameters alone; its place among all calls."""
        frame = self._frames[-1]
        reads, after = [], frozenset[int]()
        for read in operation.reads(args, kwargs):
            known = self._of(read.value)
            after |= known.after
            if known.parameter is not None:
                self._read.setdefault(known.parameter, operation.name)
            reads.append(self._tensor(operation, read, known, args))
        if operation.kind != "table" and not any(read.is_activation for read in reads):
            return None
        site = Site("" if frame.name is None else frame.name, operation.name, number if frame.name is not None else -1)
        mode = _mode(operation, args, kwargs)
        self._calls.append(Call(site, operation.kind, tuple(reads), after, torch.is_grad_enabled(), mode=mode))
        return len(self._calls) - 1

    def _tensor(self, operation: Operation, read: Any, known: _Known, args: Any) -> Tensor:
        value, part, channels = read.value, None, None
        if known.origin in ("parameter", "made"):
            channels = channels_of(operation, read, args)
        if known.parameter is not None:
            part = int(value.storage_offset()), value.numel()
            channels = self._in_parameter(known.parameter, value, channels)
        features = read.operand.features
        # What was changed in place since is another tensor.
        identity = self._identities.setdefault((id(value), version_of(value)), len(self._identities))
        whence = known.parameter, known.origin, known.made_of
        shape, made = tuple(value.shape), (known.source, known.clipped)
        return Tensor(read.name, identity, shape, *whence, part, channels, features, *made)

    def _in_parameter(self, parameter: Owned, value: torch.Tensor, channels: int | None) -> int | None:
        """The parameter's own dimension that a dimension of its view is: the one of the same stride."""
        whole = self._shapes.get(parameter)
        if channels is None or whole is None:
            return channels
        shape, stride = whole
        if tuple(value.shape) == shape and value.stride() == stride:
            return channels
        same = [d for d in range(len(shape)) if shape[d] > 1 and stride[d] == value.stride(channels)]
        return same[0] if same else 0

    def _valueless(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self._without_values is not None
        return tensor if isinstance(tensor, FakeTensor) else self._without_values.from_tensor(tensor)

    # ---- tensors --------------------------------------------------------------------------------------------------

    def _note(self, tensor: torch.Tensor, known: _Known) -> None:
        self._kept.append(tensor)
        self._known[id(tensor)] = known
        if tensor.grad_fn is not None:
            self._by_node[tensor.grad_fn] = known

    def _of(self, tensor: torch.Tensor) -> _Known:
        known = self._known.get(id(tensor))
        if known is None:
            known = self._by_graph(tensor)
            self._note(tensor, known)
        elif known.parameter is not None and known.parameter not in self._shapes:
            self._shapes[known.parameter] = (tuple(tensor.shape), tensor.stride())
        return known

    def _by_graph(self, tensor: torch.Tensor) -> _Known:
        """Of a tensor that no function of torch's gave, such as a custom `Function`'s: what its graph leads to."""
        if tensor.grad_fn is None:
            return _Known()
        found, waiting, met = frozenset[int](), [tensor.grad_fn], set()
        while waiting:
            node = waiting.pop()
            if node is None or node in met:
                continue
            met.add(node)
            if node in self._by_node:
                found |= self._by_node[node].after
            else:
                waiting += [before for before, _ in node.next_functions if before is not None]
        return _Known(found)


def _mode(operation: Operation, args: Any, kwargs: Any) -> str:
    """What a runtime asks of an operation beside its name."""
    if operation.name == "interpolate":
        return str(args[3] if len(args) > 3 else kwargs.get("mode", "nearest"))
    if operation.name == "mean":
        given = args[1] if len(args) > 1 else kwargs.get("dim")
        dims = given if isinstance(given, (tuple, list)) else (given,)
        rank = args[0].ndim if args else 0
        all_pixels = (
            rank > 2 and all(isinstance(d, int) for d in dims) and {d % rank for d in dims} == {*range(2, rank)}
        )
        return "of pixels" if all_pixels else ""
    return ""


def _name_of(function: Any) -> str:
    return str(getattr(function, "__name__", ""))


def _result(function: Any, known: list[_Known], after: frozenset[int]) -> _Known:
    """What is known of what a function gives."""
    origin = _origin(function, known)
    if origin != "made":
        return _Known(after, origin)
    parameters = (frozenset([each.parameter]) if each.parameter else each.made_of for each in known)
    return _Known(after, origin, None, frozenset[Owned]().union(*parameters))


def _origin(function: Any, known: list[_Known]) -> Origin:
    """Where what a function gives comes from."""
    if function in FACTORIES:
        return "constant"
    if _name_of(function) in DRAWN:
        return "batch"
    origins = {each.origin for each in known}
    return "batch" if "batch" in origins else "made" if origins - {"constant"} else "constant"


_CALLED = nn.Module.__call__.__code__
_APPLIED = inspect.unwrap(vars(torch.autograd.Function)["apply"].__func__).__code__


def _custom_function() -> str | None:
    """The name of the autograd Function in whose own `forward` this is called, which runs without gradients.

    What modules compute that it runs, as activation checkpointing does, is theirs.
    """
    frame = None if torch.is_grad_enabled() else inspect.currentframe()
    while frame is not None and frame.f_code is not _CALLED:
        if frame.f_code is _APPLIED:
            return f"{frame.f_locals['cls'].__name__}.apply"
        frame = frame.f_back
    return None
