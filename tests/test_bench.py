"""The command that runs exported files says how fast they are, what of them is in integers, and how large they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import lfq_lightning as lfq
from lfq_lightning.__main__ import main
from lfq_lightning.export import bench, float_file

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
    x, exact, quantized = torch.randn(2, 3, 12, 12), tmp_path / "float.onnx", tmp_path / "quantized.onnx"
    torch.onnx.export(model, (x,), exact, dynamo=True, verbose=False, external_data=True)
    lfq.attach(model, example=x, target="onnxruntime")
    lfq.calibrate(model, [x])
    lfq.export_onnx(model, x, quantized)
    return exact, quantized


def test_products_in_integers_are_counted_in_what_is_executed(files: tuple[Path, Path]) -> None:
    exact, quantized = bench(files, runs=3, batch=2).rows
    assert (exact.integer, exact.products) == (0, 3)
    assert (quantized.integer, quantized.products) == (2, 3)  # what leaves the network is float
    assert min(exact.milliseconds, quantized.milliseconds) > 0


def test_tensors_beside_a_file_count_to_its_size(files: tuple[Path, Path]) -> None:
    parts = list(files[0].parent.glob("float.onnx*"))
    assert bench(files[:1], runs=1).rows[0].file_bytes == sum(path.stat().st_size for path in parts)


def test_the_command_prints_a_table_of_shares(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    exact, quantized = map(str, files)
    assert main(["bench", quantized, "--against", exact, "--runs", "2"]) == 0
    head, _, first, second, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["file", "ms"]
    assert first.split()[0] == "float.onnx"
    assert first.split()[2] == "1.000"
    assert "2 of 3" in second


def test_what_is_no_file_of_onnx_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(tmp_path / "none.onnx")]) == 1
    assert "must name an ONNX file. Found no file at" in capsys.readouterr().err
    (tmp_path / "broken.onnx").write_text("no model")
    assert main(["bench", str(tmp_path / "broken.onnx")]) == 1
    assert "must name a file that ONNX Runtime takes" in capsys.readouterr().err


def test_the_float_file_of_a_quantized_model_is_that_of_its_weights(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(4, 6)
    expected = model(x).detach().numpy()
    lfq.attach(model, 2, 2)
    lfq.calibrate(model, [x])
    path = float_file(model, x, tmp_path / "new" / "float.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], expected, 1e-5, 1e-6)
    assert len(lfq.quantizers(model)) == 4
    assert "QuantizeLinear" not in {node.op_type for node in onnx.load(path).graph.node}


def test_files_run_in_openvino_too(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    exact, quantized = map(str, files)
    assert main(["bench", quantized, "--against", exact, "--runs", "2", "--runtime", "openvino"]) == 0
    said = capsys.readouterr().out
    assert "3 of 3" in said.splitlines()[3]
    assert said.rstrip().endswith("OpenVINO, 1 thread; medians of 2 runs in turn")
    broken = files[0].with_name("broken.onnx")
    broken.write_text("no model")
    assert main(["bench", str(broken), "--runtime", "openvino"]) == 1
    assert "must name a file that OpenVINO takes" in capsys.readouterr().err
