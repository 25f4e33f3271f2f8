"""What ONNX Runtime makes of files: quantized for it, without a target, and by its own post-training quantization."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quant_pre_process, quantize_static
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.export.bench import bench
from tests.benchmarks.measuring import Table
from tests.benchmarks.networks import inverted_residuals, resnet18

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (resnet18, 32),
    "inverted residuals": (inverted_residuals, 96),
}


class Images(CalibrationDataReader):  # type: ignore[misc]
    """The images that ONNX Runtime takes its ranges from."""

    def __init__(self, name: str, images: Tensor) -> None:
        self._batches = iter([{name: x[None].numpy()} for x in images])

    def get_next(self) -> Any:
        return next(self._batches, None)


@pytest.mark.filterwarnings("ignore")  # the exporters, about themselves
@pytest.mark.parametrize("network", NETWORKS)
def test_target(table: Table, tmp_path: Path, network: str) -> None:
    table.name = f"target_{network.replace(' ', '_')}"
    table.notes.append("W8A8, random weights, one image, one thread, medians of runs in turn, in multiples of float")
    make, size = NETWORKS[network]
    torch.manual_seed(0)
    net, images = make(), torch.randn(16, 3, size, size)
    net(images)  # statistics for BatchNorm
    x = images[:1]
    files = {"float": tmp_path / "float.onnx", "ONNX Runtime's own": tmp_path / "own.onnx"}
    torch.onnx.export(net.eval(), (x,), files["float"], dynamo=True, verbose=False, external_data=False)
    for target in (None, "onnxruntime"):
        lfq.attach(net, 8, 8, example=x, target=target)
        lfq.calibrate(net, images.split(8))
        name = f"ours, target {target}"
        files[name] = tmp_path / f"{target}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lfq.export_onnx(net, x, files[name])
        lfq.detach(net)
    quant_pre_process(str(files["float"]), str(tmp_path / "prepared.onnx"))
    codes = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    reader = Images(onnx.load(files["float"]).graph.input[0].name, images)
    own = files["ONNX Runtime's own"]
    quantize_static(str(tmp_path / "prepared.onnx"), str(own), reader, per_channel=True, **codes)
    found = bench([*files.values()], runs=300)
    for name, row in zip(files, found.rows, strict=True):
        table.add(
            network=network,
            file=name,
            ms=f"{row.milliseconds:.2f}",
            of_float=f"{row.milliseconds / found.rows[0].milliseconds:.3f}",
            products_in_integers=f"{row.integer} of {row.products}",
            bytes_of_float=f"{row.file_bytes / found.rows[0].file_bytes:.3f}",
        )
