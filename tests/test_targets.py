"""A network that is quantized for a runtime is executed in integers there, and nothing is quantized for nothing."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lfq_lightning as lfq
from lfq_lightning import QuantSpec, Rule
from lfq_lightning.export.bench import bench
from lfq_lightning.targets import TARGETS, target_of
from tests.target_networks import Module, Residual, UNet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Normed(nn.Module):
    """Its sums meet a normalization and leave the network, which are computed in float."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.last(self.norm(x))


X = (4, 3, 8, 8)


def executed(model: nn.Module, folder: Path, x: Tensor, **settings: Any) -> Counter[str]:
    """The operations that ONNX Runtime executes of a calibrated model."""
    lfq.calibrate(model, [x])
    parity = lfq.export_onnx(model, x, folder / "m.onnx", **settings)
    assert parity.agrees
    onnx.checker.check_model(folder / "m.onnx", full_check=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(folder / "m.onnx", options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)


def test_residual_additions_and_all_convolutions_before_an_output_are_integers(tmp_path: Path) -> None:
    model, x = Residual().eval(), torch.randn(X)
    placement = lfq.attach(model, example=x, target="onnxruntime")
    assert [operand.label for operand in placement.operands] == ["add/input", "add/other"]
    found = executed(model, tmp_path, x)
    assert found["QLinearConv"] == 3
    assert found["QLinearAdd"] == 1
    assert found["Conv"] + found["FusedConv"] == 1  # the last, whose output is float


def test_without_a_target_additions_stay_in_float(tmp_path: Path) -> None:
    model, x = Residual().eval(), torch.randn(X)
    assert lfq.attach(model, example=x).operands == ()
    assert executed(model, tmp_path, x)["QLinearAdd"] == 0


def test_concatenations_are_integers_and_a_pooling_has_one_scale_on_both_sides(tmp_path: Path) -> None:
    model, x = UNet().eval(), torch.randn(X)
    placement = lfq.attach(model, example=x, target="onnxruntime")
    assert {operand.label for operand in placement.operands} == {"cat/tensor0", "cat/tensor1"}
    placed = lfq.quantizers(model)
    by_name = {name: quantizer for name, quantizer in placed.items() if "weight" not in name}
    # The input; the skip and what is pooled of it; the deep one and what is made larger; both joined; the last's input.
    assert len(set(map(id, by_name.values()))) == 5
    found = executed(model, tmp_path, x)
    assert found["QLinearConcat"] == 1
    assert found["QLinearConv"] == 3
    (pool,) = [node for node in onnx.load(tmp_path / "optimized.onnx").graph.node if node.op_type.endswith("MaxPool")]
    makers = {name: node for node in onnx.load(tmp_path / "optimized.onnx").graph.node for name in node.output}
    assert makers[pool.input[0]].op_type == "QLinearConv"


def test_an_addition_whose_sum_stays_in_float_is_not_quantized() -> None:
    placement = lfq.attach(Normed(), example=torch.randn(2, 4), target="onnxruntime")
    assert placement.operands == ()
    assert [layer.name for layer in placement.layers] == ["first", "last"]


def test_operands_have_8_bits_unless_a_layer_reads_the_same_tensor_in_fewer() -> None:
    model, x = Residual(), torch.randn(X)
    placement = lfq.attach(model, 4, 4, example=x, target="onnxruntime")
    assert [(operand.label, operand.spec.bits) for operand in placement.operands] == [
        ("add/input", 4),  # which the next convolution reads as well
        ("add/other", 8),
    ]


class Both(nn.Module):
    """What two layers give is added, goes on, and is shown as it is too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = self.first(x) + self.second(x)
        return self.last(total), total.square()


def test_what_is_read_in_float_as_well_is_not_quantized() -> None:
    placement = lfq.attach(Both(), example=torch.randn(X), target="onnxruntime")
    assert placement.operands == ()


class Classifier(nn.Module):
    """Ends in a mean over all pixels and a linear layer."""

    def __init__(self, by_function: bool = False) -> None:
        super().__init__()
        self.features, self.pool, self.head = Residual(), nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)
        self.by_function = by_function

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.features(x))
        return self.head(x.mean((-1, 2)) if self.by_function else self.pool(x).flatten(1))


@pytest.mark.parametrize(
    ("weight", "activation", "by_function"), [(8, 8, True), (4, 8, False), (4, 4, True), (2, 3, False)]
)
def test_optimized_for_speed_a_network_of_any_bits_runs_in_integers(
    tmp_path: Path, weight: int, activation: int, by_function: bool
) -> None:
    model, x = Classifier(by_function).eval(), torch.randn(X)
    lfq.attach(model, weight, QuantSpec(activation, symmetric=False), example=x, target="onnxruntime")
    found = executed(model, tmp_path, x, optimize_for="speed", optimized_tolerance=0.1)
    assert found["QLinearConv"] == 4
    assert found["QLinearAdd"] == found["QLinearGlobalAveragePool"] == found["QGemm"] == 1
    assert found["Conv"] + found["FusedConv"] + found["Gemm"] == 0
    assert activation < 8 or found["Clip"] == 0  # 8 bits saturate by themselves


def test_codes_that_are_not_zero_at_zero_saturate_where_floats_did(tmp_path: Path) -> None:
    model, x = Tokens(bias=True), torch.randn(50, 64)
    spec = QuantSpec(3, symmetric=False)
    lfq.attach(model, 4, spec, rules=[Rule("*", activation=spec)], example=x)
    lfq.calibrate(model, [x])
    with torch.no_grad():  # so that much of what is given is beyond the range
        for layer in (model.first, model.last):
            layer.input_quantizer.scale.mul_(0.4)
            layer.input_quantizer.zero_point.fill_(3)
    parity = lfq.export_onnx(model, x, tmp_path / "m.onnx", optimize_for="speed", optimized_tolerance=1)
    assert parity.agrees
    assert [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node].count("Clip") == 2


def test_a_file_says_which_weights_run_in_float(tmp_path: Path) -> None:
    model, x = Classifier().eval(), torch.randn(X)

    def in_float(**settings: Any) -> list[str]:
        lfq.calibrate(model, [x])
        parity = lfq.export_onnx(model, x, tmp_path / "m.onnx", **settings)
        assert ("runs in float" in str(parity)) == bool(parity.in_float)
        found = [name.removeprefix("features.").partition(".")[0] for name in parity.in_float]
        lfq.detach(model)
        return found

    lfq.attach(model, 4, 8, example=x, target="onnxruntime")
    assert in_float() == ["conv1", "conv2", "last"]  # packed; the first and the last layer have 8 bits
    lfq.attach(model, 4, 8, example=x, target="onnxruntime")
    assert in_float(optimize_for="speed") == []
    lfq.attach(model, 8, 8, example=x)
    assert in_float() == ["stem", "conv2", "last"]  # what they give meets an addition or a mean in float
    lfq.attach(model, 8, None, example=x)
    assert in_float() == ["stem", "conv1", "conv2", "last"]  # the matrix is multiplied by as it is stored


class PadsItself(nn.Conv2d):
    """As convolutions do that were ported from TensorFlow."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 2, 1)), self.weight, self.bias, self.stride, (0, 1))


class Ported(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = PadsItself(3, 4, 3, bias=False), PadsItself(4, 6, 3, stride=2)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(6)])
        self.pool, self.last = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip((self.first, self.second), self.norms, strict=True):
            x = nn.functional.relu6(norm(layer(x)))
        return self.last(self.pool(x).flatten(1))


