"""A program of a network that is quantized for a runtime is what that runtime computes in integers, and rightly."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils.data import DataLoader, TensorDataset

import lfq_lightning as lfq
from lfq_lightning import QuantSpec, Rule
from lfq_lightning.targets import target_of
from tests.assertions import assert_bit_equal
from tests.target_networks import Module, Residual, UNet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

Runtime = Literal["executorch", "x86", "litert"]
RUNTIMES: tuple[Runtime, ...] = ("executorch", "x86", "litert")
X = (4, 3, 8, 8)
# Within half their range 8-bit products leave room where processors saturate sums of two.
HALF = QuantSpec(8, granularity="per_channel", quant_min=-63, quant_max=63)


class Shortcut(nn.Module):
    """Depthwise layers, an activation that no runtime here has, and a sum of two products; ends in a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, bias=False, padding=1), nn.BatchNorm2d(8), nn.ReLU6())
        self.point = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.shortcut = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.point(self.deep(x)) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


class LeNet(nn.Module):
    """A pooling and a flattening between a convolution and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(torch.relu(self.second(torch.relu(self.first(x))))).flatten(1))


class Encoder(nn.Module):
    """Attention and normalizations in float between matrices in integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 16), nn.Linear(16, 4)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens)))


class Volume(nn.Module):
    """A layer that no runtime of programs has, and one that they have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv3d(3, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.first(x)).mean((2, 3, 4)))


NETWORKS = [Residual, Shortcut, UNet, LeNet]


def quantized(kind: type[nn.Module], target: Any, **given: Any) -> tuple[nn.Module, Tensor]:
    """A calibrated network, whose normalizations have seen data, and an input."""
    torch.manual_seed(0)
    model, x = kind(), torch.randint(20, (4, 6)) if kind is Encoder else torch.randn(X)
    model(x), model(x)
    weight = given.pop("weight", HALF)
    rules = [Rule("*", weight=weight)] if weight is HALF else []  # the first and the last layer too
    lfq.attach(model.eval(), weight, rules=given.pop("rules", rules), example=x, target=target, **given)
    lfq.calibrate(model, [x])
    return model.eval(), x


def nodes(program: ExportedProgram, *kinds: str) -> list[Node]:
    """The operations of these kinds, by the end of their names."""
    every = [node for node in program.graph.nodes if node.op == "call_function"]
    return [node for node in every if getattr(node.target, "__name__", "").partition(".")[0] in kinds]


PRODUCTS = "conv2d", "linear"


def result_of(node: Node) -> list[str]:
    """What reads a node's result, clipped or not."""
    readers = list(node.users)
    if len(readers) == 1 and str(readers[0].target).partition(".")[2].partition(".")[0] in ("relu", "hardtanh"):
        return result_of(readers[0])
    return [str(reader.target).partition(".")[2].partition(".")[0] for reader in readers]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("target", RUNTIMES)
