"""Which layers are quantized, and that taking quantizers off leaves what was there."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torchmetrics
from torch import nn
from torch.nn.utils import parametrizations

import lfq_lightning as lfq
from lfq_lightning.placement.quantized_layer import QuantizedLayer
from tests.runs import Net

pytestmark = pytest.mark.quick

LAYERS = {
    "linear": (nn.Linear(6, 4), torch.randn(3, 6), 4),
    "conv1d": (nn.Conv1d(6, 4, 3), torch.randn(2, 6, 9), 4),
    "conv2d": (nn.Conv2d(6, 4, 3, groups=2), torch.randn(2, 6, 9, 9), 4),
    "conv3d": (nn.Conv3d(3, 4, 3), torch.randn(2, 3, 5, 5, 5), 4),
    "transposed1d": (nn.ConvTranspose1d(6, 4, 3), torch.randn(2, 6, 9), 4),
    "transposed2d": (nn.ConvTranspose2d(6, 4, 3), torch.randn(2, 6, 5, 5), 4),
    "transposed3d": (nn.ConvTranspose3d(3, 4, 3), torch.randn(2, 3, 5, 5, 5), 4),
    "embedding": (nn.Embedding(10, 4), torch.randint(0, 10, (2, 3)), 10),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_every_supported_layer_trains_with_quantized_weights_and_detaches_exactly(kind: str) -> None:
    layer, x, scales = LAYERS[kind]
    model = nn.Sequential(layer)
    before, keys, types = model(x), list(model.state_dict()), [type(m) for m in model.modules()]
    lfq.attach(model, weight=4, activation=4)
    assert torch.equal(model(x), before), "phase off computes as in float"
    assert [key for key in model.state_dict() if "quantizer" not in key] == keys
    assert layer.weight_quantizer.scale.shape == (scales,)
    lfq.calibrate(model, [x])
    lfq.set_phase(model, "learn")
    quantized = model(x)
    quantized.square().sum().backward()
    assert not torch.equal(quantized, before)
    assert layer.weight_quantizer.scale.grad.abs().sum() > 0
    lfq.detach(model)
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == types
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_first_and_last_layer_keep_8_bits_unless_a_rule_speaks_of_them() -> None:
    layers = lfq.attach(Net(), weight=4, activation=3).layers
    assert [(p.weight.bits, p.activation.bits) for p in layers] == [(8, 8), (4, 3), (8, 8)]
    layers = lfq.attach(Net(), weight=4, activation=3, rules=[lfq.Rule("head", weight=2)]).layers
    assert [(p.weight.bits, p.activation.bits) for p in layers] == [(8, 8), (4, 3), (2, 8)]


def test_the_first_matching_rule_decides_and_none_leaves_a_layer_in_float() -> None:
    rules = [lfq.Rule("sec*", weight=3, activation=None), lfq.Rule(nn.Conv2d, weight=None, activation=None)]
    model = Net()
    placement = lfq.attach(model, weight=8, activation=8, rules=rules)
    assert [p.name for p in placement.layers] == ["second", "head"]
    assert placement.layers[0].weight.bits == 3
    assert placement.layers[0].activation is None
    assert type(model.first) is nn.Conv2d


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lfq.Rule("haed", weight=8), "Near are head"),
        (lfq.Rule("norm", weight=8), "norm has no floating weights"),
        (lfq.Rule(nn.Conv3d, weight=8), "no module has that type"),
        (lfq.Rule("head.weight", weight=8), "not of their parameters. Match `head`"),
        (lfq.Rule("*.bias", weight=8), "Match `first` or `second` or `head`"),
    ],
)
def test_a_rule_that_applies_to_nothing_is_refused_before_anything_changes(rule: lfq.Rule, message: str) -> None:
    model = Net()
    with pytest.raises(ValueError, match=message):
        lfq.attach(model, rules=[rule])
    assert not lfq.quantizers(model)


def test_a_rule_for_what_holds_layers_is_told_how_to_match_them() -> None:
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"not of what holds them. Match `net\.\*`"):
        lfq.attach(model, rules=[lfq.Rule("net", weight=8)])


@pytest.mark.parametrize("match", ["net.", nn.Sequential])
def test_a_rule_speaks_of_all_that_is_below_a_name_or_a_type(match: Any) -> None:
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "head": nn.Linear(2, 2)})
    lfq.attach(model, rules=[lfq.Rule(match, weight=3)])
    assert [layer.weight_quantizer.bitwidth for layer in (*model["net"], model["head"])] == [3, 3, 8]


def test_a_rule_that_earlier_rules_leave_nothing_for_is_refused() -> None:
    with pytest.raises(ValueError, match="an earlier rule already decides for head"):
        lfq.attach(Net(), rules=[lfq.Rule("*", weight=8), lfq.Rule("head", weight=4)])


def test_attaching_again_with_the_same_settings_changes_nothing() -> None:
    model = Net()
    first = lfq.attach(model, weight=4)
    before = lfq.quantizers(model)
    assert lfq.attach(model, weight=4) == first
    assert all(lfq.quantizers(model)[name] is quantizer for name, quantizer in before.items())


def test_other_settings_replace_fresh_quantizers_but_never_what_has_seen_data() -> None:
    model = Net()
    lfq.attach(model, weight=4)
    lfq.attach(model, weight=3)
    assert model.second.weight_quantizer.bitwidth == 3
    lfq.calibrate(model, [torch.randn(2, 1, 8, 8)])
    with pytest.raises(ValueError, match="already quantized"):
        lfq.attach(model, weight=5)
    lfq.attach(model, weight=3)


def test_a_layer_used_twice_and_a_module_with_two_names_have_one_quantizer() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    assert [p.name for p in lfq.attach(model).layers] == ["0"]
    assert list(lfq.quantizers(model)) == ["0.weight_quantizer", "0.input_quantizer"]
    lfq.calibrate(model, [torch.randn(5, 4)])
    lfq.set_phase(model, "learn")
    model(torch.randn(5, 4)).sum().backward()


def test_tied_weights_share_one_quantizer_and_stay_tied() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    lfq.attach(model, weight=4)
    assert model[0].weight_quantizer is model[1].weight_quantizer
    assert model[0].weight is model[1].weight
    lfq.detach(model)
    assert model[0].weight is model[1].weight


class Tied(nn.Module):
    """The first layer's weight is that of one in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.decoder, self.last = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False), nn.Linear(8, 8)
        self.decoder.weight = self.embedding.weight


