"""What ONNX Runtime computes from a file against what the model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from lfq_lightning.export.integers import IntegerWeight
from lfq_lightning.export.onnx_file import file_bytes, stored_weights
from lfq_lightning.export.onnx_passes import Padded
from lfq_lightning.export.parity import OutputParity, Parity, QuantizerParity
from lfq_lightning.ops import spread
from lfq_lightning.placement.points import activations, points, weights
from lfq_lightning.placement.quantized_layer import quantized_layers
from lfq_lightning.private import session_failure, tree_leaves
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.running import explained

Distance = Callable[[Tensor, Tensor], Any]
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def run_and_compare(
    reference: nn.Module,
    path: Path,
    watched: Mapping[str, Sequence[str]],
    padded: Mapping[str, Padded],
    integers: Mapping[str, IntegerWeight],
    batches: Iterable[Inputs],
    float_file_bytes: int,
    distance: Distance | None = None,
    **settings: Any,
) -> Parity:
    """Run a model and its file in ONNX Runtime on the same batches.

    Args:
        reference: a copy of what was exported, in eval mode on the CPU.
        path: the file.
        watched: what `codes_by_quantizer` gave.
        padded: what `for_onnxruntime` gave.
        integers: the integer weights by name, which know the signs that BatchNorm gave them.
        batches: positional and keyword inputs, on the CPU.
        float_file_bytes: the size to compare the file's with.
        distance: the user's own measure of how far the file's output is from the model's.
        settings: further fields of the result.
    """
    found = points(reference)
    called: set[LearnableFakeQuantize] = set()
    for point in found.values():
        point.quantizer.phase = "freeze"
    for point in weights(found):
        point.quantizer.register_forward_hook(_Called(called, point.quantizer))
    stored = stored_weights(onnx.load(path))
    proto = onnx.load(path, load_external_data=False)
    outputs = [output.name for output in proto.graph.output]
    fast = _session(proto, path, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    for name in (name for names in watched.values() for name in names):
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
    plain = _session(proto, path, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    count = 0
    tally: dict[str, Codes] = {}
    unoptimized, optimized = Outputs(outputs, distance), Outputs(outputs, distance)
    for args, kwargs in batches:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        feed = {node.name: x.numpy() for node, x in zip(plain.get_inputs(), tensors, strict=True)}
        values = dict(zip([o.name for o in plain.get_outputs()], plain.run(None, feed), strict=True))
        given = {name: [_as_the_model_pads(values[n], padded.get(n)) for n in nodes] for name, nodes in watched.items()}
        expected = _run(reference, args, kwargs, _Given(given, tally))
        count += len(tensors[0]) if tensors and tensors[0].ndim else 1
        unoptimized.take_in([values[name] for name in outputs], expected)
        optimized.take_in(fast.run(outputs, feed), expected)
    for point in weights(found):
        if point.quantizer in called and point.name in integers:
            own = integers[point.name]
            wanted = _centred(point.quantizer, point.whole_parameter()) * own.signs.int().numpy()
            alike = [stored[name] for name, weight in integers.items() if name in stored and _are_one(weight, own)]
            of_file = alike[0]().reshape(wanted.shape) if alike else None
            tally.setdefault(point.name, Codes(weight=True)).take_in(wanted, of_file)
    rows = tuple(tally[name].row(name) for name in found if name in tally)
    quantum = _quantum(reference)
    ends = unoptimized.parity(quantum), optimized.parity(quantum)
    return Parity(rows, count, *ends, file_bytes(path), float_file_bytes, **settings)


def _as_the_model_pads(codes: np.ndarray, padded: Padded | None) -> np.ndarray:
    return codes if padded is None else np.pad(codes, padded.widths, constant_values=padded.code)


def _are_one(weight: IntegerWeight, other: IntegerWeight) -> bool:
    """Whether a file holds two weights as one: the exporter merges what is equal, as layers that were copied are."""
    return weight is other or (weight.codes.shape == other.codes.shape and torch.equal(weight.codes, other.codes))


def _session(proto: onnx.ModelProto, path: Path, level: Any, precise: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4
    # Processors without VNNI otherwise saturate sums of two products of 8 bits in 16 bits.
    options.add_session_config_entry("session.x64quantprecision", str(int(precise)))
    try:
        # Tensors that are kept beside the file are looked for from its folder.
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.") as file:
            file.write(proto.SerializeToString())
            file.flush()
            return onnxruntime.InferenceSession(file.name, options, providers=["CPUExecutionProvider"])
    except session_failure():
        if not precise:
            raise
        # That option fails at a weight that is used twice: optimize no further than sums in float.
        return _session(proto, path, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC, precise=False)


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: _Given) -> list[np.ndarray]:
    """The outputs, where each activation's quantizer gives the codes that the file has come to."""
    handles = [p.quantizer.register_forward_hook(_See(given, p.name)) for p in activations(points(model))]
    try:
        rule = f"{type(model).__name__} must take what `batches` hold"
        with torch.no_grad(), explained(rule, args or kwargs, "as `forward` does"):
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [leaf.numpy() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


class _Called:
    def __init__(self, into: set[LearnableFakeQuantize], quantizer: LearnableFakeQuantize | None) -> None:
        self.into, self.quantizer = into, quantizer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.quantizer is not None:
            self.into.add(self.quantizer)


class _Given:
    """The codes that a file came to in one batch, by quantizer in order of use, and the tally of how many are equal."""

    def __init__(self, codes: dict[str, list[np.ndarray]], tally: dict[str, Codes]) -> None:
        self._codes, self._tally = codes, tally

    def take(self, name: str, use: int, expected: np.ndarray) -> np.ndarray | None:
        """The file's codes for one use of a quantizer, counted; None where it has none.

        The exporter makes one node of two that have one input and one scale, whosever they are.
        """
        own = self._codes.get(name, [])
        found = own[use] if use < len(own) and own[use].shape == expected.shape else None
        if found is None:
            others = (codes for several in (own, *self._codes.values()) for codes in several)
            found = next((codes for codes in others if _nearly_equal(codes, expected)), None)
        self._tally.setdefault(name, Codes()).take_in(expected, found)
        return found


def _nearly_equal(codes: np.ndarray, expected: np.ndarray) -> bool:
    return codes.shape == expected.shape and bool((np.abs(codes.astype(np.int32) - expected) <= 1).all())


class _See:
    """A hook on a quantizer: counts codes, and goes on with those of the file."""

    def __init__(self, given: _Given, name: str) -> None:
        self._given, self._name, self._uses = given, name, 0
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, quantizer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        assert isinstance(quantizer, LearnableFakeQuantize)
        if self._last is not None and args[0] is self._last[0]:
            return self._last[1]  # several read one tensor, of which the file has one
        scale, zero_point = (
            spread(p, output.shape, quantizer.axis, quantizer.group_size) for p in quantizer.used_qparams()
        )
        centred = torch.from_numpy(_centred(quantizer, output))
        found = self._given.take(self._name, self._uses, (centred + zero_point).numpy().astype(np.int32))
        self._uses += 1
        if found is not None:
            output = ((torch.from_numpy(found.astype(np.float32)) - zero_point) * scale).to(output.dtype)
        self._last = args[0], output
        return output


def _centred(quantizer: LearnableFakeQuantize, x: Tensor) -> np.ndarray:
    """Integer codes less their zero points."""
    scale = spread(quantizer.used_qparams()[0], x.shape, quantizer.axis, quantizer.group_size)
    return (quantizer.quantized(x.detach()).detach().float() / scale).round().numpy().astype(np.int32)


def _quantum(model: nn.Module) -> float:
    """One step of the last layer's integer accumulator, the largest of its channels."""
    layers, placed = list(quantized_layers(model).values()), [point.quantizer for point in points(model).values()]
    last = (layers[-1].weight_quantizer, layers[-1].input_quantizer) if layers else placed[-1:]
    parts = [q.used_qparams()[0].max() for q in last if q is not None]
    return float(torch.stack(parts).prod())


@dataclass
class Codes:
    """One quantizer's codes, counted over batches."""

    weight: bool = False
    count: int = 0
    equal: int = 0
    largest: int = 0

    def take_in(self, expected: np.ndarray, found: np.ndarray | None) -> None:
        """Count one tensor; what the file lacks is not equal."""
        self.count += expected.size
        if found is not None:
            apart = np.abs(expected - found.astype(np.int32))
            self.equal += int((apart == 0).sum())
            self.largest = max(self.largest, int(apart.max(initial=0)))

    def row(self, name: str) -> QuantizerParity:
        """The share of equal codes, and the largest difference."""
        return QuantizerParity(name, self.count, self.equal / max(self.count, 1), self.largest, self.weight)


class Outputs:
    """How far one session's outputs are from what the model gives."""

    def __init__(self, names: Sequence[str], distance: Distance | None) -> None:
        self._gaps, self._distance = [Gap() for _ in names], distance
        self._farthest = 0.0

    def take_in(self, found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
        """Count one batch of every output."""
        for gap, mine, theirs in zip(self._gaps, expected, found, strict=True):
            gap.take_in(theirs, mine)
            if self._distance is not None:
                with explained("`distance` is called with an output of the model and the file's", (mine, theirs), ""):
                    apart = float(self._distance(torch.from_numpy(mine), torch.from_numpy(theirs)))
                self._farthest = max(self._farthest, apart)

    def parity(self, quantum: float) -> OutputParity:
        """The worst of all outputs, in the output's units and in quanta."""
        largest = max(gap.largest for gap in self._gaps)
        noise, relative = max(gap.noise for gap in self._gaps), max(gap.relative for gap in self._gaps)
        return OutputParity(largest, largest / quantum, noise, relative, self._farthest if self._distance else None)


@dataclass
class Gap:
    """How far one output is from what the model gives."""

    largest: float = 0.0
    squares: float = 0.0
    power: float = 0.0
    magnitude: float = 0.0

    def take_in(self, found: np.ndarray, expected: np.ndarray) -> None:
        """Count one batch."""
        same = (found == expected) | (np.isnan(found) & np.isnan(expected))  # infinite masks are equal too
        f, e = (np.where(same, 0.0, x.astype(np.float64)) for x in (found, expected))
        apart = np.nan_to_num(np.abs(f - e), nan=np.inf)
        self.largest = max(self.largest, float(apart.max(initial=0)))
        self.squares += float((apart**2).sum())
        finite = np.where(np.isfinite(expected), expected, 0).astype(np.float64)
        self.power += float((finite**2).sum())
        self.magnitude = max(self.magnitude, float(np.abs(finite).max(initial=0)))

    @property
    def relative(self) -> float:
        """The largest difference in the largest magnitude of the expected output."""
        return self.largest / max(self.magnitude, float(np.finfo(np.float32).tiny))

    @property
    def noise(self) -> float:
        """The power of the difference over that of the expected output."""
        return self.squares / max(self.power, float(np.finfo(np.float32).tiny))