def test_a_program_that_is_arranged_for_a_runtime_computes_the_same(target: Runtime, kind: type[nn.Module]) -> None:
    model, x = quantized(kind, target)
    program = lfq.export_pt2(model, x, target=target)
    plain = lfq.export_pt2(model, x, fold=True)
    assert_bit_equal(program.module()(x), plain.module()(x))
    assert all(len(node.users) == 1 for node in nodes(program, "dequantize_per_tensor"))
    pairs = [node.args for node in nodes(program, "quantize_per_tensor")]
    assert len(pairs) == len(set(pairs))  # each tensor once by each quantizer
    kinds = {node.args[-1] for node in nodes(program, "quantize_per_tensor")}
    assert kinds <= ({torch.uint8} if target == "x86" else {torch.int8})
    assert len(nodes(program, *PRODUCTS)) == len(nodes(plain, *PRODUCTS))


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("target", ["executorch", "litert"])
def test_every_layer_has_a_quantized_result_that_one_quantizer_alone_reads(
    target: Runtime, kind: type[nn.Module]
) -> None:
    model, x = quantized(kind, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that a layer is in float
        program = lfq.export_pt2(model, x, target=target)
    for layer in nodes(program, *PRODUCTS):
        assert result_of(layer) == ["quantize_per_tensor"], layer
        assert str(cast(Node, layer.args[0]).target).endswith("dequantize_per_tensor.default")


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("target", RUNTIMES)
def test_what_chooses_among_values_has_the_same_quantizer_on_both_sides(target: Runtime, kind: type[nn.Module]) -> None:
    model, x = quantized(kind, target)
    program = lfq.export_pt2(model, x, target=target)
    found = nodes(program, "max_pool2d", "view", "flatten") + (nodes(program, "cat") if target != "x86" else [])
    for node in found:
        given = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
        (reader,) = node.users
        before = [cast(Node, each) for each in given]
        before = [cast(Node, each.args[0]) if "clone" in str(each.target) else each for each in before]
        assert {each.args[1:] for each in before} == {reader.args[1:]}, node
    assert kind is not LeNet or len(found) == 2
    assert len(nodes(program, "clone")) == len(nodes(program, "view", "flatten")) * (target == "x86")


@pytest.mark.parametrize("target", RUNTIMES)
def test_a_mean_over_all_pixels_is_a_pooling(target: Runtime) -> None:
    model, x = quantized(Shortcut, target)
    (mean,) = nodes(lfq.export_pt2(model, x, target=target), "mean")
    assert list(mean.args[1:]) == [[2, 3], True]
    assert result_of(mean) == ["quantize_per_tensor"]
    assert cast(Node, mean.args[0]).target is torch.ops.quantized_decomposed.dequantize_per_tensor.default


@pytest.mark.parametrize(("target", "bare"), [("executorch", 0), ("litert", 0), ("x86", 1), ("tensorrt", 1)])
@pytest.mark.parametrize("kind", [Residual, Shortcut])
def test_of_a_sum_a_product_is_bare_where_a_runtime_adds_within_it(
    kind: type[nn.Module], target: str, bare: int
) -> None:
    torch.manual_seed(0)
    placement = lfq.attach(kind(), example=torch.randn(X), target=target)
    operands = [operand.label for operand in placement.operands if operand.label.startswith("add/")]
    assert len(operands) == 2 - bare
    if bare:  # the product that was computed last, to which the other is added
        assert operands == ["add/input"]


def test_a_clipped_product_or_one_that_others_read_is_no_part_of_a_sum() -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = (nn.Conv2d(3, 3, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(x)
            return self.last(torch.relu(self.first(x)) + y) + self.last(y)

    placement = lfq.attach(Clipped(), example=torch.randn(X), target="x86")
    assert [operand.label for operand in placement.operands] == ["add/input", "add/other"]


def test_what_is_normalized_after_it_was_clipped_is_no_product_any_more() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.norm = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x + self.norm(torch.relu(self.first(x))))

    placement = lfq.attach(Normed(), example=torch.randn(X), target="x86")
    assert [operand.label for operand in placement.operands] == ["add/input", "add/other"]
    placement = lfq.attach(Normed(), example=torch.randn(X), target="executorch")
    results = [operand.label for operand in placement.operands if operand.role == "output"]
    assert results == ["first output", "last output"]


def test_results_are_quantized_where_a_network_ends_and_before_what_is_in_float() -> None:
    def results(target: str, kind: type[nn.Module] = Shortcut) -> list[str]:
        example = {Encoder: torch.randint(20, (4, 6)), Volume: torch.randn(4, 3, 5, 5, 5)}.get(kind, torch.randn(X))
        placement = lfq.attach(kind(), 4, 8, example=example, target=target)
        return [operand.label for operand in placement.operands if operand.role == "output"]

    assert results("executorch") == ["stem.1 output", "head output"]  # behind the normalization, which is folded
    assert results("executorch", LeNet) == ["head output"]
    assert results("executorch", UNet) == ["deep output", "last output"]  # the interpolation is in float
    assert results("litert", UNet) == ["last output"]
    assert len(results("executorch", Encoder)) > 1
    assert results("executorch", Volume) == ["head output"]
    assert results("x86") == results("onnxruntime") == results("tensorrt") == []


def test_a_rule_decides_about_a_result_before_the_target() -> None:
    rules = [Rule("head", output=None), Rule("stem.1", output=QuantSpec(8, symmetric=True))]
    placement = lfq.attach(Shortcut(), example=torch.randn(X), target="executorch", rules=rules)
    found = {operand.label: operand.spec for operand in placement.operands if operand.role == "output"}
    assert found == {"stem.1 output": QuantSpec(8)}
    with pytest.raises(ValueError, match=r"for 'stem\.1 output', which it computes in float: use symmetric=False"):
        lfq.attach(Shortcut(), example=torch.randn(X), target="x86", rules=rules)


def test_layers_without_a_quantized_result_are_written_in_float_for_executorch_and_named() -> None:
    model, x = quantized(Residual, None, weight=8)
    with pytest.warns(UserWarning, match=r"Found stem, conv2, last, which the program holds in float: train with"):
        program = lfq.export_pt2(model, x, target="executorch")
    assert_bit_equal(program.module()(x), lfq.export_pt2(model, x, fold=True).module()(x))
    weights = [str(cast(Node, node.args[1]).target) for node in nodes(program, *PRODUCTS)]
    assert [weight.startswith("quantized_decomposed") for weight in weights] == [False, True, False, False]
    names = {node.name for node in program.graph.nodes}
    assert not any("stem_weight_quantizer_codes" in name for name in names)


def test_a_packed_projection_of_which_parts_are_read_is_in_float_for_executorch() -> None:
    model, x = quantized(Encoder, "executorch")
    with pytest.warns(UserWarning, match=r"Found layer\.self_attn\.in_proj_weight, which the program holds in float"):
        program = lfq.export_pt2(model, x, target="executorch")
    in_float = [node for node in nodes(program, "linear") if cast(Node, node.args[1]).op == "placeholder"]
    assert len(in_float) == 1
    assert len(nodes(program, "linear")) == 5


@pytest.mark.parametrize("target", [None, "x86", "executorch"])
def test_a_file_holds_codes_and_not_the_floats_that_they_stand_for(tmp_path: Path, target: Any) -> None:
    model, x = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300)), torch.randn(2, 300)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "float.pt2")
    lfq.attach(model, 8, 8, example=x, target=target)
    lfq.calibrate(model, [x])
    lfq.export_pt2(model, x, tmp_path / "m.pt2", target=target)
    assert (tmp_path / "m.pt2").stat().st_size < 0.35 * (tmp_path / "float.pt2").stat().st_size
    assert_bit_equal(torch.export.load(tmp_path / "m.pt2").module()(x), lfq.export_pt2(model, x).module()(x))


