"""BatchNorm is folded where it takes a layer's outputs alone, and is left as it is everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.export.fold import fold_batch_norm
from lfq_lightning.export.integers import integer_copy

pytestmark = [pytest.mark.quick, pytest.mark.filterwarnings("ignore")]  # torch's exporter, about itself


class Normed(nn.Module):
    """A layer, a BatchNorm with a negative, a zero and positive factors, and how the two are used."""

    def __init__(self, layer: nn.Module, norm: nn.Module, use: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.norm, self.use = layer, norm, use
        with torch.no_grad():
            norm.weight.uniform_(0.5, 2)
            norm.weight[0], norm.weight[1] = -0.7, 0.0
            norm.bias.normal_()
            if norm.running_mean is not None:
                norm.running_mean.normal_(std=0.2)
                norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def in_a_row(model: Any, x: Tensor) -> Tensor:
    return model.norm(model.layer(x))


def returned_too(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = model.layer(x)
    return model.norm(y), y


def used_twice(model: Any, x: Tensor) -> Tensor:
    return model.norm(model.layer(x)) + model.layer(x + 1)


def images() -> Tensor:
    return torch.randn(6, 4, 7, 7)


def calibrated(model: nn.Module, x: Tensor, weight: Any = 8, rules: Any = ()) -> nn.Module:
    lfq.attach(model, weight, 8, rules=rules)
    lfq.calibrate(model, [x])
    return model.eval()


class Standardized(nn.Conv2d):
    """Uses its weight in another way, so that a factor of the weight is none of the output."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Activated(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


def doubled() -> nn.Module:
    layer = nn.Conv2d(4, 5, 3)
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


def read_through_a_property(model: Any, x: Tensor) -> Tensor:
    y = model.layer(x)
    return model.norm(y) + y.mT


def changed_in_place(model: Any, x: Tensor) -> Tensor:
    return model.norm(model.layer(x).relu_())


FOLDED: dict[str, Any] = {
    "convolution": (lambda: nn.Conv2d(4, 5, 3), lambda: nn.BatchNorm2d(5), images),
    "without bias": (lambda: nn.Conv2d(4, 5, 3, bias=False), lambda: nn.BatchNorm2d(5), images),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), lambda: nn.BatchNorm2d(8), images),
    "transposed": (lambda: nn.ConvTranspose2d(4, 5, 3), lambda: nn.BatchNorm2d(5), images),
    "signal": (lambda: nn.Conv1d(4, 5, 3), lambda: nn.BatchNorm1d(5), lambda: torch.randn(6, 4, 9)),
    "linear": (lambda: nn.Linear(4, 5), lambda: nn.BatchNorm1d(5), lambda: torch.randn(6, 4)),
}
LEFT: dict[str, Any] = {
    "its input is an output": (lambda: nn.Conv2d(4, 5, 3), lambda: nn.BatchNorm2d(5), returned_too, images),
    "its layer is used twice": (lambda: nn.Conv2d(4, 5, 3), lambda: nn.BatchNorm2d(5), used_twice, images),
    "statistics of each batch": (
        lambda: nn.Conv2d(4, 5, 3),
        lambda: nn.BatchNorm2d(5, track_running_stats=False),
        in_a_row,
        images,
    ),
    "features last": (
        lambda: nn.Linear(4, 5),
        lambda: nn.BatchNorm1d(5),
        in_a_row,
        lambda: torch.randn(6, 5, 4),
    ),
    "embedding": (
        lambda: nn.Embedding(5, 5),
        lambda: nn.BatchNorm1d(5),
        in_a_row,
        lambda: torch.randint(5, (6,)),
    ),
    "a subclass of the layer": (lambda: Standardized(4, 5, 3), lambda: nn.BatchNorm2d(5), in_a_row, images),
    "a hook changes the output": (doubled, lambda: nn.BatchNorm2d(5), in_a_row, images),
    "read through a property": (lambda: nn.Conv2d(4, 5, 3), lambda: nn.BatchNorm2d(5), read_through_a_property, images),
    "changed in place": (lambda: nn.Conv2d(4, 5, 3), lambda: nn.BatchNorm2d(5), changed_in_place, images),
    "grouped and transposed": (
        lambda: nn.ConvTranspose2d(4, 4, 3, groups=2),
        lambda: nn.BatchNorm2d(4),
        in_a_row,
        images,
    ),
}


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("case", FOLDED)
def test_it_is_folded_with_negative_and_zero_factors(case: str, bits: int) -> None:
    layer, norm, inputs = FOLDED[case]
    x = inputs()
    rule = lfq.QuantSpec(bits=bits, granularity="per_channel")
    model = Normed(layer(), norm(), in_a_row)
    lfq.attach(model, 8, 8, rules=[lfq.Rule("layer", weight=rule)])
    lfq.calibrate(model, [x])
    with torch.no_grad():  # codes at both ends of the range: those that a sign finds no room for
        model.layer.weight_quantizer.scale.mul_(0.5)
    integers = integer_copy(model.eval())
    assert fold_batch_norm(integers, (x,)) == ["norm"]
    assert type(integers.norm) is nn.Identity
    assert_same(integers(x), model(x))


