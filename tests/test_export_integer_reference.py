"""An exported graph can run in integers alone, and gives the codes that ONNX Runtime gives in float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import lfq_lightning as lfq
from tests.integer_reference import run_in_integers

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporter, about itself

SYMMETRIC, AFFINE = lfq.QuantSpec(bits=8), lfq.QuantSpec(bits=8, symmetric=False, granularity="per_channel")
SETTINGS = {"w8a8": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4), "w2a4": (2, 4), "affine weights": (AFFINE, SYMMETRIC)}


def network() -> nn.Module:
    """Strides, padding, groups, and BatchNorms with a negative and a zero factor."""
    made = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 25, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    )
    with torch.no_grad():
        for norm in (made[1], made[4]):
            norm.weight.uniform_(0.5, 2)
            norm.weight[0], norm.weight[1] = -0.8, 0.0
            norm.bias.normal_()
            norm.running_mean.normal_(std=0.2)
            norm.running_var.uniform_(0.5, 2)
    return made


def run_in_float(path: Path, x: Tensor, names: list[str]) -> list[np.ndarray]:
    proto = onnx.load(path)
    for name in names:
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x.numpy()})


@pytest.mark.parametrize("settings", SETTINGS)
def test_integers_alone_give_the_codes_of_float(tmp_path: Path, settings: str) -> None:
    model = network()
    lfq.attach(model, *SETTINGS[settings])
    x = torch.randn(64, 2, 9, 9)
    lfq.calibrate(model, [x])
    path = tmp_path / "m.onnx"
    parity = lfq.export_onnx(model.eval(), x, path)
    assert len(parity.folded) == 2
    codes, output = run_in_integers(path, x.numpy())
    assert len(codes) == 5
    expected, *others = run_in_float(path, x, list(codes))
    for (name, mine), theirs in zip(codes.items(), others, strict=True):
        assert len(np.unique(mine)) > 8, name
        # A sum that lies within float rounding of a tie may fall to the other side of it.
        apart = np.abs(mine.astype(int) - theirs.astype(int))
        assert apart.max() <= 1, name
        assert (apart > 0).mean() <= 1e-4, name
    np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-2 * float(np.abs(expected).max()))
    with torch.no_grad():
        assert (output.argmax(1) == model(x).argmax(1).numpy()).all()