def test_a_rule_for_the_last_layer_holds_for_the_layers_that_are_tied_to_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[1].weight
    placement = lfq.attach(model, weight=4, activation=None, rules=[lfq.Rule("2", weight=4)])
    assert [layer.weight.bits for layer in placement.layers] == [8, 4, 4]


def test_layers_tied_to_the_first_or_last_keep_8_bits_with_it() -> None:
    layers = lfq.attach(Tied(), weight=4, activation=4).layers
    assert [(p.weight.bits, p.activation and p.activation.bits) for p in layers] == [(8, None), (8, 4), (8, 8)]


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (Tied(), {"rules": [lfq.Rule("decoder", weight=4)]}, "'embedding' and .*bits=4.* for 'decoder'"),
        (Tied(), {"weight": 4, "rules": [lfq.Rule("embedding", weight=2)]}, "give both the same `weight`"),
        (nn.Sequential(nn.Linear(4, 4), torch.compile(nn.Linear(4, 4))), {"compress_saved": True}, "eager execution"),
    ],
)
def test_what_cannot_be_placed_changes_no_layer(model: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lfq.attach(model, **settings)
    assert not lfq.quantizers(model)
    assert not any(isinstance(m, QuantizedLayer) for m in model.modules())


def test_channels_of_a_linears_input_are_its_last_dimension() -> None:
    by_channel = lfq.QuantSpec(symmetric=False, granularity="per_channel")
    model = nn.Sequential(nn.Linear(6, 6), nn.Unflatten(0, (-1, 5)), nn.Conv1d(5, 3, 1))
    lfq.attach(model, activation=by_channel)
    x = torch.randn(20, 6) * torch.logspace(-3, 0, 6)
    lfq.calibrate(model, [x])
    low, high = (getattr(x, end)(0).values.clamp(**to) for end, to in (("min", {"max": 0}), ("max", {"min": 0})))
    torch.testing.assert_close(model[0].input_quantizer.scale, (high - low) / 255, rtol=0.5, atol=0)
    model[0](torch.randn(4, 7, 6))
    assert model[2].input_quantizer.scale.numel() == 5


def test_an_input_whose_channels_lie_elsewhere_is_an_error_that_says_so() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    lfq.attach(model, activation=lfq.QuantSpec(granularity="per_channel", axis=1))
    for shape in ((4, 5, 6), (6,)):
        with pytest.raises(ValueError, match=r"each of the 6 channels\. Found shape"):
            lfq.calibrate(model, [torch.randn(*shape)])


def test_attention_projections_are_left_in_float_and_named() -> None:
    placement = lfq.attach(nn.TransformerEncoderLayer(8, 2, 16))
    assert {p.name for p in placement.layers} == {"linear1", "linear2"}
    assert dict(placement.left_in_float)["self_attn.out_proj"] == "attention reads these weights directly"
    assert "self_attn.out_proj" in str(placement)


def test_an_exact_type_is_asked_for_and_a_rule_with_the_type_includes_a_subclass() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Special(4, 4))
    assert "subclass" in dict(lfq.attach(model).left_in_float)["1"]
    lfq.detach(model)
    lfq.attach(model, rules=[lfq.Rule(Special, weight=4)])
    assert isinstance(model[1], QuantizedLayer)
    assert isinstance(model[1], Special)


