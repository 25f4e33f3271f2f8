"""An exported residual network in ONNX Runtime: integer kernels, latency and size against the float file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from networks import ConvolutionalNetwork

import lfq_lightning as lfq
from tests.benchmarks.measuring import Call, Table, times

BITS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4)}
INTEGER = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger", "ConvInteger", "QLinearAdd")


@pytest.mark.filterwarnings("ignore")
def test_export(table: Table, tmp_path: Path) -> None:
    table.notes.append("residual network, widths 64, 128, 256, inputs of 16x3x32x32; one thread, all optimizations")
    torch.set_num_threads(1)
    x = torch.randn(16, 3, 32, 32)
    network = ConvolutionalNetwork("residual", 3, 10, [64, 128, 256], 1).eval()
    torch.onnx.export(network, (x,), tmp_path / "float.onnx", dynamo=True, verbose=False, external_data=False)
    calls = {"float": running(tmp_path / "float.onnx", x)}
    sizes = {}
    for name, bits in BITS.items():
        lfq.attach(network, *bits)
        lfq.calibrate(network, [x])
        parity = lfq.export_onnx(network, x, tmp_path / f"{name}.onnx", on_mismatch="warn")
        sizes[name] = parity.file_bytes / parity.float_file_bytes
        calls[name] = running(tmp_path / f"{name}.onnx", x)
        lfq.detach(network)
    taken = {name: min(values) for name, values in times(calls, seconds=20).items()}
    for name in calls:
        kernels = Counter(node.op_type for node in onnx.load(tmp_path / f"{name}.optimized.onnx").graph.node)
        integer = ", ".join(f"{kernels[kind]} {kind}" for kind in INTEGER if kernels[kind])
        table.add(
            file=name,
            ms=taken[name] * 1e3,
            time_of_float=taken[name] / taken["float"],
            size_of_float=sizes.get(name, 1.0),
            integer_kernels=integer or "none",
        )


def running(path: Path, x: torch.Tensor) -> Call:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)
