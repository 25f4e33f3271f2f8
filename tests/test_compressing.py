"""Backward from tensors that are quantized again: the same bits for less memory."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lfq_lightning as lfq
from lfq_lightning.placement.quantized_layer import quantized_layers, set_compressed
from tests.runs import Net, fit, images, qat

pytestmark = pytest.mark.quick

X = images().tensors[0]


def learned(model: nn.Module, x: Tensor, **settings: object) -> nn.Module:
    lfq.attach(model, **{"weight": 4, "activation": 4, **settings})
    lfq.calibrate(model, [x])
    lfq.set_phase(model, "learn")
    return model


def gradients(model: nn.Module, x: Tensor, compress: bool) -> dict[str, Tensor]:
    twin = copy.deepcopy(model)
    for layer in quantized_layers(twin).values():
        assert layer.saved is None
    set_compressed(twin, compress)
    x = x.clone().requires_grad_()
    twin(x).square().sum().backward()
    kept = [layer.saved for layer in quantized_layers(twin).values()]
    assert all(s is None or 0 < s.stored < 0.5 * s.full for s in kept)
    return {"x": x.grad, **{name: p.grad for name, p in twin.named_parameters() if p.grad is not None}}


MODELS = {
    "convolutions": (Net(), X),
    "channels_last": (Net().to(memory_format=torch.channels_last), X.to(memory_format=torch.channels_last)),
    "linear": (nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(64, 64)),
    "sequence": (nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)), torch.randn(8, 16, 64)),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(16, 16, 3)), torch.randn(4, 16, 8, 8)),
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_the_same_bits_with_and_without(kind: str, bits: int) -> None:
    model, x = MODELS[kind]
    model = learned(copy.deepcopy(model), x, weight=bits, activation=bits)
    plain, compressed = gradients(model, x, False), gradients(model, x, True)
    assert plain.keys() == compressed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, compressed[name]), name


def test_groups_and_a_channel_axis_of_the_input_are_rebuilt_too() -> None:
    x = torch.randn(32, 70)
    weight = lfq.QuantSpec(bits=4, granularity="per_group", group_size=32)
    activation = lfq.QuantSpec(bits=4, symmetric=False, granularity="per_channel", axis=-1)
    model = learned(nn.Sequential(nn.Linear(70, 70)), x, weight=weight, activation=activation)
    plain, compressed = gradients(model, x, False), gradients(model, x, True)
    assert all(torch.equal(gradient, compressed[name]) for name, gradient in plain.items())


class Turned(nn.Linear):
    """Keeps its input for backward as complex numbers, which are a view of the same memory."""

    def forward(self, input: Tensor) -> Tensor:
        numbers = torch.view_as_complex(input.unflatten(-1, (-1, 2)))
        return nn.functional.linear(torch.view_as_real(numbers * numbers).flatten(-2), self.weight, self.bias)


def test_a_view_in_another_dtype_is_kept_as_it_is() -> None:
    x = torch.randn(32, 64)
    model = learned(nn.Sequential(Turned(64, 64)), x, rules=[lfq.Rule(Turned)])
    twin = copy.deepcopy(model)
    set_compressed(twin, True)
    for each in (model, twin):
        each(x).square().sum().backward()
    for plain, compressed in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(plain.grad, compressed.grad)


def test_bits_do_not_matter() -> None:
    x = torch.randn(32, 64)
    wide = lfq.QuantSpec(bits=12)
    model = learned(nn.Sequential(nn.Linear(64, 64)), x, weight=wide, activation=wide)
    plain, compressed = gradients(model, x, False), gradients(model, x, True)
    assert all(torch.equal(gradient, compressed[name]) for name, gradient in plain.items())


def test_qparams_that_step_between_forward_and_backward_do_not_matter() -> None:
    x = torch.randn(32, 64)
    model = learned(nn.Sequential(nn.Linear(64, 64)), x)
    set_compressed(model, True)
    loss = model(x).square().sum()
    expected = torch.autograd.grad(loss, model[0].weight, retain_graph=True)
    with torch.no_grad():
        model[0].input_quantizer.scale *= 2
    assert torch.equal(*expected, *torch.autograd.grad(loss, model[0].weight))


def test_an_input_that_is_changed_in_place_is_an_error_and_never_another_gradient() -> None:
    x = torch.randn(32, 64)
    model = learned(nn.Sequential(nn.Linear(64, 64)), x)
    lfq.set_phase(model, "freeze")
    set_compressed(model, True)
    loss = model(x).square().sum()
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()


def test_a_copy_in_another_dtype_is_stored_as_usual_and_reported() -> None:
    x = torch.randn(32, 64)
    model = learned(nn.Sequential(nn.Linear(64, 64)), x)
    expected = copy.deepcopy(model)
    set_compressed(model, True)
    for twin in (model, expected):
        with torch.autocast("cpu", torch.bfloat16):
            twin(x).float().square().sum().backward()
    assert torch.equal(model[0].weight.grad, expected[0].weight.grad)
    assert model[0].saved.stored > 0.4 * model[0].saved.full


def test_a_nan_reaches_the_gradients() -> None:
    x = torch.randn(32, 64)
    model = learned(nn.Sequential(nn.Linear(64, 64)), x)
    set_compressed(model, True)
    x[3, 3] = torch.nan
    model(x).square().sum().backward()
    assert model[0].weight.grad.isnan().float().mean() > 0.9


def test_without_gradients_nothing_is_packed_and_in_float_phases_nothing_is_lost() -> None:
    model = Net()
    lfq.attach(model, weight=4, activation=4, compress_saved=True)
    lfq.set_phase(model, "observe")
    model(X).sum().backward()
    assert model.second.saved.stored == model.second.saved.full
    with torch.no_grad():
        model(X)


def test_it_is_refused_where_a_compiler_decides_what_is_saved() -> None:
    with pytest.raises(ValueError, match="goes with eager execution"):
        lfq.attach(torch.compile(Net()), compress_saved=True)
    model = learned(Net(), X)
    set_compressed(model, True)
    with pytest.raises(Exception, match="goes with eager execution"):
        torch.compile(model, fullgraph=True)(X)
    torch.compiler.reset()


def test_tensors_are_left_to_the_hooks_of_others() -> None:
    x = torch.randn(64, 64)
    model = learned(nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)]), x)
    seen: dict[bool, int] = {}
    for compress in (False, True):
        set_compressed(model, compress)
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            model(x)
        seen[compress] = sum(kept)
    assert seen[True] == seen[False] > 0


def test_activation_checkpointing_keeps_nothing_of_what_lies_between() -> None:
    x = torch.randn(64, 64)
    model = learned(nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)]), x, compress_saved=True)
    given: list[weakref.ref[Any]] = []
    for layer in model[1:]:
        layer.register_forward_pre_hook(lambda _, args: given.append(weakref.ref(args[0].untyped_storage())))
    expected = torch.autograd.grad(model(x).square().sum(), model[0].weight)
    given.clear()
    y = checkpoint(model, x, use_reentrant=False)
    assert len(given) == 2
    assert all(storage() is None for storage in given)
    assert torch.equal(*expected, *torch.autograd.grad(y.square().sum(), model[0].weight))


def test_detach_takes_it_off() -> None:
    model = learned(Net(), X, compress_saved=True)
    lfq.detach(model)
    assert "saved" not in vars(model.second)


def test_the_callback_trains_to_the_same_bits_with_it(tmp_path: Path) -> None:
    plain, _, _ = fit(tmp_path / "plain")
    compressed, _, _ = fit(tmp_path / "compressed", callback=qat(compress_saved=True))
    assert compressed.second.saved.stored < 0.5 * compressed.second.saved.full
    for key, value in plain.state_dict().items():
        assert not isinstance(value, Tensor) or torch.equal(compressed.state_dict()[key], value), key


class ClampsInPlace(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.clamp_(min=0.0), self.weight, self.bias)


def test_what_a_layer_has_changed_in_place_is_stored_as_it_is() -> None:
    x = torch.randn(16, 64)
    model = nn.Sequential(nn.Linear(64, 64), ClampsInPlace(64, 64))
    model = learned(model, x, rules=[lfq.Rule(ClampsInPlace, weight=4, activation=4)])
    found = {}
    for compress in (False, True):
        set_compressed(model, compress)
        model.zero_grad()
        model(x).square().sum().backward()
        found[compress] = [p.grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found[False], found[True], strict=True))
    assert model[1].saved.stored < model[1].saved.full  # the weight