@pytest.mark.parametrize("spec", [8, QuantSpec(8), QuantSpec(4, symmetric=False, granularity="per_channel")])
def test_rows_of_a_table_are_looked_up_as_codes_for_executorch(spec: Any) -> None:
    model, tokens = nn.Sequential(nn.Embedding(30, 6), nn.Linear(6, 3)), torch.randint(30, (4, 7))
    lfq.attach(model, rules=[Rule("0", weight=spec)], example=tokens)
    lfq.calibrate(model, [tokens])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the matrix is in float
        program = lfq.export_pt2(model, tokens, target="executorch")
    assert_bit_equal(program.module()(tokens), lfq.export_pt2(model, tokens).module()(tokens))
    (lookup,) = nodes(program, "embedding")
    assert program.state_dict["0.weight_quantizer.codes"].dtype in (torch.int8, torch.uint8)
    assert cast(Node, lookup.args[0]).meta["val"].dtype in (torch.int8, torch.uint8)


def test_weights_are_floats_with_quantizers_for_litert() -> None:
    model, x = quantized(Residual, "litert")
    program = lfq.export_pt2(model, x, target="litert")
    for layer in nodes(program, *PRODUCTS):
        weight = cast(Node, layer.args[1])
        codes = cast(Node, weight.args[0])
        assert str(codes.target).endswith("quantize_per_channel.default")
        assert cast(Node, codes.args[0]).op == "placeholder"
        assert codes.args[1:] == weight.args[1:]


