"""How fast ONNX files run in a runtime, how much of them in integers, and how large they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

from lfq_lightning.checking import check_choice, check_path, check_whole
from lfq_lightning.export.to_onnx import require_onnx
from lfq_lightning.tables import Table

# Kernels of ONNX Runtime's CPU provider for convolutions and matrix products; layout and shape are no computation.
_INTEGER = """
    QLinearConv QGemm QLinearMatMul MatMulIntegerToFloat MatMulInteger ConvInteger DynamicQuantizeMatMul MatMulNBits
    QAttention DynamicQuantizeLSTM
"""
INTEGER_PRODUCTS = frozenset(_INTEGER.split())
_FLOAT = """
    Conv FusedConv NhwcFusedConv ConvTranspose Gemm FusedGemm MatMul FusedMatMul TransposeMatMul Attention
    MultiHeadAttention LSTM GRU RNN Einsum
"""
FLOAT_PRODUCTS = frozenset(_FLOAT.split())


@dataclass(frozen=True)
class BenchRow:
    """One file.

    Args:
        path: of the file.
        milliseconds: the median of its runs.
        integer: how many convolutions and matrix products run in integers.
        products: how many there are.
        file_bytes: with tensors that are kept beside the file.
    """

    path: Path
    milliseconds: float
    integer: int
    products: int
    file_bytes: int


@dataclass(frozen=True)
class Bench:
    """Files that were run in turn; the first is what the others are a share of. Prints as a table."""

    rows: tuple[BenchRow, ...]
    runs: int
    threads: int
    runtime: str = "onnxruntime"

    def __str__(self) -> str:
        first = self.rows[0]
        cells = [
            (
                row.path.name,
                f"{row.milliseconds:.3f}",
                f"{row.milliseconds / first.milliseconds:.3f}",
                f"{row.integer} of {row.products}",
                f"{row.file_bytes:,}",
                f"{row.file_bytes / first.file_bytes:.3f}",
            )
            for row in self.rows
        ]
        columns = {"file": "<", "ms": ">", "of the first": ">", "products in integers": ">", "bytes": ">", "share": ">"}
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        note = f"{_NAMES[self.runtime]}, {threads}; medians of {self.runs} runs in turn"
        return str(Table(columns, cells, ["", note]))


_NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def bench(
    paths: Sequence[str | Path],
    *,
    batch: int = 1,
    runs: int = 50,
    threads: int = 1,
    runtime: Literal["onnxruntime", "openvino"] = "onnxruntime",
) -> Bench:
    """Run files in turn, with all optimizations, on random inputs.

    Args:
        paths: the files; give the float file first, to see shares of it. OpenVINO takes its own format (.xml) as well.
        batch: the length of every dimension that may vary.
        runs: of each file, after three that are not counted.
        threads: of each operation.
        runtime: in which they run.

    Raises:
        ImportError: if onnx, or the runtime, is missing.
        ValueError: if a file is missing, or cannot be run.
    """
    check_choice("runtime", runtime, tuple(_NAMES))
    require_onnx()
    from lfq_lightning.export.onnx_file import file_bytes

    files = [Path(path) for path in paths]
    for path in files:
        check_path("path", path)
        if not path.is_file():
            raise ValueError(f"`path` must name an ONNX file. Found no file at `{path}`: export one first.")
    for name, value in {"batch": batch, "runs": runs, "threads": threads}.items():
        check_whole(name, value, 1)
    load = _session if runtime == "onnxruntime" else _request
    made = [load(path, batch, threads) for path in files]
    for run, _ in made * 3:
        run()
    taken: list[list[float]] = [[] for _ in files]
    for _ in range(runs):
        for (run, _), times in zip(made, taken, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    rows = (
        BenchRow(path, 1e3 * median(times), *counted, _bytes_of_ir(path) or file_bytes(path))
        for path, times, (_, counted) in zip(files, taken, made, strict=True)
    )
    return Bench(tuple(rows), runs, threads, runtime)


def _bytes_of_ir(path: Path) -> int:
    """The bytes of a file in OpenVINO's own format, with its tensors; 0 for another."""
    return path.stat().st_size + path.with_suffix(".bin").stat().st_size if path.suffix == ".xml" else 0


def _session(path: Path, batch: int, threads: int) -> tuple[Callable[[], Any], tuple[int, int]]:
    """What runs a file once; and how many of its products are in integers, and how many there are."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    with TemporaryDirectory() as folder:
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "tensors")
        try:
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of many kinds, which have no common one
            raise ValueError(f"`path` must name a file that ONNX Runtime takes. Found `{path}`: {error}") from error
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    integer = sum(kind in INTEGER_PRODUCTS for kind in kinds)
    names = {"float": "float32", "double": "float64"}
    feed = {}
    for node in session.get_inputs():
        kind = node.type.removeprefix("tensor(").removesuffix(")")
        shape = [length if isinstance(length, int) else batch for length in node.shape]
        feed[node.name] = _random(shape, names.get(kind, kind))
    return lambda: session.run(None, feed), (integer, integer + sum(kind in FLOAT_PRODUCTS for kind in kinds))


# Names that OpenVINO's CPU plugin gives to convolutions and matrix products in the graph that it executes.
_OPENVINO_PRODUCTS = frozenset(
    {"Convolution", "Deconvolution", "FullyConnected", "MatMul", "Gemm", "RNNSeq", "RNNCell"}
)


def _request(path: Path, batch: int, threads: int) -> tuple[Callable[[], Any], tuple[int, int]]:
    """As `_session`, in OpenVINO."""
    try:
        import openvino
    except ImportError as error:
        raise ImportError(
            f'Files run in OpenVINO with the extra (found no {error.name}): `pip install "lfq_lightning[openvino]"`.'
        ) from error
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    try:
        compiled = openvino.Core().compile_model(path, "CPU", settings)
    except Exception as error:  # of many kinds, which have no common one
        raise ValueError(f"`path` must name a file that OpenVINO takes. Found `{path}`: {error}") from error
    notes = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kinds = [
        note["runtimePrecision"].astype(str)
        for note in notes
        if "layerType" in note and note["layerType"].astype(str) in _OPENVINO_PRODUCTS
    ]
    request = compiled.create_infer_request()
    feed = {
        node.any_name: _random(
            [length.get_length() if length.is_static else batch for length in node.partial_shape],
            node.element_type.to_dtype(),
        )
        for node in compiled.inputs
    }
    return lambda: request.infer(feed), (sum(kind[:1] in ("i", "u") for kind in kinds), len(kinds))


def _random(shape: Sequence[int], kind: Any) -> Any:
    """An input of a file's type: normal numbers, or zeros, which are in the range of every table."""
    import numpy as np

    dtype = np.dtype(kind)
    if dtype.kind == "f":
        return np.random.default_rng(0).standard_normal(shape).astype(dtype)
    return np.zeros(shape, dtype)
