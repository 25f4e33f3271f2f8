"""What ONNX Runtime computes from a file against what the model computes."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lfq_lightning.export.integers import IntegerWeight
from lfq_lightning.export.parity import Parity
from lfq_lightning.export.tallies import Codes, Outputs
from lfq_lightning.ops import spread
from lfq_lightning.placement.host import hosts, plain_name, quantizers, whole_weight
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.running import explained

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def compare(
    model: nn.Module,
    path: Path,
    watched: Mapping[str, Sequence[str]],
    weights: Mapping[str, IntegerWeight],
    batches: Iterable[Inputs],
    float_file_bytes: int,
    **settings: Any,
) -> Parity:
    """Run the model in eval mode and the file in ONNX Runtime on the same batches.

    Args:
        model: what was exported; it is not changed.
        path: the file.
        watched: what `codes_by_quantizer` gave.
        weights: the integer weights by name, which know the signs that BatchNorm gave them.
        batches: positional and keyword inputs, on the CPU.
        float_file_bytes: the size to compare the file's with.
        settings: further fields of the result.
    """
    reference = copy.deepcopy(model).cpu().eval()
    for quantizer in (m for m in reference.modules() if isinstance(m, LearnableFakeQuantize)):
        quantizer.phase = "freeze"
    called: set[str] = set()
    for name, layer in hosts(reference).items():
        layer.register_forward_hook(_Called(called, plain_name(name)))
    proto = onnx.load(path)
    outputs = [output.name for output in proto.graph.output]
    for name in (name for names in watched.values() for name in names):
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
    plain = _session(proto, onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    fast = _session(onnx.load(path), onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    found, count = dict(watched), 0
    tally: dict[str, Codes] = {}
    unoptimized, optimized = Outputs(outputs), Outputs(outputs)
    for args, kwargs in batches:
        expected, codes = _run(reference, args, kwargs)
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        feed = {node.name: x.numpy() for node, x in zip(plain.get_inputs(), tensors, strict=True)}
        values = dict(zip([o.name for o in plain.get_outputs()], plain.run(None, feed), strict=True))
        for name, uses in codes.items():
            if name not in found:
                twin = _twin(name, codes, watched)
                found[name] = () if twin is None else found.get(twin, ())
            tally.setdefault(name, Codes()).take_in(uses, [values[t] for t in found[name]])
        count += expected[0].argmax(-1).size
        unoptimized.take_in([values[name] for name in outputs], expected)
        optimized.take_in(fast.run(outputs, feed), expected)
    stored = stored_weights(onnx.load(path))
    for name, layer in hosts(reference).items():
        key, own = f"{plain_name(name)}.weight_quantizer", layer.weight_quantizer
        if name in called and own is not None and key in weights:
            wanted = _centred(own, whole_weight(layer)) * weights[key].signs.int().numpy()
            alike = [other for other in weights if weights[other] is weights[key] and other in stored]
            tally.setdefault(key, Codes()).take_in([wanted], [stored[other] for other in alike[:1]])
    rows = tuple(tally[name].row(name) for name in quantizers(reference) if name in tally)
    quantum = _quantum(reference)
    ends = unoptimized.parity(quantum, count), optimized.parity(quantum, count)
    return Parity(rows, count, *ends, path.stat().st_size, float_file_bytes, **settings)


def _session(proto: onnx.ModelProto, level: Any, precise: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 4
    # Processors without VNNI otherwise saturate sums of two products of 8 bits in 16 bits.
    options.add_session_config_entry("session.x64quantprecision", str(int(precise)))
    try:
        return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail:
        if not precise:
            raise
        # That option fails at a weight that is used twice: optimize no further than sums in float.
        return _session(proto, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC, precise=False)


def codes_by_quantizer(proto: onnx.ModelProto, model: nn.Module) -> dict[str, list[str]]:
    """The results of QuantizeLinear nodes by the quantizer that they are of, in order of use, as the exporter notes.

    Args:
        proto: the exported file, with the notes.
        model: what was exported, of which one quantizer may have several names.
    """
    first = {id(quantizer): name for name, quantizer in quantizers(model).items()}
    every = model.named_modules(remove_duplicate=False)
    names = {plain_name(name): first[id(module)] for name, module in every if id(module) in first}
    found: dict[str, list[str]] = {}
    for node in proto.graph.node:
        if node.op_type == "QuantizeLinear":
            notes = {note.key: note.value for note in node.metadata_props}
            scopes = ast.literal_eval(notes["pkg.torch.onnx.name_scopes"])
            name = next(names[scope] for scope in reversed(scopes) if scope in names)
            found.setdefault(name, []).append(node.output[0])
    return found


def stored_weights(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The integer weights in a file less their zero points, by the quantizer that they are of."""
    stored = {i.name: i for i in proto.graph.initializer}
    found = {}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            codes = numpy_helper.to_array(stored[node.input[0]]).astype(np.int32)
            zero_point = numpy_helper.to_array(stored[node.input[2]]).astype(np.int32)
            settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            axis, block = settings.get("axis", 1), settings.get("block_size", 0)
            if block:
                zero_point = np.repeat(zero_point, block, axis).take(range(codes.shape[axis]), axis)
            elif zero_point.size > 1:
                zero_point = zero_point.reshape([-1 if d == axis % codes.ndim else 1 for d in range(codes.ndim)])
            found[node.input[0].removesuffix(".codes")] = codes - zero_point
    return found


def _run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
    """The outputs, and by input quantizer the codes of each use."""
    codes: dict[str, list[np.ndarray]] = {}
    handles = []
    for name, quantizer in quantizers(model).items():
        if quantizer.role != "weight" or quantizer.site is None:
            handles.append(quantizer.register_forward_hook(_See(codes, name)))
    try:
        rule = f"{type(model).__name__} must take what `batches` hold"
        with torch.no_grad(), explained(rule, args or kwargs, "as `forward` does"):
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf.numpy() for leaf in leaves if isinstance(leaf, Tensor)], codes


class _Called:
    def __init__(self, into: set[str], name: str) -> None:
        self.into, self.name = into, name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.into.add(self.name)


class _See:
    def __init__(self, into: dict[str, list[np.ndarray]], name: str) -> None:
        self.into, self.name = into, name

    def __call__(self, quantizer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(quantizer, LearnableFakeQuantize)
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
    layers, placed = list(hosts(model).values()), list(quantizers(model).values())
    last = (layers[-1].weight_quantizer, layers[-1].input_quantizer) if layers else placed[-1:]
    parts = [q.used_qparams()[0].max() for q in last if q is not None]
    return float(torch.stack(parts).prod())
