"""Quantized models as ONNX files: QuantizeLinear and DequantizeLinear around float operations, integer weights."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lfq_lightning.export.fold import fold_batch_norm
from lfq_lightning.export.integers import IntegerWeight, integer_copy
from lfq_lightning.placement import detach

if TYPE_CHECKING:
    import onnx

    from lfq_lightning.export.parity import Parity

_REMEDY = 'install the extra: `pip install "lfq_lightning[export]"`'


def export_onnx(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    path: str | Path,
    *,
    dynamic_axes: Mapping[str, Mapping[int, str]] | bool = True,
    opset: int = 21,
    batches: Iterable[Any] = (),
    tolerance: float = 0.01,
    on_mismatch: Literal["raise", "warn"] = "raise",
) -> Parity:
    """Write a quantized model as ONNX, run the file in ONNX Runtime, and compare it with the model.

    Inputs of quantized layers pass through QuantizeLinear and DequantizeLinear. Weights are integer initialisers behind
    a DequantizeLinear, packed in 4 bits where they fit; biases stay float. Each BatchNorm that follows a quantized
    layer alone is folded into it exactly.

    Args:
        model: a model with quantizers whose qparams are set; it is not changed.
        example_inputs: one input or a tuple of positional inputs.
        path: the file to write.
        dynamic_axes: by argument name of `forward`, the dimensions that may vary and their names. True: the first
            dimension of every tensor; False: none.
        opset: of ONNX; packed 4 bits and groups need 21.
        batches: more inputs to compare on, as a DataLoader gives them; of a tuple or list the first entry counts.
        tolerance: the share of a quantizer's integer codes that may differ. Layers sum in float, and ONNX Runtime in
            another order than torch: a value on the edge between two codes may fall to the other side.
        on_mismatch: what happens beyond the tolerance, or where the largest output is at another place.

    Returns:
        What was compared; prints as a table.

    Raises:
        ImportError: if onnx, onnxscript or onnxruntime is missing.
        ValueError: if the model cannot be exported, by name, or does not agree with the file.

    Example:
        >>> import torch, lfq_lightning as lfq
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> _ = lfq.attach(model)
        >>> lfq.calibrate(model, [torch.randn(8, 4)])
        >>> lfq.export_onnx(model, torch.randn(8, 4), "/tmp/model.onnx").agrees
        True
    """
    if on_mismatch not in ("raise", "warn"):
        raise ValueError(f'`on_mismatch` must be "raise" or "warn". Found {on_mismatch!r}.')
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"Export to ONNX needs onnx, onnxscript and onnxruntime ({error}): {_REMEDY}.") from error
    from lfq_lightning.export.parity import codes_by_quantizer, compare

    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    integers = integer_copy(model)
    folded = fold_batch_norm(integers, inputs)
    proto = _exported(integers, inputs, dynamic_axes, opset)
    if opset >= 21:
        _pack(proto, {name: m for name, m in integers.named_modules() if isinstance(m, IntegerWeight)})
    watched = codes_by_quantizer(proto)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(_bare(proto), path)
    plain = copy.deepcopy(model).eval()
    detach(plain)
    float_bytes = _bare(_exported(plain, inputs, dynamic_axes, opset)).ByteSize()
    parity = compare(model, path, watched, [inputs, *map(_positional, batches)], float_bytes).with_folded(folded)
    problems = parity.problems(tolerance)
    if problems:
        message = f"{path} does not give the model's answers: {'; '.join(problems)}.\n{parity}"
        if on_mismatch == "raise":
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    return parity


def _positional(batch: Any) -> tuple[Any, ...]:
    return (batch[0],) if isinstance(batch, (tuple, list)) else (batch,)


def _exported(
    model: nn.Module, inputs: tuple[Any, ...], dynamic_axes: Mapping[str, Mapping[int, str]] | bool, opset: int
) -> onnx.ModelProto:
    dynamic: Any = None
    if dynamic_axes is True:
        batch = torch.export.Dim("batch")
        dynamic = tuple({0: batch} if isinstance(x, Tensor) and x.ndim and x.shape[0] > 1 else None for x in inputs)
    elif dynamic_axes:
        dynamic = {
            name: {index: torch.export.Dim(dimension) for index, dimension in axes.items()}
            for name, axes in dynamic_axes.items()
        }
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        _quiet("torch.onnx", "onnxscript", "onnx_ir"),
    ):
        warnings.simplefilter("ignore")  # the exporter's own, about itself
        program = torch.onnx.export(
            model, inputs, dynamo=True, opset_version=opset, dynamic_shapes=dynamic, custom_translation_table=_table()
        )
    assert program is not None
    return program.model_proto


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _table() -> dict[Any, Any]:
    """How operations are written that torch's exporter does not know."""
    from onnxscript import opset21 as op

    def groups(codes: Any, scale: Any, zero_point: Any, group_size: int) -> Any:
        return op.DequantizeLinear(codes, scale, zero_point, axis=1, block_size=group_size)

    def quantize(x: Any, scale: Any, zero_point: Any, axis: int, low: int, high: int, dtype: int) -> Any:
        zero_point = op.Cast(zero_point, to=dtype)
        return op.QuantizeLinear(x, scale, zero_point, axis=axis)

    return {
        torch.ops.lfq_lightning.dequantize_groups.default: groups,
        torch.ops.quantized_decomposed.quantize_per_channel.default: quantize,
    }


def _pack(proto: onnx.ModelProto, weights: dict[str, IntegerWeight]) -> None:
    """Store the codes of weights of at most 4 bits, and their zero points, two to a byte."""
    import onnx
    from onnx import numpy_helper

    narrow = {f"{name}.codes" for name, weight in weights.items() if weight.bits <= 4}
    stored = {initializer.name: initializer for initializer in proto.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for node in proto.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in narrow:
            continue
        for position, name in enumerate([node.input[0], *node.input[2:]]):
            values = numpy_helper.to_array(stored[name])
            if values.dtype not in (np.int8, np.uint8):
                continue  # packed before
            own = name
            if position and len(readers[name]) > 1:  # a zero point that others share
                own = f"{node.name}.zero_point"
                node.input[2] = own
            kind = onnx.TensorProto.UINT4 if values.dtype == np.uint8 else onnx.TensorProto.INT4
            packed = onnx.helper.make_tensor(own, kind, values.shape, _nibbles(values), raw=True)
            if own == name:
                stored[name].CopyFrom(packed)
            else:
                proto.graph.initializer.append(packed)


def _nibbles(values: np.ndarray) -> bytes:
    """Two values a byte, the first in the low half, as ONNX packs them."""
    halves = np.append(values.flatten(), np.zeros(values.size % 2, values.dtype)).view(np.uint8) & 0xF
    return (halves[::2] | halves[1::2] << 4).tobytes()


def _bare(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the exporter's notes on where in Python each node comes from; they are most of a small file."""
    for node in proto.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for field in ("metadata_props", "doc_string", "value_info"):
        proto.graph.ClearField(field)
    for named in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        named.ClearField("metadata_props")
    return proto