@pytest.mark.parametrize("case", LEFT)
def test_it_is_left_where_folding_would_change_the_answers(case: str) -> None:
    layer, norm, use, inputs = LEFT[case]
    x = inputs()
    rules = [lfq.Rule(Standardized, weight=8)] if case == "a subclass of the layer" else []
    model = calibrated(Normed(layer(), norm(), use), x, rules=rules)
    integers = integer_copy(model)
    assert fold_batch_norm(integers, (x,)) == []
    assert_same(integers(x), model(x))


class ByFunction(nn.Module):
    """Normalizes by a call of its own, with statistics under names of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        return nn.functional.batch_norm(x, mean, variance, bias=self.bias, weight=self.weight, eps=1e-3).sigmoid()


@pytest.mark.parametrize(("norm", "name"), [(Activated, "norm"), (ByFunction, "norm.running_mean")])
def test_it_is_folded_whatever_module_computes_it(norm: type[nn.Module], name: str) -> None:
    x = images()
    model = calibrated(Normed(nn.Conv2d(4, 5, 3), norm(5), in_a_row), x)
    integers = integer_copy(model)
    assert fold_batch_norm(integers, (x,)) == [name]
    assert_same(integers(x), model(x))
    program = torch.export.export(integers, (x,))
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    assert_same(program.module()(x), model(x))


class Padded(nn.Conv2d):
    """Pads by itself, as convolutions do that were ported from TensorFlow."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Named(Padded):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, bias=self.bias, stride=1, weight=self.weight)


class Twice(Padded):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + nn.functional.conv2d(x, self.weight, padding=1)[..., 1:, 1:].mean()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("layer", "times"), [(Padded, 1), (Named, 1), (Twice, 0)])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, Activated])
def test_it_is_folded_into_weights_that_a_modules_own_code_reads(
    norm: type[nn.Module], layer: type[nn.Conv2d], times: int, bias: bool
) -> None:
    x = images()
    model = Normed(layer(4, 5, 3, bias=bias), norm(5), in_a_row)
    lfq.attach(model, 4, 8, example=x)
    assert "weight_quantizer" in model.layer._modules
    lfq.calibrate(model, [x])
    integers = integer_copy(model.eval())
    assert fold_batch_norm(integers, (x,)) == ["norm"] * times
    assert_same(integers(x), model(x))
    program = torch.export.export(integers, (x,))
    assert sum("batch_norm" in str(node.target) for node in program.graph.nodes) == 1 - times
    assert_same(program.module()(x), model(x))


class OwnProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


@pytest.mark.parametrize(("shape", "folded"), [((6, 4), ["norm"]), ((6, 5, 4), [])])
def test_a_product_of_ones_own_is_folded_where_its_outputs_are_what_is_normalized(
    shape: tuple[int, ...], folded: list[str]
) -> None:
    model, x = Normed(OwnProduct(), nn.BatchNorm1d(5), in_a_row), torch.randn(shape)
    lfq.attach(model, 8, 8, example=x)
    lfq.calibrate(model, [x])
    integers = integer_copy(model.eval())
    assert fold_batch_norm(integers, (x,)) == folded
    assert_same(integers(x), model(x))


@pytest.mark.parametrize("where", ["another name", "a list"])
def test_it_is_folded_wherever_the_model_finds_it(where: str) -> None:
    def use(model: Any, x: Tensor) -> Tensor:
        for module in model.listed if where == "a list" else (model.layer, model.other):
            x = module(x)
        return x

    made = Normed(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), use)
    made.other = made.norm
    made.__dict__["listed"] = [made.layer, made.norm]
    x = images()
    model = calibrated(made, x)
    integers = integer_copy(model)
    assert fold_batch_norm(integers, (x,)) == ["norm"]
    assert_same(integers(x), model(x))


@pytest.mark.parametrize("layer", [nn.Conv2d, Padded])
@pytest.mark.parametrize("factor", [1e-9, 1e-20, 1e-42])
def test_a_channel_that_says_nothing_has_a_bias_that_fits_32_bits(factor: float, layer: type[nn.Conv2d]) -> None:
    made = Normed(layer(4, 5, 3), nn.BatchNorm2d(5), in_a_row)
    with torch.no_grad():
        made.norm.weight[2] = factor
    x = images()
    lfq.attach(made, 8, 8, example=x)
    lfq.calibrate(made, [x])
    model = made.eval()
    integers = integer_copy(model)
    assert fold_batch_norm(integers, (x,)) == ["norm"]
    weight = integers.layer.weight_quantizer
    bias = integers.layer.bias if layer is nn.Conv2d else weight.bias
    assert (bias.abs() / (integers.layer.input_quantizer.scale * weight.scale)).max() < 2**31
    assert_same(integers(x), model(x))


def test_it_is_left_where_a_channel_that_counts_would_have_no_room_for_its_bias() -> None:
    made = Normed(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), in_a_row)
    with torch.no_grad():
        made.norm.weight[2], made.norm.bias[2] = 1e-3, 1e4
    x = images()
    model = calibrated(made, x)
    integers = integer_copy(model)
    quantum = integers.layer.input_quantizer.scale * integers.layer.weight_quantizer.scale[2]
    assert 1e4 / (quantum * 1e-3) > 2**31
    assert fold_batch_norm(integers, (x,)) == []
    assert_same(integers(x), model(x))


def test_weights_in_other_precisions_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).bfloat16()
    x = torch.randn(8, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"'0' computes in torch\.bfloat16"):
        lfq.export_onnx(calibrated(model, x), x, "unused.onnx")