@pytest.mark.parametrize(
    ("target", "given", "remedy"),
    [
        ("executorch", {"activation": 4, "rules": [Rule("*", activation=4)]}, "8 bits and all their codes"),
        ("x86", {"activation": QuantSpec(8, symmetric=False, quant_min=0, quant_max=127)}, "all their codes"),
        ("x86", {"activation": QuantSpec(8)}, "symmetric=False"),
        ("tensorrt", {"activation": QuantSpec(8, symmetric=False)}, "symmetric=True and signed=True"),
        ("tensorrt", {"activation": QuantSpec(8, signed=False)}, "symmetric=True and signed=True"),
        ("litert", {"weight": QuantSpec(4, granularity="per_group", group_size=2), "activation": None}, "per_channel"),
    ],
)
def test_what_a_runtime_has_no_kernels_for_is_refused(target: str, given: dict[str, Any], remedy: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=rf"`target` '{target}' must have integer kernels.*{remedy}"):
        lfq.attach(model, **{"weight": 8, **given}, example=torch.randn(2, 4), target=target)
    assert lfq.quantizers(model) == {}


def test_codes_that_were_left_open_are_centred_for_tensorrt() -> None:
    for given in (8, QuantSpec(8), {"bits": 8}):
        model = Residual()
        lfq.attach(
            model, activation=given, rules=[Rule("conv1", activation=8)], example=torch.randn(X), target="tensorrt"
        )
        activations = [q for name, q in lfq.quantizers(model).items() if "weight" not in name]
        assert {q.spec for q in activations} == {QuantSpec(8, signed=True)}
    assert {q.spec.symmetric for q in quantizers_of("onnxruntime")} == {False}


def quantizers_of(target: str) -> list[Any]:
    model = Residual()
    lfq.attach(model, activation=8, example=torch.randn(X), target=target)
    return [q for name, q in lfq.quantizers(model).items() if "weight" not in name]


def test_targets_that_no_one_network_serves_are_refused() -> None:
    with pytest.raises(ValueError, match=r"whose codes of activations differ \(unsigned and centred\): train for one"):
        target_of(["onnxruntime", "tensorrt"])
    with pytest.raises(ValueError, match=r"whose operands of additions differ \(operands and fused\)"):
        lfq.QuantizationAwareTraining(target=["onnxruntime", "x86"])
    both = target_of(["openvino", "executorch", "onnxruntime"])
    assert both is not None
    assert (both.codes, both.sums, "conv2d" in both.results, both.least_group) == ("unsigned", "operands", True, None)
    four = target_of(["tensorrt", "openvino"])
    assert four is not None
    assert (four.codes, four.sums, four.least_bits) == ("centred", "fused", 8)


def test_export_checks_its_target() -> None:
    model, x = quantized(LeNet, "x86")
    with pytest.raises(ValueError, match=r"`target` must be one of executorch, x86, litert\. Found 'onnxruntime'"):
        lfq.export_pt2(model, x, target="onnxruntime")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"takes unsigned codes of inputs\. Found signed=True"):
        lfq.export_pt2(model, x, target="x86", signed=True)


class Twice(nn.Module):
    """Changes in place what it has given to another layer before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        turned = y.transpose(2, 3)
        z = self.second(turned)
        y.neg_()
        return self.third(turned) + z


@pytest.mark.parametrize("target", RUNTIMES)
def test_a_tensor_that_is_changed_in_place_is_two(target: Runtime) -> None:
    model, x = quantized(Twice, target)
    with torch.no_grad():  # quantizers that are alike, of the two
        for qparam in ("scale", "zero_point"):
            getattr(model.third.input_quantizer, qparam).copy_(getattr(model.second.input_quantizer, qparam))  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        program = lfq.export_pt2(model, x, target=target)
    assert_bit_equal(program.module()(x), lfq.export_pt2(model, x, fold=True).module()(x))


class AddsInPlace(nn.Module):
    """As residual networks are mostly written."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.last = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.relu(self.stem(x))
        x = self.conv(shortcut)
        x += shortcut
        return self.last(self.relu(x))


