"""The parity gate sees a wrong answer wherever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.export import to_onnx
from lfq_lightning.export.parity import Parity

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporter, about itself


class TwoHeads(nn.Module):
    """Scores that no head but the first decides, and one number, whose largest is always itself; masked in part."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scores, self.value = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = torch.relu(self.body(x))
        return {"scores": self.scores(y).masked_fill(x[:, :1] > 0, -torch.inf), "value": self.value(y)}


def exported(folder: Path) -> Parity:
    model, x = TwoHeads(), torch.randn(256, 6)
    lfq.attach(model, 8, 8)
    lfq.calibrate(model, [x])
    return lfq.export_onnx(model.eval(), x[:8], folder / "m.onnx", batches=[x])


def test_every_output_is_compared(tmp_path: Path) -> None:
    parity = exported(tmp_path)
    assert parity.agrees
    assert 0 <= parity.plain.noise < 1e-6
    assert parity.plain.difference < 1e-3


@pytest.mark.parametrize("head", ["scores", "value"])
def test_a_wrong_last_layer_is_seen_though_every_code_is_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: str
) -> None:
    original = to_onnx._bare

    def spoilt(proto: onnx.ModelProto) -> onnx.ModelProto:
        for stored in proto.graph.initializer:
            if stored.name == f"{head}.bias":
                stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored) + 1, stored.name))
        return original(proto)

    monkeypatch.setattr(to_onnx, "_bare", spoilt)
    with pytest.raises(ValueError, match=r"m\.onnx does not give the model's answers: an output differs by up to 1"):
        exported(tmp_path)


@pytest.mark.parametrize("mismatch", ["ignore", None])
def test_what_happens_on_a_mismatch_must_be_known(mismatch: Any) -> None:
    with pytest.raises(ValueError, match='must be "raise" or "warn"'):
        lfq.export_onnx(nn.Linear(2, 2), torch.randn(2, 2), "unused.onnx", on_mismatch=mismatch)
