"""What ONNX Runtime computes from a file against what the model computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from lfq_lightning.export.integers import IntegerWeight
from lfq_lightning.export.onnx_file import stored_weights
from lfq_lightning.export.parity import OutputParity, Parity, QuantizerParity
from lfq_lightning.ops import spread
from lfq_lightning.placement.points import activations, points, weights
from lfq_lightning.placement.quantized_layer import quantized_layers
from lfq_lightning.private import session_failure, tree_leaves
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.running import explained

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def run_and_compare(
    reference: nn.Module,
    path: Path,
    watched: Mapping[str, Sequence[str]],
    integers: Mapping[str, IntegerWeight],
    batches: Iterable[Inputs],
    float_file_bytes: int,
    **settings: Any,
) -> Parity:
    """Run a model and its file in ONNX Runtime on the same batches.

    Args:
        reference: a copy of what was exported, in eval mode on the CPU.
        path: the file.
        watched: what `codes_by_quantizer` gave.
        integers: the integer weights by name, which know the signs that BatchNorm gave them.
        batches: positional and keyword inputs, on the CPU.
        float_file_bytes: the size to compare the file's with.
        settings: further fields of the result.
    """
    found = points(reference)
    called: set[LearnableFakeQuantize] = set()
    for point in found.values():
        point.quantizer.phase = "freeze"
    for point in weights(found):
        point.quantizer.register_forward_hook(_Called(called, point.quantizer))
    proto = onnx.load(path)
    stored = stored_weights(proto)
    outputs = [output.name for output in proto.graph.output]
    fast = _session(proto, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    for name in (name for names in watched.values() for name in names):
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
    plain = _session(proto, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    nodes, count = dict(watched), 0
    tally: dict[str, Codes] = {}
    unoptimized, optimized = Outputs(outputs), Outputs(outputs)
    for args, kwargs in batches:
        expected, codes = _run(reference, args, kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        feed = {node.name: x.numpy() for node, x in zip(plain.get_inputs(), tensors, strict=True)}
        values = dict(zip([o.name for o in plain.get_outputs()], plain.run(None, feed), strict=True))
        for name, uses in codes.items():
            if name not in nodes:
                twin = _twin(name, codes, watched)
                nodes[name] = () if twin is None else nodes.get(twin, ())
            tally.setdefault(name, Codes()).take_in(uses, [values[t] for t in nodes[name]])
        count += expected[0].argmax(-1).size
        unoptimized.take_in([values[name] for name in outputs], expected)
        optimized.take_in(fast.run(outputs, feed), expected)
    for point in weights(found):
        if point.quantizer in called and point.name in integers:
            own = integers[point.name]
            wanted = _centred(point.quantizer, point.whole_parameter()) * own.signs.int().numpy()
            alike = [stored[name] for name, weight in integers.items() if name in stored and _are_one(weight, own)]
            tally.setdefault(point.name, Codes()).take_in(
                [wanted], [codes().reshape(wanted.shape) for codes in alike[:1]]
            )
    rows = tuple(tally[name].row(name) for name in found if name in tally)
    quantum = _quantum(reference)
    ends = unoptimized.parity(quantum, count), optimized.parity(quantum, count)
    return Parity(rows, count, *ends, path.stat().st_size, float_file_bytes, **settings)


def _are_one(weight: IntegerWeight, other: IntegerWeight) -> bool:
    """Whether a file holds two weights as one: the exporter merges what is equal, as layers that were copied are."""
    return weight is other or (weight.codes.shape == other.codes.shape and torch.equal(weight.codes, other.codes))


def _session(proto: onnx.ModelProto, level: Any, precise: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4
    # Processors without VNNI otherwise saturate sums of two products of 8 bits in 16 bits.
    options.add_session_config_entry("session.x64quantprecision", str(int(precise)))
    try:
        return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except session_failure():
        if not precise:
            raise
        # That option fails at a weight that is used twice: optimize no further than sums in float.
        return _session(proto, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC, precise=False)


def _run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
    """The outputs, and by input quantizer the codes of each use."""
    codes: dict[str, list[np.ndarray]] = {}
    handles = []
    for point in activations(points(model)):
        handles.append(point.quantizer.register_forward_hook(_See(codes, point.name)))
    try:
        rule = f"{type(model).__name__} must take what `batches` hold"
        with torch.no_grad(), explained(rule, args or kwargs, "as `forward` does"):
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    leaves = tree_leaves(output)
    return [leaf.numpy() for leaf in leaves if isinstance(leaf, Tensor)], codes


class _Called:
    def __init__(self, into: set[LearnableFakeQuantize], quantizer: LearnableFakeQuantize | None) -> None:
        self.into, self.quantizer = into, quantizer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.quantizer is not None:
            self.into.add(self.quantizer)


class _See:
    def __init__(self, into: dict[str, list[np.ndarray]], name: str) -> None:
        self.into, self.name = into, name
        self._last: Tensor | None = None

    def __call__(self, quantizer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(quantizer, LearnableFakeQuantize)
        if args[0] is self._last:
            return  # several read one tensor, of which the file has one
        self._last = args[0]
        _, zero_point = quantizer.used_qparams()
        z = spread(zero_point, output.shape, quantizer.axis, quantizer.group_size)
        centred = torch.from_numpy(_centred(quantizer, output))
        self.into.setdefault(self.name, []).append((centred + z).numpy().astype(np.int32))


def _centred(quantizer: LearnableFakeQuantize, x: Tensor) -> np.ndarray:
    """Integer codes less their zero points."""
    scale = spread(quantizer.used_qparams()[0], x.shape, quantizer.axis, quantizer.group_size)
    return (quantizer.quantized(x.detach()).detach().float() / scale).round().numpy().astype(np.int32)


def _twin(name: str, codes: Mapping[str, Sequence[np.ndarray]], watched: Mapping[str, Sequence[str]]) -> str | None:
    """Another quantizer that gives the same codes: the exporter makes one node of two that have one input and scale."""
    for other in watched:
        mine, theirs = codes[name], codes.get(other, ())
        if len(mine) == len(theirs) and all(map(np.array_equal, mine, theirs)):
            return other
    return None


def _quantum(model: nn.Module) -> float:
    """One step of the last layer's integer accumulator, the largest of its channels."""
    layers, placed = list(quantized_layers(model).values()), [point.quantizer for point in points(model).values()]
    last = (layers[-1].weight_quantizer, layers[-1].input_quantizer) if layers else placed[-1:]
    parts = [q.used_qparams()[0].max() for q in last if q is not None]
    return float(torch.stack(parts).prod())