def test_a_model_with_nothing_to_quantize_warns() -> None:
    with pytest.warns(UserWarning, match="nothing to quantize"):
        lfq.attach(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))


def test_a_parametrized_weight_is_quantized_after_it_is_computed() -> None:
    model = nn.Sequential(nn.Linear(3, 3), parametrizations.spectral_norm(nn.Linear(3, 3)))
    assert [p.name for p in lfq.attach(model, weight=4).layers] == ["0", "1"]
    x = torch.randn(5, 3)
    lfq.calibrate(model.eval(), [x])
    quantizer, quantized = model[1].weight_quantizer, model[1].weight_quantizer.quantized(model[1].weight)
    assert not torch.equal(quantized, model[1].weight)
    expected = nn.functional.linear(model[1].input_quantizer(model[0](x)), quantized, model[1].bias)
    assert torch.equal(model(x), expected)
    lfq.set_phase(model, "learn")
    model(x).square().sum().backward()
    assert quantizer.scale.grad.abs().sum() > 0
    assert model[1].parametrizations.weight.original.grad.abs().sum() > 0


@pytest.mark.parametrize("option", [{"sparse": True}, {"max_norm": 1.0}])
def test_an_embedding_whose_weights_cannot_be_quantized_is_left_in_float_and_named(option: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Embedding(10, 4, **option), nn.Linear(4, 64))
    assert next(iter(option)) in dict(lfq.attach(model).left_in_float)["0"]
    tokens = torch.randint(0, 10, (3,))
    lfq.calibrate(model, [tokens])
    lfq.set_phase(model, "learn")
    model(tokens).sum().backward()


