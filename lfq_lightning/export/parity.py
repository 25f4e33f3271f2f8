"""The parity gate: what ONNX Runtime computes from the file against what the model computes."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from lfq_lightning.ops import spread
from lfq_lightning.placement.host import hosts, plain_name
from lfq_lightning.quantizer import LearnableFakeQuantize


@dataclass(frozen=True)
class QuantizerParity:
    """One input quantizer: the share of its integer codes that are equal, and the largest difference of any."""

    quantizer: str
    codes: int
    equal: float
    largest: int


@dataclass(frozen=True)
class Parity:
    """An exported file against the model it is of; prints as a table.

    `difference` is the largest of any output, without graph optimizations and with all of them, `quanta` the first in
    units of the last layer's integer accumulator (input scale times weight scale); `noise` the mean square of the
    differences, in that of the output; `top1` the share of inputs whose largest output stands at the same place, in the
    first of the outputs.
    """

    quantizers: tuple[QuantizerParity, ...]
    inputs: int
    difference: float
    quanta: float
    noise: float
    top1: float
    optimized_difference: float
    optimized_top1: float
    file_bytes: int
    float_file_bytes: int
    folded: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether no more than a hundredth of any quantizer's codes differ, and the same output is the largest."""
        return not self.problems(0.01)

    def with_folded(self, names: Iterable[str]) -> Parity:
        """The same, with the names of the BatchNorms that were folded."""
        return replace(self, folded=tuple(names))

    def problems(self, tolerance: float) -> list[str]:
        """What is beyond the tolerance, in words."""
        found = [
            f"{row.quantizer}: {1 - row.equal:.2%} of the codes differ, by at most {row.largest}"
            for row in self.quantizers
            if 1 - row.equal > tolerance
        ]
        if self.top1 < 1 - tolerance:
            found.append(f"the largest output is elsewhere for {1 - self.top1:.2%} of the inputs")
        # A share p of codes that are one step off makes noise of about p steps squared.
        if not self.noise <= tolerance:
            found.append(f"an output differs by up to {self.difference:.3g}, its noise is {self.noise:.2%}")
        return found

    def __str__(self) -> str:
        width = max([len(row.quantizer) for row in self.quantizers] + [9])
        lines = [f"{'quantizer':{width}}  {'codes':>9}  {'equal':>9}  largest difference"]
        lines.append("-" * len(lines[0]))
        lines += [f"{r.quantizer:{width}}  {r.codes:9,}  {r.equal:9.4%}  {r.largest:18d}" for r in self.quantizers]
        ratio = self.file_bytes / self.float_file_bytes
        return "\n".join(
            [
                *lines,
                f"largest output difference  {self.difference:.3g} ({self.quanta:.3g} quanta); "
                f"optimized {self.optimized_difference:.3g}",
                f"same largest output        {self.top1:.2%} of {self.inputs:,} inputs; "
                f"optimized {self.optimized_top1:.2%}",
                f"BatchNorms folded          {len(self.folded)}",
                f"file                       {self.file_bytes:,} bytes, {ratio:.2f} of the float file",
            ]
        )


