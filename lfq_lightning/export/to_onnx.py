"""Quantized models as ONNX files: QuantizeLinear and DequantizeLinear around float operations, integer weights."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lfq_lightning.checking import (
    check_batches,
    check_choice,
    check_flags,
    check_function,
    check_model,
    check_path,
    check_share,
    check_whole,
)
from lfq_lightning.export.exportable import leave_tokens_to_runtime, sharing_copy
from lfq_lightning.export.fold import fold_batch_norm
from lfq_lightning.export.inputs import arguments, check_dynamic_axes, on_cpu, traced
from lfq_lightning.export.integers import IntegerWeight, keep_biases_exact, to_integers
from lfq_lightning.placement import to_float

if TYPE_CHECKING:
    import onnx

    from lfq_lightning.export.parity import Parity

OPSETS = range(18, 26)  # that torch's exporter writes as they are asked for; for one below it writes 18
_REMEDY = 'install the extra: `pip install "lfq_lightning[export]"`'


def export_onnx(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    path: str | Path,
    *,
    dynamic_axes: Mapping[str, Mapping[int, str]] | bool = True,
    opset: int = 21,
    batches: Iterable[Any] = (),
    tolerance: float = 0.0005,
    output_tolerance: float = 1e-4,
    optimized_tolerance: float = 0.05,
    distance: Callable[[Tensor, Tensor], Any] | None = None,
    on_mismatch: Literal["raise", "warn"] = "raise",
    external_data: bool | None = None,
    optimize_for: Literal["size", "speed"] = "size",
) -> Parity:
    """Write a quantized model as ONNX, run the file in ONNX Runtime, and compare it with the model.

    Inputs of quantized layers pass through QuantizeLinear and DequantizeLinear. Weights are integer initialisers behind
    a DequantizeLinear, packed in 4 bits where they fit; biases stay float. Each BatchNorm that follows a quantized
    layer alone is folded into it exactly. Matrices whose input is not quantized are stored as (inputs, outputs), by
    which ONNX Runtime multiplies as they are (MatMulNBits): by default it quantizes blocks of the input to 8 bits then,
    and with the session option "session.qdq_matmulnbits_accuracy_level" at "1" it does not. Inputs with a scale for
    each token are such: the file leaves them to the runtime, whose blocks are the groups of the weights.

    Args:
        model: a model with quantizers whose qparams are set; it is not changed.
        example_inputs: one input, a tuple of positional inputs, a mapping of keyword inputs, or a batch of inputs and
            targets as a DataLoader gives it, of which as many entries are taken as `forward` must be given.
        path: the file to write.
        dynamic_axes: by argument name of `forward`, the dimensions that may vary and their names. True: the first
            dimension of every tensor in which it is as long as in the first; False: none.
        opset: of ONNX, 18 to 25; packed 4 bits and groups need 21.
        batches: more inputs to compare on, as a DataLoader gives them: of a tuple or list as many entries count as
            there are example inputs, of a mapping the keywords that are among them.
        tolerance: the share of an activation's integer codes that may differ, by one step and no more, where the layer
            before was given what ONNX Runtime had come to: it sums in another order than torch, and a value on the edge
            between two codes may fall to the other side. One code always may; of a weight, none.
        output_tolerance: how far an output may be from the model's, in its largest magnitude.
        optimized_tolerance: the share of the output's power that may differ with all optimizations, which compute in
            integers and round biases. The session option "session.x64quantprecision" is on: without it, processors that
            lack VNNI instructions saturate sums of two 8-bit products in 16 bits.
        distance: your own measure of how far an output of the file is from the model's, from the two, in place of the
            two measures above; 0 where they are alike.
        on_mismatch: what happens beyond a tolerance.
        external_data: whether tensors are kept in a file of their own beside, named after it with ".data" behind. None:
            where they take more than the 2 GB that one file can hold.
        optimize_for: "size" stores codes of at most 4 bits two to a byte, and keeps biases in float. ONNX Runtime has
            no kernels for such codes where they meet a quantized input: it makes floats of them at each run. "speed"
            gives it what it has kernels for: a byte for each code, saturation of fewer than 8 bits after quantizing,
            and biases that it rounds to 32-bit integers.

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
    check_model(model)
    check_path("path", path, written=True)
    check_whole("opset", opset, OPSETS.start, OPSETS.stop - 1)
    check_batches("batches", batches)
    check_share("tolerance", tolerance)
    check_share("output_tolerance", output_tolerance)
    check_function("distance", distance, "an output of the model and the file's")
    check_share("optimized_tolerance", optimized_tolerance)
    if on_mismatch not in ("raise", "warn"):
        raise ValueError(f'`on_mismatch` must be "raise" or "warn". Found {on_mismatch!r}.')
    check_dynamic_axes(dynamic_axes)
    if external_data is not None:
        check_flags(external_data=external_data)
    check_choice("optimize_for", optimize_for, ("size", "speed"))
    bags = [name for name, module in model.named_modules() if isinstance(module, nn.EmbeddingBag)]
    if bags:
        raise ValueError(
            "ONNX has no operation for bags of embeddings, and torch's exporter writes a file that no runtime takes. "
            f"Found {', '.join(bags)}: use `export_pt2`, or an Embedding and a sum."
        )
    reference = sharing_copy(model).cpu()
    by_runtime = leave_tokens_to_runtime(reference)
    require_onnx()

    from lfq_lightning.export.comparing import run_and_compare
    from lfq_lightning.export.onnx_file import (
        codes_by_quantizer,
        describe,
        float_bytes,
        made_floats_at_each_run,
        pack,
        save,
    )
    from lfq_lightning.export.onnx_passes import for_onnxruntime

    integers = sharing_copy(reference)
    args, kwargs = on_cpu(arguments(model, example_inputs))
    to_integers(integers)
    _check_opset(integers, opset)
    folded = fold_batch_norm(integers, args, kwargs, bytes_hold=optimize_for == "speed")
    if optimize_for == "size":
        keep_biases_exact(integers)
    proto = _exported(integers, args, kwargs, dynamic_axes, opset)
    modules = integers.named_modules(remove_duplicate=False)  # one that is shared may be stored under any of its names
    weights = {name: module for name, module in modules if isinstance(module, IntegerWeight)}
    watched = codes_by_quantizer(proto, reference)  # in order of use, and as nodes are called in the end
    padded = for_onnxruntime(proto, weights, optimize_for)
    if opset >= 21:
        pack(proto, weights, everywhere=optimize_for == "size")
    proto = _bare(proto)
    describe(proto, reference)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    float_size, in_float = float_bytes(proto), made_floats_at_each_run(proto)
    save(proto, path, external_data)
    parity = run_and_compare(
        reference,
        path,
        watched,
        padded,
        weights,
        itertools.chain([(args, kwargs)], (_of_batch(on_cpu(batch), args, kwargs) for batch in batches)),
        float_size,
        distance,
        folded=tuple(folded),
        in_float=tuple(in_float),
        by_runtime=tuple(by_runtime),
        tolerance=tolerance,
        output_tolerance=output_tolerance,
        optimized_tolerance=optimized_tolerance,
    )
    if not parity.agrees:
        message = f"{path} does not give the model's answers: {'; '.join(parity.problems)}.\n{parity}"
        if on_mismatch == "raise":
            raise ValueError(message)
        warnings.warn(message, stacklevel=2)
    return parity