def test_attach_warns_where_most_weights_stay_in_float_and_nobody_asked_for_that() -> None:
    class Own(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(input, self.weight, self.bias)

    def network() -> nn.Module:
        return nn.Sequential(Own(8, 8), Own(8, 8), nn.Linear(8, 2))

    with pytest.warns(UserWarning, match=r"Found 11.1% of them: print what `attach` returns .* give an `example`"):
        lfq.attach(network())
    lfq.attach(network(), example=torch.randn(2, 8))
    lfq.attach(network(), rules=[lfq.Rule(Own, weight=None, activation=None)])


def test_layers_inside_a_metric_are_left_in_float_and_named() -> None:
    class Score(torchmetrics.Metric):
        def __init__(self, shared: nn.Module) -> None:
            super().__init__()
            self.judge, self.shared = nn.Linear(4, 4), shared

        def update(self, x: torch.Tensor) -> None:
            pass

        def compute(self) -> torch.Tensor:
            return torch.zeros(())

    model = nn.ModuleDict({"score": Score(shared := nn.Linear(4, 4)), "net": shared, "head": nn.Linear(4, 2)})
    placement = lfq.attach(model)
    assert {model.get_submodule(p.name) for p in placement.layers} == {model["net"], model["head"]}
    assert "metric" in dict(placement.left_in_float)["score.judge"]


def test_a_rule_may_go_by_any_name_of_a_shared_module() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"z": nn.Linear(4, 4), "a": shared, "b": shared, "c": nn.Linear(4, 4)})
    for name in ("a", "b"):
        assert lfq.attach(model, rules=[lfq.Rule(name, weight=3)]).layers[1].weight.bits == 3


def test_an_unmaterialised_lazy_layer_is_refused_with_the_remedy() -> None:
    with warnings.catch_warnings(), pytest.raises(ValueError, match="run one batch"):
        warnings.simplefilter("ignore")
        lfq.attach(nn.Sequential(nn.LazyLinear(3)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": lfq.QuantSpec(granularity="per_channel", axis=4)}, "`axis` must name a dimension"),
        ({"activation": lfq.QuantSpec(granularity="per_channel", axis=0)}, "Dimension 0"),
        ({"weight": 1}, "`bits` must be between 2 and 16. Found 1"),
        ({"weight": "4"}, "must be a number of bits"),
        ({"rules": ["head"]}, "must hold Rule objects"),
        ({"activation": {"bit": 4}}, "unknown keys"),
    ],
)
def test_wrong_settings_are_refused_before_anything_changes(settings: dict[str, object], message: str) -> None:
    model = Net()
    with pytest.raises((ValueError, TypeError), match=message):
        lfq.attach(model, **settings)
    assert not lfq.quantizers(model)


def test_groups_along_the_inputs_have_a_scale_each_with_a_remainder() -> None:
    model = nn.Sequential(nn.Linear(70, 3), nn.Linear(3, 3))
    spec = lfq.QuantSpec(bits=4, granularity="per_group", group_size=32)
    lfq.attach(model, rules=[lfq.Rule("0", weight=spec)])
    assert model[0].weight_quantizer.scale.shape == (9,)
    lfq.calibrate(model, [torch.randn(2, 70)])
    model(torch.randn(2, 70)).sum().backward()


@pytest.mark.parametrize(
    ("layer", "sample"),
    [(nn.Conv1d(3, 4, 1), (3, 6)), (nn.Conv2d(3, 4, 1), (3, 6, 5)), (nn.ConvTranspose2d(3, 4, 1), (3, 6, 5))],
    ids=str,
)
def test_channels_of_an_input_are_found_with_a_batch_and_without(layer: nn.Module, sample: tuple[int, ...]) -> None:
    model, x = nn.Sequential(layer), torch.randn(sample)
    lfq.attach(model, weight=None, activation=lfq.QuantSpec(symmetric=False, granularity="per_channel"))
    lfq.calibrate(model, [x])
    alone, scales = model(x), layer.input_quantizer.scale.clone()
    assert torch.equal(model(x[None])[0], alone)
    layer.input_quantizer.forget()
    lfq.calibrate(model, [x[None]])
    assert torch.equal(layer.input_quantizer.scale, scales)
