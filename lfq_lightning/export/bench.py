"""How fast ONNX files run in ONNX Runtime, how much of them in integers, and how large they are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from lfq_lightning.checking import check_path, check_whole
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
        note = f"ONNX Runtime, {self.threads} thread{'s' * (self.threads > 1)}; medians of {self.runs} runs in turn"
        return str(Table(columns, cells, ["", note]))


def bench(paths: Sequence[str | Path], *, batch: int = 1, runs: int = 50, threads: int = 1) -> Bench:
    """Run files in ONNX Runtime in turn, with all optimizations, on random inputs.

    Args:
        paths: the files; give the float file first, to see shares of it.
        batch: the length of every dimension that may vary.
        runs: of each file, after three that are not counted.
        threads: of each operation.

    Raises:
        ImportError: if onnx or onnxruntime is missing.
        ValueError: if a file is missing, or cannot be run.
    """
    require_onnx()
    from lfq_lightning.export.onnx_file import file_bytes

    files = [Path(path) for path in paths]
    for path in files:
        check_path("path", path)
        if not path.is_file():
            raise ValueError(f"`path` must name an ONNX file. Found no file at `{path}`: export one first.")
    for name, value in {"batch": batch, "runs": runs, "threads": threads}.items():
        check_whole(name, value, 1)
    made = [_session(path, batch, threads) for path in files]
    for run, _ in made * 3:
        run()
    taken: list[list[float]] = [[] for _ in files]
    for _ in range(runs):
        for (run, _), times in zip(made, taken, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    rows = (
        BenchRow(path, 1e3 * median(times), *counted, file_bytes(path))
        for path, times, (_, counted) in zip(files, taken, made, strict=True)
    )
    return Bench(tuple(rows), runs, threads)


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
    feed = {node.name: _random(node, batch) for node in session.get_inputs()}
    return lambda: session.run(None, feed), (integer, integer + sum(kind in FLOAT_PRODUCTS for kind in kinds))


def _random(node: Any, batch: int) -> Any:
    """An input of a file's type: normal numbers, or zeros, which are in the range of every table."""
    import numpy as np

    shape = [length if isinstance(length, int) else batch for length in node.shape]
    kind = node.type.removeprefix("tensor(").removesuffix(")")
    if kind in ("float", "double", "float16"):
        values = np.random.default_rng(0).standard_normal(shape)
        return values.astype({"float": np.float32, "double": np.float64, "float16": np.float16}[kind])
    return np.zeros(shape, kind)