@dataclass
class Codes:
    """One quantizer's codes, counted over batches."""

    count: int = 0
    equal: int = 0
    largest: int = 0

    def take_in(self, expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> None:
        """Count one batch."""
        self.count += sum(codes.size for codes in expected)
        for mine, theirs in zip(expected, found, strict=False):  # those that the file lacks are not equal
            apart = np.abs(mine - theirs.astype(np.int32))
            self.equal += int((apart == 0).sum())
            self.largest = max(self.largest, int(apart.max(initial=0)))

    def row(self, name: str) -> QuantizerParity:
        """The share of equal codes, and the largest difference."""
        return QuantizerParity(name, self.count, self.equal / max(self.count, 1), self.largest)


class Outputs:
    """How far one session's outputs are from what the model gives."""

    def __init__(self, names: Sequence[str]) -> None:
        self.gaps = [Gap() for _ in names]
        self.same = 0

    def take_in(self, found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
        """Count one batch of every output."""
        for gap, mine, theirs in zip(self.gaps, expected, found, strict=True):
            gap.take_in(theirs, mine)
        self.same += int((found[0].argmax(-1) == expected[0].argmax(-1)).sum())

    def parity(self, quantum: float, count: int) -> OutputParity:
        """The worst of all outputs, in the output's units and in quanta."""
        largest = max(gap.largest for gap in self.gaps)
        noise = max(gap.noise for gap in self.gaps)
        return OutputParity(largest, largest / quantum, noise, self.same / max(count, 1))


@dataclass
class Gap:
    """How far one output is from what the model gives."""

    largest: float = 0.0
    squares: float = 0.0
    power: float = 0.0

    def take_in(self, found: np.ndarray, expected: np.ndarray) -> None:
        """Count one batch."""
        same = (found == expected) | (np.isnan(found) & np.isnan(expected))  # infinite masks are equal too
        f, e = (np.where(same, 0.0, x.astype(np.float64)) for x in (found, expected))
        apart = np.nan_to_num(np.abs(f - e), nan=np.inf)
        self.largest = max(self.largest, float(apart.max(initial=0)))
        self.squares += float((apart**2).sum())
        self.power += float((np.where(np.isfinite(expected), expected, 0).astype(np.float64) ** 2).sum())

    @property
    def noise(self) -> float:
        """The power of the difference over that of the expected output."""
        return self.squares / max(self.power, float(np.finfo(np.float32).tiny))