@pytest.mark.parametrize("bits", [8, 4])
def test_what_a_module_pads_and_normalizes_by_itself_is_in_integers(tmp_path: Path, bits: int) -> None:
    model, x = Ported(), torch.randn(X) * 3
    for _ in range(3):
        model(x)  # statistics of the normalizations
    activation = QuantSpec(bits, symmetric=False)
    lfq.attach(model.eval(), bits, activation, rules=[Rule("first", activation=8)], example=x, target="onnxruntime")
    found = executed(model, tmp_path, x, optimize_for="speed", optimized_tolerance=0.1)
    assert found["QLinearConv"] == 2
    assert found["QGemm"] == found["QLinearGlobalAveragePool"] == found["QuantizeLinear"] == 1
    assert found["Pad"] == found["BatchNormalization"] == 0


def test_weights_within_half_their_range_leave_room_where_sums_saturate(tmp_path: Path) -> None:
    model, x = Classifier().eval(), torch.randn(X)
    half = QuantSpec(8, quant_min=-63, quant_max=63)
    lfq.attach(model, half, 8, rules=[Rule("head", weight=half)], example=x, target="onnxruntime")
    found = executed(model, tmp_path, x, optimize_for="speed")
    assert (found["QLinearConv"], found["QGemm"]) == (4, 1)
    stored = onnx.load(tmp_path / "m.onnx").graph.initializer
    codes = [onnx.numpy_helper.to_array(kept) for kept in stored if kept.name.endswith("weight_quantizer.codes")]
    assert len(codes) == 5
    assert max(abs(int(end)) for each in codes for end in (each.min(), each.max())) <= 63


