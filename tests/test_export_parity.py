"""The parity gate sees a wrong answer wherever it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.export import onnx_file, to_onnx
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
            if stored.name == f"{head}.bias.negative":  # which is subtracted behind the product
                stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored) - 1, stored.name))
        return original(proto)

    monkeypatch.setattr(to_onnx, "_bare", spoilt)
    with pytest.raises(ValueError, match=r"m\.onnx does not give the model's answers: an output differs by up to 1"):
        exported(tmp_path)


@pytest.mark.parametrize("mismatch", ["ignore", None])
def test_what_happens_on_a_mismatch_must_be_known(mismatch: Any) -> None:
    with pytest.raises(ValueError, match='must be "raise" or "warn"'):
        lfq.export_onnx(nn.Linear(2, 2), torch.randn(2, 2), "unused.onnx", on_mismatch=mismatch)


# ---- what is found and what is not --------------------------------------------------------------------------------


class Deep(nn.Module):
    """Many residual convolutions with random weights: differences from the order of sums would add up."""

    def __init__(self, seed: int, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 10)
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = torch.relu(x + block(x))
            x = x / x.abs().mean()
        return self.head(x.mean((2, 3)))


def quantized_deep(seed: int = 0, blocks: int = 4) -> tuple[nn.Module, Tensor]:
    model, x = Deep(seed, blocks), torch.randn(8, 3, 16, 16)
    lfq.attach(model, 8, 8, example=x)
    lfq.calibrate(model, [x])
    return model, x


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_a_deep_network_with_random_weights_raises_no_alarm(tmp_path: Path, seed: int) -> None:
    model, x = quantized_deep(seed, 30)
    assert lfq.export_onnx(model, x, tmp_path / "m.onnx").agrees


class Recurs(nn.Module):
    """One block three times, whose two layers read one tensor, as Albert's query, key and value do."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.left(x)) * 2 - torch.relu(self.right(x))
        return self.head(x)


def test_a_tensor_that_several_read_is_one_tensor_of_the_file_in_each_of_many_uses(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Recurs(), torch.randn(20, 6)
    lfq.attach(model, 8, 8, example=x)
    lfq.calibrate(model, [x])
    assert model.left.input_quantizer is model.right.input_quantizer
    assert lfq.export_onnx(model, x, tmp_path / "m.onnx").agrees


def initializer(proto: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(each for each in proto.graph.initializer if each.name == name)


def changed(proto: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """A constant of its own for the first reader of one."""
    values = change(numpy_helper.to_array(initializer(proto, name)).copy())
    initializer(proto, name).CopyFrom(numpy_helper.from_array(values, name))


LAYERS = ("stem", *(f"blocks.{number}" for number in range(4)), "head")


def in_first_channel(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """The change, in the first output channel alone."""
    return lambda v: np.concatenate([change(v[:1]), v[1:]])


def fault_in(proto: onnx.ModelProto, fault: str, layer: str) -> None:
    quantize = [n for n in proto.graph.node if n.op_type == "QuantizeLinear"][LAYERS.index(layer)]
    dequantize = {n.input[0]: n for n in proto.graph.node if n.op_type == "DequantizeLinear"}
    codes, scale, *zero_point = dequantize[f"{layer}.weight_quantizer.codes"].input
    # A matrix is stored as (outputs, inputs) here; the product of it has its bias subtracted behind.
    bias = f"{layer}.bias" + ".negative" * (layer == "head")
    if fault == "scale of a weight":
        changed(proto, scale, lambda v: v * np.float32(1.01))
    elif fault == "scale of a channel":
        changed(proto, scale, in_first_channel(lambda v: v * np.float32(1.02)))
    elif fault == "a code of a weight":
        changed(proto, codes, lambda v: np.where(np.arange(v.size).reshape(v.shape) == 7, v ^ 1, v))
    elif fault == "the sign of a channel":
        changed(proto, codes, in_first_channel(lambda v: -v))
    elif fault == "two channels exchanged":
        changed(proto, codes, lambda v: v[[1, 0, *range(2, len(v))]])
    elif fault == "zero point of a weight":
        changed(proto, zero_point[0], in_first_channel(lambda v: v + np.array(1, v.dtype)))
    elif fault == "a bias":
        changed(proto, bias, lambda v: v + np.float32(0.05) * np.abs(v).max())
    elif fault == "the bias of a channel":
        # A tenth of the largest moves but one code of the head's input, as the edge between two may.
        first = np.float32(0.3) * (np.arange(16 if layer != "head" else 10) == 0)
        changed(proto, bias, lambda v: v + np.abs(v).max() * first.reshape(v.shape))
    elif fault == "scale of an input":
        kept = numpy_helper.to_array(initializer(proto, quantize.input[1]))
        proto.graph.initializer.append(numpy_helper.from_array(kept * np.float32(1.01), "other"))
        quantize.input[1] = "other"
    elif fault == "zero point of an input":
        kept = numpy_helper.to_array(initializer(proto, quantize.input[2]))
        proto.graph.initializer.append(numpy_helper.from_array(kept + np.array(3, kept.dtype), "other"))
        quantize.input[2] = "other"


MORE = ("blocks.0", "blocks.1", "blocks.3", "head")
FAULTS = (
    *("scale of a weight", "scale of a channel", "a code of a weight", "the sign of a channel"),
    *("two channels exchanged", "zero point of a weight", "a bias", "the bias of a channel"),
    *("scale of an input", "zero point of an input"),
)


@pytest.mark.parametrize("layer", [*LAYERS[::3], *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_that_is_put_into_a_file_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, layer: str
) -> None:
    model, x = quantized_deep()
    whole = onnx_file.save

    def broken(proto: onnx.ModelProto, path: Path, external_data: bool | None) -> None:
        fault_in(proto, fault, layer)
        whole(proto, path, external_data)

    monkeypatch.setattr(onnx_file, "save", broken)
    with pytest.raises(ValueError, match="does not give the model's answers"):
        lfq.export_onnx(model, x, tmp_path / "m.onnx")


def test_a_distance_of_ones_own_decides_about_outputs(tmp_path: Path) -> None:
    model, x = quantized_deep()
    parity = lfq.export_onnx(
        model, x, tmp_path / "m.onnx", distance=lambda a, b: (a.argmax(1) != b.argmax(1)).float().mean()
    )
    assert parity.plain.distance == parity.optimized.distance == 0.0
    with pytest.raises(ValueError, match="an output differs by up to"):
        lfq.export_onnx(model, x, tmp_path / "m.onnx", distance=lambda a, b: 1.0)


def test_an_export_that_fails_leaves_the_file_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = quantized_deep()
    (tmp_path / "m.onnx").write_text("before")

    def full(proto: onnx.ModelProto, path: Path) -> None:
        path.write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr(onnx, "save", full)
    with pytest.raises(OSError, match="no space"):
        lfq.export_onnx(model, x, tmp_path / "m.onnx")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("m.onnx", "before")]
