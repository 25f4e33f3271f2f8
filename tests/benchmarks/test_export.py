"""Exported files in ONNX Runtime: agreement with the models, integer kernels, latency and size against float files."""

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
from tests.benchmarks.networks import resnet18
from tests.exported_networks import NETWORKS, SETTINGS, accuracy, inputs, trained
from tests.test_export_matrix import assert_quantizers_are_exact

BITS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4)}
INTEGER = ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger", "ConvInteger", "QLinearAdd")


@pytest.mark.filterwarnings("ignore")
def test_export_parity(table: Table, tmp_path: Path) -> None:
    table.notes.append("networks trained on the digits; 1,000 inputs; plain: no graph optimizations, optimized: all")
    torch.set_num_threads(1)
    for network in NETWORKS:
        for setting, specs in SETTINGS.items():
            model, x = trained(network, *specs), inputs(network, 1000)
            path = tmp_path / "m.onnx"
            parity = lfq.export_onnx(model, x[:1], path, batches=[x], on_mismatch="warn")
            assert_quantizers_are_exact(model, path, x)  # raises where one is not
            codes = [row for row in parity.quantizers if row.quantizer.endswith("input_quantizer")]
            weights = [row for row in parity.quantizers if row.quantizer.endswith("weight_quantizer")]
            table.add(
                network=network,
                setting=setting,
                accuracy=accuracy(model, network),
                equal_weight_codes=f"{min(row.equal for row in weights):.4%}",
                equal_input_codes=f"{min(row.equal for row in codes):.4%}" if codes else None,
                codes_apart=str(max(row.largest for row in codes)) if codes else None,
                of_the_largest_output=f"{parity.plain.relative:.2g}",
                difference=f"{parity.plain.difference:.2g}",
                quanta=f"{parity.plain.quanta:.3g}",
                optimized_difference=f"{parity.optimized.difference:.2g}",
                optimized_noise=f"{parity.optimized.noise:.1g}",
                size_of_float=f"{parity.size:.3f}",
            )


@pytest.mark.filterwarnings("ignore")
def test_export_latency(table: Table, tmp_path: Path) -> None:
    table.notes.append("ResNet-18, width 64, one input of 3x32x32; one thread, all optimizations")
    table.notes.append("precise: with session.x64quantprecision, which no 8-bit sum saturates under")
    measure(table, tmp_path, resnet18(), torch.randn(1, 3, 32, 32), seconds=60)


@pytest.mark.filterwarnings("ignore")
def test_export_size(table: Table, tmp_path: Path) -> None:
    table.notes.append("bytes of a file, and as a share of the float file's")
    networks = {
        "digits residual, widths 16 and 32": (ConvolutionalNetwork("residual", 1, 10, [16, 32], 1), (2, 1, 8, 8)),
        "residual, widths 64, 128, 256": (ConvolutionalNetwork("residual", 3, 10, [64, 128, 256], 1), (2, 3, 32, 32)),
        "ResNet-18, width 64": (resnet18(), (2, 3, 32, 32)),
    }
    for name, (network, shape) in networks.items():
        x = torch.randn(shape)
        for bits in BITS:
            lfq.attach(network.eval(), *BITS[bits])
            lfq.calibrate(network, [x])
            parity = lfq.export_onnx(network, x, tmp_path / "m.onnx", on_mismatch="warn")
            lfq.detach(network)
            table.add(
                network=name,
                bits=bits,
                bytes=f"{parity.file_bytes:,}",
                float_bytes=f"{parity.float_file_bytes:,}",
                size_of_float=f"{parity.size:.3f}",
            )


def measure(table: Table, folder: Path, network: torch.nn.Module, x: torch.Tensor, seconds: float) -> None:
    """Add a row for the float file and one for each quantized file, run alternately."""
    torch.set_num_threads(1)
    network.eval()
    torch.onnx.export(network, (x,), folder / "float.onnx", dynamo=True, verbose=False, external_data=False)
    calls = {"float": running(folder / "float.onnx", x, precise=False)}
    for name, bits in BITS.items():
        lfq.attach(network, *bits)
        lfq.calibrate(network, [x])
        lfq.export_onnx(network, x, folder / f"{name}.onnx", on_mismatch="warn")
        for precise in (False, True):
            calls[f"{name}{' precise' * precise}"] = running(folder / f"{name}.onnx", x, precise)
        lfq.detach(network)
    taken = {name: min(values) for name, values in times(calls, seconds).items()}
    for name in calls:
        kernels = Counter(node.op_type for node in onnx.load(folder / f"{name}.optimized.onnx").graph.node)
        integer = ", ".join(f"{kernels[kind]} {kind}" for kind in INTEGER if kernels[kind])
        table.add(
            file=name,
            ms=taken[name] * 1e3,
            time_of_float=taken[name] / taken["float"],
            integer_kernels=integer or "none",
            float_kernels=str(sum(kernels[kind] for kind in ("Conv", "FusedConv", "Gemm", "MatMul"))),
        )


def running(path: Path, x: torch.Tensor, precise: bool) -> Call:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", str(int(precise)))
    options.optimized_model_filepath = str(path.with_name(f"{path.stem}{' precise' * precise}.optimized.onnx"))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)