class Guarded(nn.Module):
    """Pads before a bound that zeros are beyond, pools before one that has one end, and shows what it has padded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.second(nn.functional.pad(self.first(x), (1, 1, 1, 1)).clamp(0.3, 2.0))
        shown = nn.functional.pad(x, (1, 1, 1, 1))
        x = self.third(nn.functional.pad(self.third(shown)[:, 2:], (1, 1, 1, 1, 2, 0)))  # channels too
        return self.pool(x).clamp(min=0.1) + self.third(self.pool(x).clamp(min=0.1).repeat(1, 1, 3, 3)).mean(), shown


@pytest.mark.parametrize("optimize_for", ["size", "speed"])
def test_bounds_and_paddings_that_must_stay_where_they_are_stay(tmp_path: Path, optimize_for: Any) -> None:
    model, x = Guarded().eval(), torch.randn(X)
    lfq.attach(model, 8, 4, rules=[Rule("first", activation=8)], example=x)
    executed(model, tmp_path, x, optimize_for=optimize_for)


class Levels(nn.Module):
    """One pooling for two levels, each of which is joined with what came from below."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.down = nn.ModuleList(nn.Conv2d(i, 4, 3, padding=1) for i in (3, 4, 4))
        self.join = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = nn.functional.relu6(self.down[0](x))
        second = nn.functional.relu6(self.down[1](self.pool(first)))
        x = nn.functional.relu6(self.down[2](self.pool(second)))
        for join, skip in zip(self.join, (second, first), strict=True):
            x = nn.functional.relu6(join(torch.cat([self.up(x), skip], 1)))
        return self.last(x)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("widest", [1, 20])
def test_a_level_that_is_pooled_and_joined_is_quantized_once_and_in_integers(
    tmp_path: Path, bits: int, widest: float
) -> None:
    model, x = Levels().eval(), torch.randn(X) * widest
    placement = lfq.attach(model, bits, QuantSpec(bits, symmetric=False), example=x, target="onnxruntime")
    assert [operand.label.partition("/")[0] for operand in placement.operands] == ["cat", "cat", "cat_1", "cat_1"]
    found = executed(model, tmp_path, x, optimize_for="speed")
    assert found["QLinearConv"] == 5
    assert found["QLinearConcat"] == found["Resize"] == 2
    assert found["NhwcMaxPool"] + found["MaxPool"] == 2
    assert found["Conv"] + found["FusedConv"] == 1  # the last
    assert found["QuantizeLinear"] == 1  # the input


@pytest.mark.parametrize("rows", [50, 5000])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_a_table_is_looked_up_before_floats_are_made_of_it(tmp_path: Path, rows: int, granularity: Any) -> None:
    for symmetric in (True, False):
        model = nn.Sequential(nn.Embedding(rows, 6), nn.Linear(6, 3))
        spec, words = QuantSpec(8, granularity=granularity, symmetric=symmetric), torch.randint(rows, (4, 7))
        lfq.attach(model, rules=[Rule("0", weight=spec)], example=words)
        lfq.calibrate(model, [words])
        parity = lfq.export_onnx(model, words, tmp_path / "m.onnx")
        assert parity.agrees
        onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
        assert rows == 50 or parity.size < 0.65
        nodes = onnx.load(tmp_path / "m.onnx").graph.node
        lookups = [node for node in nodes if node.op_type == "Gather" and node.input[0] == "0.weight_quantizer.codes"]
        assert len(lookups) == 1
        assert "0.weight_quantizer.codes" not in [n.input[0] for n in nodes if n.op_type == "DequantizeLinear"]


OPENVINO = importlib.util.find_spec("openvino") is not None