def compare(
    model: nn.Module,
    path: Path,
    watched: Mapping[str, Sequence[str]],
    batches: Iterable[tuple[Any, ...]],
    float_file_bytes: int,
) -> Parity:
    """Run the model in eval mode and the file in ONNX Runtime on the same batches.

    Args:
        model: what was exported; it is not changed.
        path: the file.
        watched: what `codes_by_quantizer` gave.
        batches: positional inputs.
        float_file_bytes: the size to compare the file's with.
    """
    reference = copy.deepcopy(model).eval()
    for quantizer in (m for m in reference.modules() if isinstance(m, LearnableFakeQuantize)):
        quantizer.phase = "freeze"
    proto = onnx.load(path)
    outputs = [output.name for output in proto.graph.output]
    for name in (name for names in watched.values() for name in names):
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
    plain = _session(proto, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    fast = _session(onnx.load(path), onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    tally = {name: [0, 0, 0] for name in watched}  # codes, equal, largest
    same, same_fast, count = 0, 0, 0
    plain_gaps, fast_gaps = [_Gap() for _ in outputs], [_Gap() for _ in outputs]
    for inputs in batches:
        expected, codes = _run(reference, inputs)
        feed = {node.name: x.numpy() for node, x in zip(plain.get_inputs(), inputs, strict=True)}
        values = dict(zip([o.name for o in plain.get_outputs()], plain.run(None, feed), strict=True))
        optimized = fast.run(outputs, feed)
        for name, tensors in watched.items():
            for mine, theirs in zip(codes[name], (values[t] for t in tensors), strict=True):
                apart = np.abs(mine - theirs.astype(np.int32))
                row = tally[name]
                row[0] += apart.size
                row[1] += int((apart == 0).sum())
                row[2] = max(row[2], int(apart.max(initial=0)))
        for name, wanted, other, *gaps in zip(outputs, expected, optimized, plain_gaps, fast_gaps, strict=True):
            gaps[0].take_in(values[name], wanted)
            gaps[1].take_in(other, wanted)
        top = expected[0].argmax(-1)
        same += int((values[outputs[0]].argmax(-1) == top).sum())
        same_fast += int((optimized[0].argmax(-1) == top).sum())
        count += top.size
    rows = tuple(QuantizerParity(n, c, equal / max(c, 1), far) for n, (c, equal, far) in tally.items())
    worst = max(gap.largest for gap in plain_gaps)
    return Parity(
        rows,
        count,
        worst,
        worst / _quantum(reference),
        max(gap.noise for gap in plain_gaps),
        same / max(count, 1),
        max(gap.largest for gap in fast_gaps),
        same_fast / max(count, 1),
        path.stat().st_size,
        float_file_bytes,
    )


@dataclass
class _Gap:
    """How far one output is from what the model gives."""

    largest: float = 0.0
    squares: float = 0.0
    power: float = 0.0

    def take_in(self, found: np.ndarray, expected: np.ndarray) -> None:
        same = (found == expected) | (np.isnan(found) & np.isnan(expected))  # infinite masks are equal too
        f, e = (np.where(same, 0.0, x.astype(np.float64)) for x in (found, expected))
        apart = np.nan_to_num(np.abs(f - e), nan=np.inf)
        self.largest = max(self.largest, float(apart.max(initial=0)))
        self.squares += float((apart**2).sum())
        self.power += float((np.where(np.isfinite(expected), expected, 0).astype(np.float64) ** 2).sum())

    @property
    def noise(self) -> float:
        return self.squares / max(self.power, float(np.finfo(np.float32).tiny))


def _session(proto: onnx.ModelProto, level: Any) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def codes_by_quantizer(proto: onnx.ModelProto) -> dict[str, list[str]]:
    """The results of QuantizeLinear nodes by the quantizer that they are of, in order of use, as the exporter notes."""
    found: dict[str, list[str]] = {}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            notes = {note.key: note.value for note in node.metadata_props}
            scopes = ast.literal_eval(notes["pkg.torch.onnx.name_scopes"])
            name = next(scope for scope in reversed(scopes) if scope.endswith("input_quantizer"))
            found.setdefault(name, []).append(node.output[0])
    return found


def _run(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
    """The outputs, and by input quantizer the codes of each use."""
    codes: dict[str, list[np.ndarray]] = {}
    handles = []
    for name, layer in hosts(model).items():
        if layer.input_quantizer is not None:
            see = _Codes(codes.setdefault(f"{plain_name(name)}.input_quantizer", []))
            handles.append(layer.input_quantizer.register_forward_hook(see))
    try:
        with torch.no_grad():
            output = model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf.numpy() for leaf in leaves if isinstance(leaf, Tensor)], codes


class _Codes:
    def __init__(self, into: list[np.ndarray]) -> None:
        self.into = into

    def __call__(self, quantizer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(quantizer, LearnableFakeQuantize)
        qparams = quantizer.used_qparams()
        s, z = (spread(p, output.shape, quantizer.axis, quantizer.group_size) for p in qparams)
        self.into.append(((output.float() / s).round() + z).numpy().astype(np.int32))


def _quantum(model: nn.Module) -> float:
    """One step of the last layer's integer accumulator, the largest of its channels."""
    *_, last = hosts(model).values()
    parts = [q.used_qparams()[0].max() for q in (last.weight_quantizer, last.input_quantizer) if q is not None]
    return float(torch.stack(parts).prod())
