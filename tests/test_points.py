"""A model's points: every place where it is quantized, with what is quantized there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.placement.points import Point, activations, points, weights
from lfq_lightning.placement.quantized_layer import QuantizedLayer
from lfq_lightning.quantizer.saved import described
from lfq_lightning.state_dicts import descriptions


class Tied(nn.Module):
    """Quantized by layers, of which two share a weight, and by quantizers of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.input_quantizer = lfq.LearnableFakeQuantize.from_spec(lfq.QuantSpec(bits=8, symmetric=False))
        self.gain = nn.Parameter(torch.ones(4))
        self.own = lfq.LearnableFakeQuantize.from_spec(lfq.QuantSpec(bits=8), weight=True)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.input_quantizer(self.block(self.embed(x)) * self.own(self.gain)))


def attached() -> Tied:
    model = Tied()
    lfq.attach(model, weight=4, activation=8)
    return model


def told(point: Point) -> tuple[str | None, str, bool]:
    return point.role, point.site, point.owner is None


def test_points_say_what_is_quantized_and_where() -> None:
    model = attached()
    found = points(model)
    assert {name: told(point) for name, point in found.items()} == {
        "embed.weight_quantizer": ("weight", "embed", False),
        "block.0.weight_quantizer": ("weight", "block.0", False),
        "block.0.input_quantizer": ("input", "block.0", False),
        "input_quantizer": (None, "", True),  # the user's own, whatever its name
        "own": ("weight", "", True),
        "head.input_quantizer": ("input", "head", False),
    }
    assert list(found) == list(lfq.quantizers(model))
    assert all(found[name].quantizer is quantizer for name, quantizer in lfq.quantizers(model).items())


def test_a_parameter_is_looked_at_where_it_is_and_all_else_in_a_forward_pass() -> None:
    model = attached()
    found = points(model)
    parameters = [id(point.parameter) for point in weights(found)]
    assert parameters == [id(model.embed.weight), id(model.block[0].weight)]
    seen = ["block.0.input_quantizer", "input_quantizer", "own", "head.input_quantizer"]
    assert [point.name for point in activations(found)] == seen


def test_points_learn_with_their_owners_weight_and_those_of_users_always() -> None:
    model = attached()
    model.block[0].weight.requires_grad_(False)
    still = [name for name, point in points(model).items() if not point.learns]
    assert still == ["block.0.weight_quantizer", "block.0.input_quantizer"]


def test_a_layer_alone_and_compiled_modules_have_points_under_their_plain_names() -> None:
    alone = nn.Linear(4, 2)
    lfq.attach(alone)
    assert {name: told(point) for name, point in points(alone).items()} == {
        "weight_quantizer": ("weight", "", False),
        "input_quantizer": ("input", "", False),
    }
    model = attached()
    names = list(points(model))
    model.block[0] = torch.compile(model.block[0], backend="eager")
    assert list(points(model)) == names
    assert points(model)["block.0.input_quantizer"].owner is model.block[0]._orig_mod
    assert list(points(torch.compile(model, backend="eager"))) == names


def test_role_and_site_are_saved_with_the_quantizer() -> None:
    model = attached()
    saved = descriptions(model.state_dict())
    assert {name: (saved[name].role, saved[name].site) for name in points(model)} == {
        name: (point.role, point.quantizer.site) for name, point in points(model).items()
    }
    # A site below the module that holds the quantizer; without one, files are as they were before there were any.
    quantizer = model.block[0].input_quantizer
    usual = quantizer.get_extra_state()
    quantizer.site = "inner"
    assert described(quantizer.get_extra_state()).site == "inner"
    assert points(model)["block.0.input_quantizer"].site == "block.0.inner"
    own = model.own.get_extra_state()
    for state, said in (
        (usual, b'"axis": null, "is_weight": false, "role": "input", "spec": {"bits": 8,'),
        (own, b'"axis": null, "is_weight": true, "role": null, "spec": {"bits": 8,'),
    ):
        assert bytes(state[10:].to(torch.uint8).tolist()).startswith(b'{"quantizer": "lfq_lightning", ' + said)
    assert (described(own).role, described(own).site) == ("weight", None)


class Gated(nn.Linear):
    """A layer with a quantizer of the user's own beside those that `attach` puts there."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.gate_quantizer = lfq.LearnableFakeQuantize.from_spec(lfq.QuantSpec(bits=8))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gate_quantizer(x)


def test_a_users_quantizer_in_a_quantized_layer_is_not_the_layers() -> None:
    model = nn.Sequential(Gated())
    lfq.attach(model, rules=[lfq.Rule(Gated, weight=8)])
    assert {name: told(point) for name, point in points(model).items()} == {
        "0.gate_quantizer": (None, "0", True),
        "0.weight_quantizer": ("weight", "0", False),
        "0.input_quantizer": ("input", "0", False),
    }


def test_a_layer_without_a_quantized_weight_is_the_owner_of_its_input() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    lfq.attach(model, weight=None, activation=8)
    [point] = points(model).values()
    assert isinstance(point.owner, QuantizedLayer)
    assert (point.role, point.parameter) == ("input", None)