@pytest.mark.parametrize("target", RUNTIMES)
def test_a_sum_in_place_is_one_in_integers(target: Runtime) -> None:
    model, x = quantized(AddsInPlace, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that a layer is in float
        program = lfq.export_pt2(model, x, target=target)
    assert_bit_equal(program.module()(x), lfq.export_pt2(model, x, fold=True).module()(x))
    assert not nodes(program, "clone", "copy", "copy_", "add_", "relu_")
    (total,) = nodes(program, "add")
    assert result_of(total) == ["quantize_per_tensor"]
    read = [str(cast(Node, operand).target) for operand in total.args]
    assert sum("dequantize" in name for name in read) == (1 if target == "x86" else 2)


class Shown(nn.Module):
    """A pooling that a layer reads, and that is shown as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pool, self.last = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.pool(torch.relu(self.first(x)))
        return self.last(pooled), pooled


@pytest.mark.parametrize("target", RUNTIMES)
def test_what_is_read_in_float_too_is_chosen_among_floats(target: Runtime) -> None:
    model, x = quantized(Shown, target, rules=[Rule("pool", output=None), Rule("*", weight=HALF, output=None)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        program = lfq.export_pt2(model, x, target=target)
    for found, expected in zip(program.module()(x), lfq.export_pt2(model, x, fold=True).module()(x), strict=True):
        assert_bit_equal(found, expected)


def test_the_batch_may_vary(tmp_path: Path) -> None:
    model, x = quantized(Shortcut, "executorch")
    lfq.export_pt2(model, x, tmp_path / "m.pt2", target="executorch", dynamic_shapes={"x": {0: torch.export.Dim("n")}})
    program = torch.export.load(tmp_path / "m.pt2")
    assert_bit_equal(program.module()(x[:2]), lfq.export_pt2(model, x[:2], fold=True).module()(x[:2]))


@pytest.mark.filterwarnings("ignore")
def test_a_fit_for_a_runtime_that_takes_programs_ends_in_one(tmp_path: Path) -> None:
    callback = lfq.QuantizationAwareTraining(4, 8, target=("executorch", "openvino"), export=tmp_path / "a" / "m.pt2")
    trainer = L.Trainer(
        max_epochs=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        accelerator="cpu",
    )
    model = Module()
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(16, *X[1:])), 4))
    program = torch.export.load(tmp_path / "a" / "m.pt2")
    x = torch.randn(X)
    torch.testing.assert_close(program.module()(x), model.eval()(x).detach(), rtol=0, atol=0.02)
    assert all(result_of(layer) == ["quantize_per_tensor"] for layer in nodes(program, *PRODUCTS))
    assert callback.parity is None


def test_what_a_fit_is_to_write_is_checked_before_it() -> None:
    with pytest.raises(TypeError, match="`export` must be a path"):
        lfq.QuantizationAwareTraining(export={"path": 3})
    with pytest.raises(ValueError, match=r"`export` must hold `path`, and may hold dynamic_shapes, fold, signed"):
        lfq.QuantizationAwareTraining(export={"path": "m.pt2", "opset": 21})
    with pytest.raises(ValueError, match="of which executorch and litert take programs: name one, as in export="):
        lfq.QuantizationAwareTraining(target=("executorch", "litert"), export="m.pt2")
    lfq.QuantizationAwareTraining(target=("executorch", "litert"), export={"path": "m.pt2", "target": "litert"})


def with_negative_factors(bits: int, target: Any) -> tuple[nn.Module, Tensor]:
    """A network of which a normalization turns weights over that have the lowest code."""
    torch.manual_seed(0)
    model, x = Residual(), torch.randn(X)
    with torch.no_grad():
        model.norm.weight[::2] = -0.7
    model(x), model(x)
    lfq.attach(model.eval(), bits, 8, rules=[Rule("stem", weight=bits)], example=x, target=target)
    lfq.calibrate(model, [x])
    quantizer: Any = model.stem.weight_quantizer
    with torch.no_grad():
        model.stem.weight[::2, 0, 0, 0] = quantizer.code_range[0] * quantizer.scale[::2]
    return model.eval(), x


@pytest.mark.parametrize(("bits", "lowest"), [(8, -127), (4, -8)])
@pytest.mark.parametrize("target", RUNTIMES)
def test_a_normalization_that_turns_weights_over_goes_into_them(target: Runtime, bits: int, lowest: int) -> None:
    model, x = with_negative_factors(bits, target)
    program = lfq.export_pt2(model, x, target=target)
    torch.testing.assert_close(program.module()(x), model(x).detach(), rtol=0, atol=1e-2)
    assert not nodes(program, "batch_norm", "_native_batch_norm_legit_no_training")
    stored = {name: value for name, value in program.state_dict.items() if "stem.weight_quantizer" in name}
    assert not any(value.any() for name, value in stored.items() if "zero_point" in name)
    if target != "litert":  # which has the floats
        assert stored["stem.weight_quantizer.codes"].max() == -lowest


@pytest.mark.parametrize("target", [None, "x86", "executorch"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # that a layer is in float
def test_where_it_finds_no_room_in_them_it_stays(target: Any) -> None:
    model, x = with_negative_factors(8, None)
    program = lfq.export_pt2(model, x, fold=True, target=target)
    torch.testing.assert_close(program.module()(x), model(x).detach(), rtol=0, atol=1e-2)
    names = {str(node.target) for node in program.graph.nodes}
    assert sum("batch_norm" in name for name in names) == 1
    assert not any(
        value.any() for name, value in program.state_dict.items() if name.endswith("weight_quantizer.zero_point")
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_a_file_for_tensorrt_has_weights_whose_zero_point_is_0(tmp_path: Path, bits: int) -> None:
    model, x = with_negative_factors(bits, "tensorrt")
    assert lfq.export_onnx(model, x, tmp_path / "m.onnx", optimize_for="speed").agrees
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}
    zero_points = {node.input[2] for node in graph.node if node.op_type == "DequantizeLinear" and len(node.input) > 2}
    stored = {kept.name: onnx.numpy_helper.to_array(kept) for kept in graph.initializer}
    assert not any(stored[name].any() for name in zero_points)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_file_for_tensorrt_has_what_it_reads(tmp_path: Path, kind: type[nn.Module]) -> None:
    model, x = quantized(kind, "tensorrt", weight=8)
    assert lfq.export_onnx(model, x, tmp_path / "m.onnx", optimize_for="speed").agrees
    graph = onnx.load(tmp_path / "m.onnx").graph
    stored = {kept.name: onnx.numpy_helper.to_array(kept) for kept in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero_point = (stored[name] for name in node.input[1:3])
            assert zero_point.dtype == np.int8
            assert not zero_point.any()
            assert (scale > 0).all()
            assert scale.size == 1 or node.input[0] in stored  # channels of weights alone
        if node.op_type == "Add":  # one product and one that is quantized
            assert sorted(makers[name].op_type for name in node.input) == ["Conv", "DequantizeLinear"]
        if node.op_type in ("Conv", "Gemm"):
            assert [makers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
            assert node.op_type == "Gemm" or stored[node.input[2]].dtype == np.float32


# ---- in the runtimes themselves --------------------------------------------------------------------------------------


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "series": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 3)), (2, 3, 16)),
    "series, larger": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.ConvTranspose1d(4, 4, 3, 2)), (2, 3, 8)),
    "same": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.Sigmoid(), nn.Conv2d(4, 4, 1)), X),
    "larger": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3, 2)), X),
    "larger by groups": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3, 2, groups=2)), X),
    "clipped otherwise": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(), nn.Conv2d(4, 4, 3)), X),
    "windows": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1)), X),
    "reflected": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 3)), X),
}


def of_kind(kind: str, trained_for: str | None) -> tuple[nn.Module, Tensor, ExportedProgram]:
    """A calibrated network of layers of one kind, an input, and the program."""
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    model(x), model(x)
    lfq.attach(model.eval(), 8, 8, example=x, target=trained_for)
    lfq.calibrate(model, [x])
    return model.eval(), x, lfq.export_pt2(model, x, target="executorch")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained_for", ["executorch", None])
@pytest.mark.filterwarnings("ignore::UserWarning")  # that a layer is in float
def test_layers_of_every_kind_are_arranged_to_compute_the_same(kind: str, trained_for: str | None) -> None:
    model, x, program = of_kind(kind, trained_for)
    assert_bit_equal(program.module()(x), lfq.export_pt2(model, x, fold=True).module()(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained_for", ["executorch", None])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_xnnpack_computes_layers_of_every_kind(tmp_path: Path, kind: str, trained_for: str | None) -> None:
    pytest.importorskip("executorch.exir")
    model, x, program = of_kind(kind, trained_for)
    assert_within_a_step(by_xnnpack(program, tmp_path / "m.pte", x)[0], model(x).detach())


def assert_within_a_step(found: Tensor, expected: Tensor, share: float = 0.01) -> None:
    """Equal but for sums in another order, by which a code here and there is the next."""
    assert (found - expected).square().sum() <= share**2 * expected.square().sum()


def by_xnnpack(program: ExportedProgram, path: Path, x: Tensor) -> tuple[Tensor, Counter[str]]:
    """The output, and the operations that were left to ExecuTorch's portable kernels."""
    import executorch.kernels.quantized  # noqa: F401
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime as Executor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(edge.to_executorch().buffer)
    [output] = Executor.get().load_program(path).load_method("forward").execute([x])
    return output, Counter(str(getattr(n.target, "__name__", "")) for n in edge.exported_program().graph.nodes)


@pytest.mark.parametrize("kind", [*NETWORKS, Encoder])
@pytest.mark.parametrize("trained_for", ["executorch", None])
def test_xnnpack_computes_what_the_model_does(tmp_path: Path, kind: type[nn.Module], trained_for: str | None) -> None:
    pytest.importorskip("executorch.exir")
    model, x = quantized(kind, trained_for, weight=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = lfq.export_pt2(model, x, target="executorch")
    output, left = by_xnnpack(program, tmp_path / "m.pte", x)
    assert_within_a_step(output, model(x).detach())
    assert left["aten.convolution.default"] + left["aten.addmm.default"] + left["aten.linear.default"] == 0


@pytest.mark.parametrize("kind", NETWORKS)
def test_torchao_lowers_every_layer_and_the_sum_to_integer_kernels(kind: type[nn.Module]) -> None:
    pytest.importorskip("torchao")
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

    model, x = quantized(kind, "x86")
    program = lfq.export_pt2(model, x, target="x86")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lowered = lower_pt2e_quantized_to_x86(program.module(), (x,))
        kernels = Counter(str(n.target) for n in lowered.graph.nodes if "onednn.q" in str(n.target))
        assert sum(kernels.values()) == len(nodes(program, *PRODUCTS))
        assert sum(count for name, count in kernels.items() if "binary" in name) == int(kind in (Residual, Shortcut))
        assert_within_a_step(lowered(x), model(x))


def codes_of(values: Tensor, details: dict[str, Any]) -> Tensor:
    """What a file's input takes: the converter leaves the first quantizer to whoever calls it."""
    scale, zero_point = details["quantization"]
    return ((values / scale).round() + zero_point).clamp(-128, 127).to(torch.int8)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.filterwarnings("ignore")  # the converter's
def test_litert_computes_every_layer_and_operation_in_integers(tmp_path: Path, kind: type[nn.Module]) -> None:
    converter = pytest.importorskip("litert_torch")
    from ai_edge_litert.interpreter import Interpreter
    from litert_torch.quantize import pt2e_quantizer, quant_config

    model, x = quantized(kind, "litert", weight=8)
    quantizer = pt2e_quantizer.PT2EQuantizer()  # which finds nothing to do, and says that there are integers
    quantizer.set_global(pt2e_quantizer.get_symmetric_quantization_config(is_per_channel=True))
    config = quant_config.QuantConfig(pt2e_quantizer=quantizer)
    program = lfq.export_pt2(model, x, target="litert")
    converter.convert(program.module(), (x,), quant_config=config).export(str(tmp_path / "m.tflite"))
    interpreter = Interpreter(str(tmp_path / "m.tflite"))
    interpreter.allocate_tensors()
    types = {each["index"]: each["dtype"] for each in interpreter.get_tensor_details()}
    done = [each for each in interpreter._get_ops_details() if each["op_name"] not in ("LOGISTIC", "MUL", "DELEGATE")]
    layers = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "ADD", "CONCATENATION", "MAX_POOL_2D", "MEAN")
    computed = [each for each in done if each["op_name"] in layers]
    assert len(computed) >= len(nodes(program, *PRODUCTS, "add", "cat", "max_pool2d", "mean"))
    assert all(types[each[end][0]] is np.int8 for each in computed for end in ("inputs", "outputs"))
    [given], [gives] = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.set_tensor(given["index"], codes_of(x, given).numpy())
    interpreter.invoke()
    scale, zero_point = gives["quantization"]
    found = (torch.as_tensor(interpreter.get_tensor(gives["index"])).float() - zero_point) * scale
    assert_within_a_step(found, model(x).detach())
