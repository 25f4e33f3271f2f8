"""Exported files give the answers of the model that was trained, in ONNX Runtime and as programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from networks import ConvolutionalNetwork
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.export.exportable import sharing_copy
from lfq_lightning.export.fold import fold_batch_norm
from lfq_lightning.export.integers import integer_copy
from tests.assertions import assert_bit_equal
from tests.runs import Net, every_epoch, fit, loader, qat

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporter, about itself


def convolutional(block: Any) -> nn.Module:
    """With BatchNorms as training leaves them, some factors negative or zero."""
    network = ConvolutionalNetwork(block, channels=1, classes=10, widths=[8, 16], depth=1)
    with torch.no_grad():
        for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_(std=0.2)
            norm.running_var.uniform_(0.5, 2)
            norm.weight.normal_()
            norm.weight[1] = 0
            norm.bias.normal_()
    return network


def images(count: int) -> Tensor:
    return torch.randn(count, 1, 8, 8)


NETWORKS: dict[str, Any] = {
    "residual": (lambda: convolutional("residual"), images),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)),
        lambda n: torch.randn(n, 20),
    ),
}
AFFINE = lfq.QuantSpec(bits=4, symmetric=False, granularity="per_channel")
SETTINGS: dict[str, Any] = {
    "w8a8": (8, 8),
    "w4a8": (4, 8),
    "w4a4": (4, 4),
    "w2a4": (2, 4),
    "w4 groups": (lfq.QuantSpec(bits=4, granularity="per_group", group_size=5), None),
    "w4 affine, a8 symmetric": (AFFINE, lfq.QuantSpec(bits=8)),
    "w8 per tensor, a8 per channel": (lfq.QuantSpec(bits=8), lfq.QuantSpec(bits=8, granularity="per_channel")),
}


def trained(network: str, settings: str) -> tuple[nn.Module, Any]:
    make, inputs = NETWORKS[network]
    model = make()
    lfq.attach(model, *SETTINGS[settings])
    lfq.calibrate(model, [inputs(64)])
    lfq.set_phase(model, "learn")
    return model.eval(), inputs


@pytest.mark.parametrize("settings", ["w4 affine, a8 symmetric", "w8 per tensor, a8 per channel"])
def test_export_leaves_the_model_as_it_is(tmp_path: Path, settings: str) -> None:
    model, inputs = trained("residual", settings)
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    parity = lfq.export_onnx(model, inputs(4), tmp_path / "m.onnx", batches=[inputs(100)])
    assert parity.inputs == 104
    assert all(row.equal > 0.995 for row in parity.quantizers)
    assert {row.quantizer for row in parity.quantizers} == set(lfq.quantizers(model))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items() if isinstance(v, Tensor))
    for words in ("of the largest output", "with optimizations", "of the float file", "agrees                yes"):
        assert words in str(parity)


def test_an_export_looks_at_the_weights_where_they_are_and_writes_to_no_buffer(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model = nn.Sequential(Counting(), nn.Linear(4, 2))
    lfq.attach(model, rules=[lfq.Rule(Counting, weight=8)])
    lfq.calibrate(model, [torch.randn(8, 4)])
    before = model[0].calls.clone()
    lfq.export_onnx(model, torch.randn(8, 4), tmp_path / "m.onnx")
    assert torch.equal(model[0].calls, before)
    copied = sharing_copy(model)
    assert all(c.data_ptr() == p.data_ptr() for c, p in zip(copied.parameters(), model.parameters(), strict=True))
    kept, bias = lfq.export_pt2(model, torch.randn(8, 4)).state_dict["1.bias"], model[1].bias.clone()
    with torch.no_grad():
        model[1].bias.add_(1)
    assert torch.equal(kept, bias)


@pytest.mark.parametrize("settings", ["w4a4", "w4 affine, a8 symmetric", "w4 groups"])
def test_folding_rounds_no_integer_again(settings: str) -> None:
    model, inputs = trained("residual", settings)
    x = inputs(16)
    integers = integer_copy(model)
    torch.testing.assert_close(integers(x), model(x), rtol=1e-4, atol=1e-4)
    codes = {name: m.codes.clone() for name, m in integers.named_modules() if hasattr(m, "codes")}
    folded = fold_batch_norm(integers, (x,))
    assert len(folded) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(integers(x), model(x), rtol=1e-4, atol=1e-4)
    for name, before in codes.items():
        weight = integers.get_submodule(name)
        span = {tuple(row.tolist()) for row in weight.codes.flatten(1)}
        if name == "stem.conv.weight_quantizer":
            gamma = model.stem.norm.weight
            same = [bool((b == a).all()) for b, a in zip(before, weight.codes, strict=True)]
            assert all(s for s, g in zip(same, gamma, strict=True) if g > 0)
            assert not any(s for s, g in zip(same, gamma, strict=True) if g < 0)
        assert weight.range[0] <= min(min(row) for row in span)
        assert max(max(row) for row in span) <= weight.range[1]


def test_a_normalization_whose_input_is_used_elsewhere_is_left_alone() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    model = Both()
    lfq.attach(model)
    lfq.calibrate(model, [images(8)])
    assert fold_batch_norm(integer_copy(model), (images(2),)) == []


@pytest.mark.parametrize(("bits", "most"), [(8, 0.28), (4, 0.16)])
def test_files_are_small(tmp_path: Path, bits: int, most: float) -> None:
    model = ConvolutionalNetwork("residual", 3, 10, [64, 128, 256], 1)
    lfq.attach(model, bits, 8)
    x = torch.randn(2, 3, 32, 32)
    lfq.calibrate(model, [x])
    parity = lfq.export_onnx(model.eval(), x, tmp_path / "m.onnx", on_mismatch="warn")
    assert parity.file_bytes == (tmp_path / "m.onnx").stat().st_size
    assert parity.file_bytes <= most * parity.float_file_bytes


@pytest.mark.quick
def test_weights_are_integers_in_the_file(tmp_path: Path) -> None:
    model, inputs = trained("residual", "w4a4")
    lfq.export_onnx(model, inputs(4), tmp_path / "m.onnx")
    kinds = {i.name: i.data_type for i in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert kinds["stem.conv.weight_quantizer.codes"] == onnx.TensorProto.INT8
    assert kinds["blocks.0.first.conv.weight_quantizer.codes"] == onnx.TensorProto.INT4
    assert not any(name.endswith("conv.weight") for name in kinds)


@pytest.mark.quick
def test_a_file_that_gives_other_answers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = trained("mlp", "w8a8")
    from lfq_lightning.export import integers

    original = integers.IntegerWeight.__init__

    def broken(self: Any, quantizer: Any, weight: Tensor) -> None:
        original(self, quantizer, weight)
        self.codes = self.codes.roll(1, 0)

    monkeypatch.setattr(integers.IntegerWeight, "__init__", broken)
    with pytest.raises(ValueError, match=r"does not give the model's answers: 0\.weight_quantizer: .*codes differ"):
        lfq.export_onnx(model, inputs(64), tmp_path / "m.onnx")
    with pytest.warns(UserWarning, match="does not give the model's answers"):
        assert not lfq.export_onnx(model, inputs(64), tmp_path / "m.onnx", on_mismatch="warn").agrees


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_frozen_copy_needs_torch_alone_and_keeps_every_bit(settings: str) -> None:
    model, inputs = trained("residual", settings)
    x = inputs(16)
    frozen = lfq.freeze(model)
    assert not lfq.quantizers(frozen)
    assert lfq.quantizers(model)
    assert not any(type(m).__module__.startswith("lfq_lightning") for m in frozen.modules())
    for same in (frozen, torch.jit.trace(frozen, x), torch.export.export(frozen, (x,)).module()):
        assert_bit_equal(same(x), model(x))


@pytest.mark.parametrize("settings", ["w8a8", "w4a4", "w4 groups"])
def test_a_program_comes_back_from_its_file(tmp_path: Path, settings: str) -> None:
    model, inputs = trained("residual", settings)
    x = inputs(16)
    program = lfq.export_pt2(model, x, tmp_path / "m.pt2")
    back = torch.export.load(tmp_path / "m.pt2").module()(x)
    assert_bit_equal(back, program.module()(x))
    # The operators multiply by 1 / scale where ONNX and we divide: a value on a tie may go to the other side.
    torch.testing.assert_close(back, model(x), rtol=0.02, atol=0.02)
    if settings != "w4 groups":
        assert any("quantized_decomposed.quantize_per_tensor" in str(n.target) for n in program.graph.nodes)


@pytest.mark.quick
def test_what_cannot_be_exported_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="has no quantizers to export"):
        lfq.freeze(model)
    lfq.attach(model, weight=12, activation=None)
    with pytest.raises(ValueError, match=r"Found none set for 0\.weight_quantizer"):
        lfq.freeze(model)
    lfq.calibrate(model, [torch.randn(4, 4)])
    with pytest.raises(ValueError, match="the weight of '0' has 12 bits, of at most 8"):
        lfq.export_onnx(model, torch.randn(2, 4), "unused.onnx")


def test_a_fit_ends_with_an_exported_file_and_an_unchanged_model(tmp_path: Path) -> None:
    callback = qat(export="model.onnx")
    model, made, _ = fit(tmp_path, Net(), callback=callback, callbacks=[every_epoch(tmp_path)])
    assert callback.parity is not None
    assert callback.parity.agrees
    [path] = tmp_path.rglob("model.onnx")
    assert onnx.load(path).graph.node
    assert lfq.quantizers(model)
    made.test(model, loader(), ckpt_path="best", weights_only=True)
    made.fit_loop.max_epochs = made.current_epoch + 1
    made.fit(model, loader())


def test_what_cannot_be_exported_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be exported to integers: the weight of 'first' has 16 bits"):
        fit(tmp_path, Net(), callback=qat(weight=16, export="model.onnx"))


@pytest.mark.parametrize("path", ["/proc/nowhere/model.onnx", "/tmp"])
def test_a_file_that_cannot_be_written_is_refused_before_training(tmp_path: Path, path: str) -> None:
    model = Net()
    weight = model.first.weight.clone()
    with pytest.raises(ValueError, match=f"`export` must name a file that can be written. Found `{path}`"):
        fit(tmp_path, model, callback=qat(export=path))
    assert torch.equal(model.first.weight, weight)
