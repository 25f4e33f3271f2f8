"""A quantizer's state survives files, copies and changes of dtype."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization as ao

from lfq_lightning import LearnableFakeQuantize, QuantSpec
from lfq_lightning.observers import MinMaxObserver, MovingAverageObserver
from lfq_lightning.schedule import PHASES
from tests.assertions import assert_bit_equal

MAKERS: dict[str, Callable[[], LearnableFakeQuantize]] = {
    "affine": lambda: LearnableFakeQuantize(MinMaxObserver(0, 15), 0, 15),
    "symmetric": lambda: LearnableFakeQuantize(MinMaxObserver(-8, 7, symmetric=True), -8, 7),
    "average": lambda: LearnableFakeQuantize(MovingAverageObserver(0, 15), 0, 15),
    "channels": lambda: LearnableFakeQuantize(MinMaxObserver(0, 15, axis=1, channels=3), 0, 15, channel_len=3),
    "spec": lambda: LearnableFakeQuantize.from_spec(QuantSpec(bits=4)),
    "groups": lambda: LearnableFakeQuantize.from_spec(
        QuantSpec(bits=4, granularity="per_group", group_size=2), 8, weight=True
    ),
    "torch": lambda: LearnableFakeQuantize(ao.MinMaxObserver(dtype=torch.quint8)),
    "torch channels": lambda: LearnableFakeQuantize(ao.PerChannelMinMaxObserver(ch_axis=1), channel_len=3),
}
each_kind = pytest.mark.parametrize("kind", MAKERS)
X = torch.linspace(0.1, 3, 12).view(4, 3)


def used(kind: str, phase: str = "learn") -> LearnableFakeQuantize:
    """A quantizer that observed, began to learn, and whose scale then moved."""
    quantizer = MAKERS[kind]()
    quantizer(X)
    quantizer.begin_learning()
    with torch.no_grad():
        quantizer.scale.mul_(1.5)
    quantizer.phase = phase
    return quantizer


def assert_same_quantizer(found: LearnableFakeQuantize, expected: LearnableFakeQuantize) -> None:
    assert found.phase == expected.phase
    assert found.learned == expected.learned
    assert (found.quant_min, found.quant_max) == (expected.quant_min, expected.quant_max)
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        if isinstance(value, Tensor):
            assert_bit_equal(found.state_dict()[name], value)
    assert_bit_equal(found.eval()(X), expected.eval()(X))


@each_kind
@pytest.mark.parametrize("phase", PHASES)
def test_the_state_and_the_phase_survive_a_file_that_holds_weights_only(kind: str, phase: str, tmp_path: Path) -> None:
    quantizer = used(kind, phase)
    torch.save(quantizer.state_dict(), tmp_path / "state.pt")
    loaded = MAKERS[kind]()
    result = loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same_quantizer(loaded, quantizer)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if "torch" not in kind])
def test_a_loaded_quantizer_goes_on_observing_as_the_saved_one(kind: str) -> None:
    quantizer, loaded = used(kind, "estimate"), MAKERS[kind]()
    loaded.load_state_dict(quantizer.state_dict())
    for each in (quantizer, loaded):
        each.train()(X * 2)
    assert_same_quantizer(loaded, quantizer)


def test_a_mixed_state_of_the_switches_survives() -> None:
    quantizer, loaded = used("affine").toggle_observer_update(), MAKERS["affine"]()
    assert quantizer.phase == "mixed"
    loaded.load_state_dict(quantizer.state_dict())
    assert (loaded.fake_quant_enabled, loaded.static_enabled, loaded.learning_enabled) == (True, True, True)


def test_the_sign_that_the_data_decided_survives() -> None:
    quantizer, loaded = used("spec"), MAKERS["spec"]()
    assert (quantizer.quant_min, loaded.quant_min) == (0, -8)
    loaded.load_state_dict(quantizer.state_dict())
    assert (loaded.quant_min, loaded.quant_max) == (0, 15)
    assert loaded.observer.quant_max == 15


@each_kind
def test_every_missing_key_is_reported_when_strict_and_forgiven_when_not(kind: str) -> None:
    keys = list(MAKERS[kind]().state_dict())
    assert {"scale", "zero_point", "scale_reference", "_extra_state"} <= set(keys)
    for key in ("scale", "zero_point", "scale_reference", "_extra_state"):
        state = used(kind).state_dict()
        del state[key]
        with pytest.raises(RuntimeError, match=f'Missing key\\(s\\) in state_dict: "{key}"'):
            MAKERS[kind]().load_state_dict(state)
        assert MAKERS[kind]().load_state_dict(state, strict=False).missing_keys == [key]


def test_an_unexpected_key_and_another_shape_are_reported() -> None:
    state = used("affine").state_dict()
    with pytest.raises(RuntimeError, match='Unexpected key\\(s\\) in state_dict: "offset"'):
        MAKERS["affine"]().load_state_dict({**state, "offset": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch for scale"):
        MAKERS["affine"]().load_state_dict({**state, "scale": torch.ones(3)})


def test_parameters_stay_the_same_objects_when_a_state_is_loaded() -> None:
    quantizer = MAKERS["affine"]()
    scale, zero_point = quantizer.scale, quantizer.zero_point
    quantizer.load_state_dict(used("affine").state_dict())
    assert quantizer.scale is scale
    assert quantizer.zero_point is zero_point


@each_kind
@pytest.mark.parametrize("phase", PHASES)
def test_deepcopy_and_pickle_give_an_equal_quantizer_that_shares_nothing(kind: str, phase: str) -> None:
    quantizer = used(kind, phase)
    for twin in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        assert_same_quantizer(twin, quantizer)
        with torch.no_grad():
            twin.scale.fill_(9.0)
        twin.phase = "freeze"
        assert quantizer.phase == phase
        assert (quantizer.scale != 9.0).all()


CONVERSIONS: dict[str, Callable[[nn.Module], Any]] = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "double": nn.Module.double,
    "to half": lambda m: m.to(torch.float16),
    "to bfloat16 on a device": lambda m: m.to("cpu", torch.bfloat16),
    "to a tensor's": lambda m: m.to(torch.ones(1, dtype=torch.float64)),
    "type": lambda m: m.type(torch.float16),
}


@each_kind
@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("inside", [False, True])
def test_qparams_and_observer_stay_float32_through_every_conversion(kind: str, conversion: str, inside: bool) -> None:
    quantizer = used(kind)
    before = {k: v.clone() for k, v in quantizer.state_dict().items() if isinstance(v, Tensor)}
    quantizer(X).sum().backward()
    model = nn.Sequential(nn.Linear(3, 3), quantizer) if inside else quantizer
    CONVERSIONS[conversion](model)
    for name, value in before.items():
        assert_bit_equal(quantizer.state_dict()[name], value)
    assert quantizer.scale.grad is not None
    assert quantizer.scale.grad.dtype is torch.float32
    assert isinstance(quantizer.scale, nn.Parameter)
    if inside:
        assert model[0].weight.dtype is not torch.float32


def test_moving_to_another_device_moves_everything() -> None:
    quantizer = used("affine").to("meta")
    assert {t.device.type for t in (*quantizer.parameters(), *quantizer.buffers())} == {"meta"}
    assert quantizer.to("meta", torch.float16).scale.dtype is torch.float32


def test_a_quantizer_made_on_a_device_is_there_at_once() -> None:
    quantizer = LearnableFakeQuantize.from_spec(QuantSpec(bits=4), device="meta")
    assert {t.device.type for t in (*quantizer.parameters(), *quantizer.buffers())} == {"meta"}


def test_a_quantizer_made_under_another_default_dtype_is_float32() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        quantizer = MAKERS["affine"]()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in (*quantizer.parameters(), *quantizer.buffers())} == {torch.float32}