def float_file(model: nn.Module, example_inputs: Any, path: str | Path) -> Path:
    """Write a model without its quantizers as ONNX, as what the quantized file is compared with.

    Args:
        model: in float, or quantized, of which a copy is taken; it is not changed.
        example_inputs: as `export_onnx` takes them.
        path: the file to write.

    Raises:
        ImportError: if onnx, onnxscript or onnxruntime is missing.
        ValueError: if the model cannot be exported.
    """
    check_model(model)
    check_path("path", path, written=True)
    require_onnx()

    from lfq_lightning.export.onnx_file import save

    plain = copy.deepcopy(model).cpu().eval()
    to_float(plain)
    args, kwargs = on_cpu(arguments(model, example_inputs))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(_bare(_exported(plain, args, kwargs, True, 21)), path, None)
    return path


def require_onnx() -> None:
    """Raise ImportError, with the remedy, unless what export to ONNX needs is installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"Export to ONNX needs onnx, onnxscript and onnxruntime ({error}): {_REMEDY}.") from error


def _check_opset(integers: nn.Module, opset: int) -> None:
    grouped = [n for n, m in integers.named_modules() if isinstance(m, IntegerWeight) and m.group_size is not None]
    if opset < 21 and grouped:
        raise ValueError(
            f"Scales of groups need opset 21 of ONNX. Found opset {opset} and groups in {', '.join(grouped[:5])}: "
            "leave `opset` out, or use granularity 'per_channel'."
        )


def _of_batch(batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs in a batch, as many as the example has."""
    if kwargs:
        if not isinstance(batch, Mapping) or not set(kwargs) <= set(batch):
            raise ValueError(
                f"`batches` must hold mappings, as `example_inputs` is one, with {', '.join(kwargs)}. Found "
                f"{list(batch) if isinstance(batch, Mapping) else type(batch).__name__}."
            )
        return (), {name: batch[name] for name in kwargs}
    return (tuple(batch[: len(args)]) if isinstance(batch, (tuple, list)) else (batch,)), {}


def _exported(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_axes: Mapping[str, Mapping[int, str]] | bool,
    opset: int,
) -> onnx.ModelProto:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        _quiet("torch.onnx", "onnxscript", "onnx_ir"),
    ):
        warnings.simplefilter("ignore")  # the exporter's own, about itself
        program = torch.onnx.export(
            traced(model, args, kwargs, dynamic_axes),
            kwargs=kwargs,
            dynamo=True,
            opset_version=opset,
            custom_translation_table=_table(),
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
