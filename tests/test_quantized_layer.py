"""A quantized layer is the layer it was, to everything that handles modules."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import lfq_lightning as lfq
from tests.assertions import assert_bit_equal
from tests.processes import ROOT, run_python
from tests.runs import Net


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    net = Net()
    lfq.attach(net, weight=4, activation=4)
    lfq.calibrate(net, [torch.randn(4, 1, 8, 8)])
    lfq.set_phase(net, "learn")
    return net.eval()


@pytest.mark.quick
def test_the_weight_is_the_parameter_outside_forward_and_fake_quantized_inside(model: Net) -> None:
    inside = []

    class Probe(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inside.append(self.weight)
            return super().forward(x)

    probe = nn.Sequential(Probe(3, 3))
    lfq.attach(probe, weight=4, activation=None, rules=[lfq.Rule(Probe, weight=4)])
    lfq.calibrate(probe, [torch.randn(2, 3)])
    inside.clear()
    probe(torch.randn(2, 3))
    assert isinstance(probe[0].weight, nn.Parameter)
    assert not isinstance(inside[0], nn.Parameter)
    assert torch.equal(inside[0], probe[0].weight_quantizer(probe[0].weight))


@pytest.mark.quick
def test_an_exception_in_forward_leaves_the_parameter_in_place(model: Net) -> None:
    with pytest.raises(RuntimeError):
        model.head(torch.randn(2, 5))
    assert isinstance(model.head.weight, nn.Parameter)


@pytest.mark.quick
def test_deepcopy_computes_the_same_and_shares_nothing(model: Net) -> None:
    x = torch.randn(2, 1, 8, 8)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert type(twin.first) is type(model.first)
    assert twin.first.weight_quantizer.scale is not model.first.weight_quantizer.scale


def test_pickle_survives_into_a_fresh_process(model: Net, tmp_path: Path) -> None:
    layer, x = nn.Sequential(copy.deepcopy(model.head)), torch.randn(2, 36)
    torch.save((layer, x, layer(x)), tmp_path / "layer.pt")
    code = "import sys, torch; m, x, y = torch.load(sys.argv[1], weights_only=False); assert torch.equal(m(x), y)"
    done = run_python("-c", code, tmp_path / "layer.pt", cwd=ROOT, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@pytest.mark.quick
def test_pruning_before_or_after_attach_is_quantized_and_keeps_its_mask() -> None:
    for attach_first in (True, False):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        if attach_first:
            lfq.attach(model, weight=4)
        prune.l1_unstructured(model[0], "weight", amount=0.5)
        lfq.attach(model, weight=4)
        lfq.calibrate(model, [torch.randn(4, 8)])
        lfq.set_phase(model, "learn")
        model(torch.randn(4, 8)).sum().backward()
        assert (model[0].weight == 0).float().mean() == 0.5
        assert model[0].weight_orig.grad is not None
        prune.remove(model[0], "weight")
        assert isinstance(model[0].weight, nn.Parameter)


def test_the_fused_transformer_path_does_not_bypass_quantizers() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        plain = encoder(x, src_key_padding_mask=padding)
    lfq.attach(encoder, weight=2, activation=None, rules=[lfq.Rule("*", weight=2)])
    lfq.calibrate(encoder, [x])
    with torch.no_grad():
        quantized = encoder(x, src_key_padding_mask=padding)
    assert quantized.shape == plain.shape
    assert not torch.allclose(quantized, plain, atol=1e-3)


def test_compiled_without_a_graph_break_it_computes_the_same(model: Net) -> None:
    x = torch.randn(2, 1, 8, 8)
    compiled = torch.compile(model, fullgraph=True)
    # The convolutions may be summed in another order: the quantizers' own outputs are compared bit for bit elsewhere.
    torch.testing.assert_close(compiled(x), model(x))
    assert all("_orig_mod" not in name for name in lfq.quantizers(compiled))
    torch.compiler.reset()


def test_integer_and_keyword_inputs_pass_through_or_are_quantized() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    lfq.attach(model, weight=8, activation=2, rules=[lfq.Rule("1", activation=2)])
    lfq.calibrate(model.eval(), [torch.tensor([[0, 1, 2]])])
    assert model(torch.tensor([[0, 1]])).shape == (1, 2, 2)
    x = torch.randn(3, 4)
    assert torch.equal(model[1](input=x), model[1](x))


class Doubling(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) + self.weight.sum()


@pytest.mark.parametrize("layer", [nn.Linear, Doubling])
def test_threads_share_a_model(layer: type[nn.Linear]) -> None:
    model = nn.Sequential(*[layer(64, 64) for _ in range(6)])
    lfq.attach(model, weight=4, activation=8, rules=[lfq.Rule(layer)])
    x = torch.randn(100, 64)
    lfq.calibrate(model, [x])
    model.eval()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with torch.no_grad(), ThreadPoolExecutor(4) as pool:
            expected = model(x)
            answers = list(pool.map(lambda _: model(x), range(200)))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(y, expected) for y in answers)
    assert all(isinstance(one.weight, nn.Parameter) for one in model)


def test_a_subclass_with_its_own_forward_keeps_what_that_sets_and_compiles() -> None:
    model = nn.Sequential(Doubling(4, 4), nn.Linear(4, 4))
    lfq.attach(model, weight=4, rules=[lfq.Rule(Doubling)])
    x = torch.randn(5, 4)
    lfq.calibrate(model, [x])
    y = model(x)
    assert model[0].calls == 2
    assert list(model[0]._parameters) == ["weight", "bias"]
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), y)
    assert model[0].calls == 3
    torch.compiler.reset()


def test_new_quantizers_are_in_the_mode_of_their_layers_and_inference_moves_no_scale() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model[0].eval()  # a backbone that stays as it is, and a head that trains
    lfq.attach(model)
    for layer in (model[0], model[2]):
        assert layer.weight_quantizer.training == layer.input_quantizer.training == layer.training
    lfq.calibrate(model.eval(), [torch.randn(16, 4)])
    before = {name: quantizer.scale.clone() for name, quantizer in lfq.quantizers(model).items()}
    with torch.no_grad():
        model(1000 * torch.randn(16, 4))
    assert all(torch.equal(q.scale, before[name]) for name, q in lfq.quantizers(model).items())
    assert not any(q.training for q in lfq.quantizers(model).values())
    assert all(q.training for q in lfq.quantizers(model.train()).values())


class ClampsInPlace(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.clamp_(min=0.0), self.weight, self.bias)


@pytest.mark.parametrize("phase", ["off", "observe"])
def test_a_layer_may_change_its_input_in_place_in_phases_that_compute_in_float(phase: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), ClampsInPlace(6, 6), nn.Linear(6, 2))
    x = torch.randn(16, 6)

    def run() -> tuple[torch.Tensor, ...]:
        hidden = model[0](x)
        y = model[2](model[1](hidden) + hidden)  # which sees what the layer made of it
        return y, *torch.autograd.grad(y.square().sum(), [layer.weight for layer in model])

    expected = run()
    lfq.attach(model, rules=[lfq.Rule(ClampsInPlace, weight=4, activation=4)])
    lfq.set_phase(model, phase)
    assert all(torch.equal(*pair) for pair in zip(run(), expected, strict=True))
    model(x).sum().backward()
    assert all((q.scale.grad == 0).all() for q in lfq.quantizers(model).values() if q.scale.grad is not None)


@pytest.mark.parametrize("scale_domain", ["linear", "power_of_two"])
@pytest.mark.parametrize("padding", [None, 3])
def test_a_table_whose_few_rows_are_looked_up_computes_and_learns_as_one_that_is_quantized_whole(
    scale_domain: Any, padding: int | None
) -> None:
    spec = lfq.QuantSpec(bits=3, granularity="per_channel", scale_domain=scale_domain)
    model = nn.Sequential(nn.Embedding(40, 6, padding_idx=padding), nn.Linear(6, 2))
    lfq.attach(model, weight=spec, activation=None, rules=[lfq.Rule("0", weight=spec)])
    lfq.set_phase(model, "learn")
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)))  # the padding's row too
        model[0].weight_quantizer.scale.mul_(1.4)
    index = torch.tensor([[3, 7, 7], [0, 39, 3]])
    whole = copy.deepcopy(model)
    whole[0].weight_quantizer.register_forward_hook(lambda *_: None)  # sees the whole weight
    called: list[Any] = []
    model[0].weight_quantizer.register_forward_pre_hook(lambda *_: called.append(None))
    assert_bit_equal(model(index), whole(index))
    assert not called, "the whole table was quantized"
    for each in (model, whole):
        each(index).square().sum().backward()
    assert_bit_equal(model[0].weight.grad, whole[0].weight.grad)
    found, expected = (each[0].weight_quantizer.scale.grad for each in (model, whole))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert found[7] != 0


@pytest.mark.parametrize("size", [(0,), (2, 0), ()])
def test_a_table_gives_as_many_rows_as_are_looked_up_none_and_one_too(size: tuple[int, ...]) -> None:
    table = nn.Sequential(nn.Embedding(40, 6))
    lfq.attach(table, weight=4, activation=None)
    lfq.set_phase(table, "learn")
    y = table(torch.zeros(size, dtype=torch.long))
    assert y.shape == (*size, 6)
    y.sum().backward()
    assert table[0].weight_quantizer.scale.grad is not None