@pytest.mark.skipif(not OPENVINO, reason="openvino is not installed")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("network", [Levels, UNet, Ported, Residual])
def test_openvino_computes_all_convolutions_in_integers(tmp_path: Path, network: type[nn.Module], bits: int) -> None:
    model, x = network().eval(), torch.randn(X) * 3
    placement = lfq.attach(model, bits, 8, example=x, target="openvino")
    lfq.calibrate(model, [x])
    lfq.export_onnx(model, x, tmp_path / "m.onnx", optimize_for="speed")
    (row,) = bench([tmp_path / "m.onnx"], runs=1, batch=4, runtime="openvino").rows
    assert row.integer == row.products == len(placement.layers)
    compiled = openvino_of(tmp_path / "m.onnx")
    found = torch.from_numpy(compiled(x.numpy())[0])
    expected = model(x).detach()
    assert (found - expected).square().sum() < 0.01 * expected.square().sum()


def openvino_of(path: Path) -> Any:
    import openvino

    return openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


@pytest.mark.parametrize("target", ["openvino", ("onnxruntime", "openvino")])
def test_what_is_joined_has_one_scale_where_a_runtime_wants_it(target: Any) -> None:
    model, x = UNet(), torch.randn(X)
    lfq.attach(model, example=x, target=target)
    placed = {name: quantizer for name, quantizer in lfq.quantizers(model).items() if "weight" not in name}
    # The input; what is joined, with what is pooled and made larger of it; the last's input.
    assert len(set(map(id, placed.values()))) == 3


def test_several_targets_take_what_holds_for_all(tmp_path: Path) -> None:
    both = target_of(["openvino", "onnxruntime"])
    assert both is not None
    assert both.codes == "unsigned"
    assert both.least_group == 16
    with pytest.raises(ValueError, match=r"`target` 'openvino and onnxruntime' must have integer kernels"):
        lfq.attach(Residual(), 8, QuantSpec(), example=torch.randn(X), target=["openvino", "onnxruntime"])
    assert lfq.attach(Residual(), 8, QuantSpec(), example=torch.randn(X), target="openvino").operands
    for wrong in ((), ["openvino", "tflite"], 3):
        with pytest.raises(ValueError, match=f"`target` must be one of {', '.join(TARGETS)}"):
            lfq.attach(Residual(), example=torch.randn(X), target=wrong)  # type: ignore[arg-type]
    model, x = UNet().eval(), torch.randn(X)
    lfq.attach(model, example=x, target=("onnxruntime", "openvino"))
    assert executed(model, tmp_path, x)["QLinearConv"] == 3


def test_a_table_with_groups_is_exported_as_it_is(tmp_path: Path) -> None:
    model, words = nn.Sequential(nn.Embedding(50, 6), nn.Linear(6, 3)), torch.randint(50, (4, 7))
    groups = QuantSpec(8, granularity="per_group", group_size=2)
    lfq.attach(model, rules=[Rule("0", weight=groups)], example=words)
    executed(model, tmp_path, words)


