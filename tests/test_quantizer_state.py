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

import lfq_lightning as lfq
from lfq_lightning import LearnableFakeQuantize, QuantSpec
from lfq_lightning.observers import MinMaxObserver, MovingAverageObserver
from lfq_lightning.schedule import PHASES
from tests.assertions import assert_bit_equal

pytestmark = pytest.mark.quick

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


# ---- qparams of another kind never reach a kernel -------------------------------------------------------------------


def halved(model: nn.Module) -> dict[str, Any]:
    """A state dict as a tool leaves it that halves every floating tensor."""
    return {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_state_in_half_precision_loads_as_float32(assign: bool, inside: bool) -> None:
    quantizer, loaded = used("spec"), MAKERS["spec"]()
    modules = [nn.Sequential(nn.Linear(3, 3), q) if inside else q for q in (quantizer, loaded)]
    state = halved(modules[0])
    modules[1].load_state_dict(state, assign=assign)
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float16}
    floating = [t for t in (*loaded.parameters(), *loaded.buffers()) if t.is_floating_point()]
    assert torch.float16 not in {t.dtype for t in floating}
    assert loaded.scale.dtype is torch.float32
    torch.testing.assert_close(loaded.eval()(X), quantizer.eval()(X), rtol=1e-3, atol=1e-3)


REFUSED = {
    "half scale": (lambda q: q.scale.data.half(), "scale", TypeError, "`scale` must be float32.*torch.float16"),
    "double zero point": (
        lambda q: q.zero_point.data.double(),
        "zero_point",
        TypeError,
        "`zero_point` must be float32",
    ),
    "scale on another device": (
        lambda q: q.scale.data.to("meta"),
        "scale",
        ValueError,
        "on the device of x, cpu.*meta",
    ),
    "zero point elsewhere": (lambda q: q.zero_point.data.to("meta"), "zero_point", ValueError, "device of x.*meta"),
    "more zero points": (lambda q: torch.zeros(3), "zero_point", ValueError, "must have the same shape.*Found"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_qparams_of_another_kind_than_kernels_read_are_refused(kind: str, dtype: torch.dtype) -> None:
    change, name, error, message = REFUSED[kind]
    quantizer = used("affine")
    setattr(quantizer, name, nn.Parameter(change(quantizer)))
    with pytest.raises(error, match=message):
        quantizer(X.to(dtype))
    with pytest.raises(error, match=message):
        quantizer.quantized(X.to(dtype))


def test_no_mixture_of_dtypes_devices_strides_and_shapes_crashes() -> None:
    """Whatever a quantizer is left with: the right numbers, or an error."""
    generator = torch.Generator().manual_seed(0)

    def any_of(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for _ in range(300):
        quantizer, count = used("channels"), any_of(3, 3, 3, 1, 2, 0)
        for name in ("scale", "zero_point"):
            value = torch.rand(count, 2)[:, 0] + 0.1 if any_of(True, False) else torch.rand(count) + 0.1
            value = any_of(value, value, value.half(), value.double(), value.to("meta"), value[:1], value.int())
            if any_of(False, False, True):
                value = torch.complex(value.float(), -value.float()).conj().imag  # lies in memory with the other sign
            setattr(quantizer, name, nn.Parameter(value, requires_grad=value.is_floating_point()))
        shape, dtype = any_of((4, 3), (2, 3, 2), (0, 3), (3,), ()), any_of(torch.float32, torch.float64, torch.bfloat16)
        x = any_of(torch.randn(shape), torch.randn(shape).to("meta")).to(dtype).requires_grad_()
        try:
            y = quantizer(x)
            y.sum().backward()
        except (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError):
            continue
        assert (y.shape, y.dtype, y.device) == (x.shape, dtype, x.device)
        if not x.is_meta:
            plain = (quantizer.scale.detach().resolve_neg(), quantizer.zero_point.detach().resolve_neg())
            expected = lfq.fake_quantize(x.detach(), *plain, quant_min=0, quant_max=15, axis=1)
            assert_bit_equal(y.detach(), expected)


# ---- made without values, on the meta device ------------------------------------------------------------------------


@each_kind
def test_a_quantizer_on_the_meta_device_gives_shapes(kind: str) -> None:
    for phase in PHASES:
        quantizer = MAKERS[kind]().to("meta")
        quantizer.phase = phase
        if "torch" not in kind or phase in ("off", "learn", "freeze"):
            assert quantizer(X.to("meta")).shape == X.shape


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if "torch" not in kind])
def test_a_quantizer_emptied_on_a_device_is_as_new_once_its_parameters_are_reset(kind: str) -> None:
    quantizer, new = used(kind).to("meta").to_empty(device="cpu"), MAKERS[kind]()
    for tensor in (*quantizer.parameters(), *quantizer.buffers()):
        tensor.data.fill_(-7 if tensor.is_floating_point() else 99)  # what memory happens to hold
    for module in quantizer.modules():
        module.reset_parameters()
    quantizer.phase, quantizer.quant_min, quantizer.quant_max = new.phase, new.quant_min, new.quant_max
    quantizer.observer.quant_min, quantizer.observer.quant_max = new.quant_min, new.quant_max
    assert not quantizer.saw_data()
    assert not quantizer.learned
    for each in (quantizer, new):
        each.train()(X)
    assert_same_quantizer(quantizer, new)


def test_a_model_attached_on_the_meta_device_is_emptied_reset_and_trained() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
        lfq.attach(model, weight=4, activation=4)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x = torch.randn(5, 2, 4, 4)
    lfq.calibrate(model, [x])
    lfq.set_phase(model, "learn")
    model(x).square().sum().backward()
    for name, quantizer in lfq.quantizers(model).items():
        assert quantizer.scale.grad.isfinite().all(), name
        assert 0 < quantizer.scale.max() < 10, name