class Tokens(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 48, bias), nn.Linear(48, 32, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


GROUPS = QuantSpec(4, granularity="per_group", group_size=32)


@pytest.mark.parametrize(("shape", "bias"), [((5, 64), True), ((5, 64), False), ((2, 5, 64), True)])
@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(4, granularity="per_tensor"), GROUPS, GROUPS.replace(bits=8)])
def test_matrices_that_meet_floats_are_multiplied_as_they_are_stored(
    tmp_path: Path, spec: QuantSpec, shape: tuple[int, ...], bias: bool
) -> None:
    model, x = Tokens(bias), torch.randn(shape)
    lfq.attach(model, weight=spec, activation=None, example=x, target="onnxruntime")
    found = executed(model, tmp_path, x)
    assert found["MatMulNBits"] == 2, found
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    exact = onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    (y,) = exact.run(None, {exact.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model.eval()(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 64), (2, 5, 64)])
def test_products_whose_result_is_float_are_integers_without_rounding_their_bias(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    model, x = Tokens(bias=True), torch.randn(shape)
    lfq.attach(model, 8, 8, example=x, target="onnxruntime")
    found = executed(model, tmp_path, x)
    assert found["QGemm"] + found["MatMulIntegerToFloat"] == 2, found
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        model.first.bias.add_(1e-6), model.last.bias.add_(1e-6)  # less than a step of any accumulator
        assert (model.eval()(x) - torch.from_numpy(y)).abs().max() < 1e-4


def test_a_rule_decides_before_the_target() -> None:
    model, x = Residual(), torch.randn(X)
    placement = lfq.attach(model, example=x, target="onnxruntime", rules=[Rule("/add", activation=None)])
    assert placement.operands == ()


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"weight": QuantSpec(symmetric=False)}, "symmetric=True"),
        ({"weight": 12}, "at most 8 bits"),
        ({"weight": QuantSpec(8, signed=False)}, "leave `signed` out"),
        ({"weight": QuantSpec(4, granularity="per_group", group_size=16)}, "activation=None"),
        ({"weight": QuantSpec(4, granularity="per_group", group_size=4), "activation": None}, "group_size of 16"),
        ({"weight": QuantSpec(4, granularity="per_group", group_size=24), "activation": None}, "group_size of 16"),
        ({"activation": QuantSpec()}, "symmetric=False"),
        ({"activation": 16}, "at most 8 bits"),
        ({"activation": QuantSpec(symmetric=False, granularity="per_channel")}, "granularity='per_tensor'"),
    ],
)
def test_what_the_target_computes_in_float_is_refused_with_the_remedy(given: dict[str, object], remedy: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=rf"must have integer kernels for what is quantized\. .*for '0'.*{remedy}"):
        lfq.attach(model, **given, example=torch.randn(2, 4), target="onnxruntime")  # type: ignore[arg-type]
    assert lfq.quantizers(model) == {}


def test_a_target_needs_a_batch_and_a_known_name() -> None:
    with pytest.raises(
        ValueError, match=r"must know the operations of a batch\. Found 'onnxruntime' without `example`"
    ):
        lfq.attach(Residual(), target="onnxruntime")
    with pytest.raises(ValueError, match=rf"`target` must be one of {', '.join(TARGETS)}\. Found 'tflite'"):
        lfq.attach(Residual(), target="tflite", example=torch.randn(X))
    with pytest.raises(ValueError, match="`target` must be one of onnxruntime, openvino, tensorrt"):
        lfq.QuantizationAwareTraining(target="tflite")
    with pytest.raises(ValueError, match="Found 'onnxruntime' with example=False"):
        lfq.QuantizationAwareTraining(target="onnxruntime", example=False)


@pytest.mark.filterwarnings("ignore")
def test_a_fit_for_a_target_ends_in_a_file_of_integers(tmp_path: Path) -> None:
    callback = lfq.QuantizationAwareTraining(weight=4, target="onnxruntime", export=tmp_path / "m.onnx")
    trainer = L.Trainer(
        max_epochs=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        accelerator="cpu",
    )
    model, data = Module(), DataLoader(TensorDataset(torch.randn(16, *X[1:])), 4)
    trainer.fit(model, data)
    assert callback.parity is not None
    assert callback.parity.agrees
    assert callback.placement is not None
    assert [operand.label for operand in callback.placement.operands] == ["net/add/input", "net/add/other"]
    assert callback.parity.in_float == ("net.last.weight_quantizer",)  # optimized for speed, as it has a target
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node)
    assert kinds["QuantizeLinear"] == 5  # the input, the stem's output, conv1's, conv2's and the sum's
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    [before] = trainer.test(model, data, verbose=False)
    assert before == trainer.test(model, data, tmp_path / "last.ckpt", verbose=False)[0]
    other = lfq.QuantizationAwareTraining(weight=4, target="onnxruntime")
    fresh = L.Trainer(callbacks=[other], logger=False, enable_progress_bar=False, accelerator="cpu")
    assert before == fresh.test(Module(), data, tmp_path / "last.ckpt", verbose=False)[0]
    assert before == fresh.test(model, data, verbose=False)[0]
    assert other.placement is not None
    assert [operand.label for operand in other.placement.operands] == ["net/add/input", "net/add/other"]
    with pytest.raises(ValueError, match="is already quantized as"):
        wrong = lfq.QuantizationAwareTraining(weight=3, target="onnxruntime")
        L.Trainer(callbacks=[wrong], logger=False, accelerator="cpu").test(model, data, verbose=False)
