"""LearnableFakeQuantize: the seed's constructor, states and switches, and what each phase does."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import lfq_lightning as lfq
from lfq_lightning import LearnableFakeQuantize, QuantSpec
from lfq_lightning.observers import MinMaxObserver, MovingAverageObserver
from lfq_lightning.schedule import PHASES
from tests.assertions import assert_bit_equal, assert_on_grid
from tests.samples import BACKENDS, on

pytestmark = pytest.mark.quick

QUANTIZING = ("estimate", "learn", "freeze")


def affine(phase: str = "estimate", **arguments: Any) -> LearnableFakeQuantize:
    quantizer = LearnableFakeQuantize(MinMaxObserver(0, 15), quant_min=0, quant_max=15, **arguments)
    quantizer.phase = phase
    return quantizer


def qparams(quantizer: LearnableFakeQuantize) -> tuple[list[float], list[float]]:
    return quantizer.scale.tolist(), quantizer.zero_point.tolist()


# ---- the constructor ------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_seeds() -> None:
    quantizer = LearnableFakeQuantize(MinMaxObserver())
    assert (quantizer.quant_min, quantizer.quant_max, quantizer.bitwidth) == (0, 255, 8)
    assert qparams(quantizer) == ([1.0], [0.0])
    assert (quantizer.fake_quant_enabled, quantizer.static_enabled, quantizer.learning_enabled) == (True, True, False)
    assert quantizer.grad_factor == 1.0
    assert quantizer.scale.dtype is quantizer.zero_point.dtype is torch.float32


def test_arguments_are_taken_by_position_as_in_the_seed() -> None:
    quantizer = LearnableFakeQuantize(MinMaxObserver(-8, 7, axis=1, channels=3), -8, 7, 0.5, 2.0, 3, 0.25)
    assert qparams(quantizer) == ([0.5] * 3, [2.0] * 3)
    assert (quantizer.axis, quantizer.grad_factor) == (1, 0.25)


@pytest.mark.parametrize(
    ("codes", "bits"), [((0, 255), 8), ((-128, 127), 8), ((-7, 7), 4), ((0, 15), 4), ((0, 16), 5), ((-2, 1), 2)]
)
def test_the_bitwidth_is_what_holds_every_code(codes: tuple[int, int], bits: int) -> None:
    assert LearnableFakeQuantize(MinMaxObserver(*codes), *codes).bitwidth == bits


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        ({"quant_min": 15, "quant_max": 0}, ValueError, "`quant_min` must be less than `quant_max`. Found 15 and 0"),
        ({"quant_min": 0.5}, TypeError, "`quant_min` must be an int. Found 0.5"),
        ({"channel_len": 0}, ValueError, "`channel_len` must be the number of channels, or -1.*Found 0"),
        ({"channel_len": 2.0}, ValueError, "`channel_len` must be the number of channels, or -1.*Found 2.0"),
        ({"channel_len": True}, ValueError, "`channel_len` must be the number of channels, or -1.*Found True"),
        ({"scale": 0.0}, ValueError, "`scale` must be positive and finite. Found 0.0"),
        ({"scale": float("inf")}, ValueError, "`scale` must be positive and finite. Found inf"),
        ({"scale": float("nan")}, ValueError, "`scale` must be positive and finite. Found nan"),
        ({"zero_point": float("nan")}, ValueError, "`zero_point` must be finite. Found nan"),
        ({"grad_factor": "sqrt"}, ValueError, "`grad_factor` must be a number or \"lsq\". Found 'sqrt'"),
    ],
    ids=str,
)
def test_a_wrong_argument_raises_with_the_rule_and_what_was_found(
    wrong: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        LearnableFakeQuantize(MinMaxObserver(0, 15), **{"quant_min": 0, "quant_max": 15, **wrong})


# ---- states and switches --------------------------------------------------------------------------------------------


def test_the_seeds_named_states_set_its_three_switches_and_chain() -> None:
    quantizer = affine()
    states = {
        "learn": (quantizer.enable_param_learning, (True, False, True)),
        "estimate": (quantizer.enable_static_estimate, (True, True, False)),
        "observe": (quantizer.enable_static_observation, (False, True, False)),
    }
    for phase, (enable, switches) in states.items():
        assert enable() is quantizer
        assert quantizer.phase == phase
        found = (quantizer.fake_quant_enabled, quantizer.static_enabled, quantizer.learning_enabled)
        assert found == switches


def test_the_switches_make_the_phases_one_by_one() -> None:
    quantizer = affine("off")
    assert quantizer.toggle_observer_update() is quantizer
    assert quantizer.phase == "observe"
    assert quantizer.toggle_fake_quant().phase == "estimate"
    assert quantizer.toggle_observer_update(False).phase == "freeze"
    assert quantizer.toggle_qparam_learning().phase == "learn"
    assert quantizer.toggle_fake_quant(False).phase == "mixed"
    quantizer.learning_enabled = False
    assert quantizer.phase == "off"


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_is_set_by_name_and_read_back(phase: str) -> None:
    assert affine(phase).phase == phase
    assert affine(phase).extra_repr() == f"a4 affine per_tensor {phase}"


def test_a_word_that_is_no_phase_is_refused() -> None:
    with pytest.raises(ValueError, match=r"A phase is one of off, .* Found 'train'"):
        affine("train")


def test_the_label_names_symmetry_and_granularity() -> None:
    weight = QuantSpec(bits=4, granularity="per_channel")
    groups = QuantSpec(bits=3, granularity="per_group", group_size=32)
    from_spec = LearnableFakeQuantize.from_spec
    assert from_spec(weight, 8, weight=True).extra_repr() == "w4 symmetric per_channel(0) estimate"
    assert from_spec(groups, 8, weight=True).extra_repr() == "w3 symmetric per_group(32) estimate"
    assert from_spec(QuantSpec(symmetric=False)).start_off().extra_repr() == "a8 affine per_tensor off"


# ---- phases ---------------------------------------------------------------------------------------------------------


def test_off_passes_x_on_and_observes_nothing() -> None:
    quantizer, x = affine("off"), torch.randn(9)
    assert_bit_equal(quantizer(x), x)
    assert not quantizer.observer.saw_data()
    assert qparams(quantizer) == ([1.0], [0.0])


def test_observe_passes_x_on_and_changes_the_observer_alone() -> None:
    quantizer, x = affine("observe"), torch.linspace(-1, 2, 9)
    assert_bit_equal(quantizer(x), x)
    assert qparams(quantizer) == ([1.0], [0.0])
    scale, zero_point = quantizer.calculate_qparams()
    assert (scale.item(), zero_point.item()) == (pytest.approx(0.2), 5.0)


def test_estimate_quantizes_with_what_the_observer_says() -> None:
    quantizer, x = affine("estimate"), torch.linspace(-1, 2, 99)
    y = quantizer(x)
    assert qparams(quantizer) == ([pytest.approx(0.2)], [5.0])
    assert_on_grid(y.detach(), quantizer.scale.item(), 5.0, 0, 15)
    expected = lfq.fake_quantize(x, quantizer.scale, quantizer.zero_point, quant_min=0, quant_max=15)
    assert_bit_equal(y, expected)


@pytest.mark.parametrize("phase", ["learn", "freeze"])
def test_learn_and_freeze_quantize_with_the_qparams_there_are(phase: str) -> None:
    quantizer, x = affine(phase, scale=0.3, zero_point=4.0), torch.randn(99)
    expected = lfq.fake_quantize(x, torch.tensor([0.3]), torch.tensor([4.0]), quant_min=0, quant_max=15)
    assert_bit_equal(quantizer(x), expected)
    assert not quantizer.observer.saw_data()
    assert qparams(quantizer) == ([pytest.approx(0.3)], [4.0])


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("observer", [MinMaxObserver, MovingAverageObserver])
def test_eval_never_observes_and_never_moves_the_scale(phase: str, observer: Any) -> None:
    quantizer = LearnableFakeQuantize(observer(0, 15), 0, 15)
    quantizer(torch.linspace(0, 3, 9))
    quantizer.phase = phase
    before = {k: v.clone() for k, v in quantizer.state_dict().items() if isinstance(v, torch.Tensor)}
    quantizer.eval()(torch.linspace(-50, 50, 9))
    for name, value in before.items():
        assert_bit_equal(quantizer.state_dict()[name], value)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_result_has_the_shape_and_dtype_of_x_in_every_phase(phase: str, dtype: torch.dtype) -> None:
    y = affine(phase)(torch.randn(2, 3, 4, dtype=dtype))
    assert (y.dtype, y.shape) == (dtype, (2, 3, 4))


@pytest.mark.parametrize("phase", PHASES)
def test_the_result_may_be_changed_in_place_in_every_phase(phase: str) -> None:
    x = torch.randn(5, requires_grad=True)
    torch.relu_(affine(phase)(x * 1.0)).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("phase", PHASES)
def test_integers_are_refused_in_every_phase_that_looks_at_them(phase: str) -> None:
    if phase != "off":
        with pytest.raises(TypeError, match=r"floating.*torch\.int64"):
            affine(phase)(torch.arange(5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("phase", QUANTIZING)
def test_another_number_of_channels_is_refused_by_name(phase: str, backend: str) -> None:
    quantizer = LearnableFakeQuantize(MinMaxObserver(0, 15, axis=1, channels=3), 0, 15, channel_len=3)
    quantizer.phase = phase
    with on(backend), pytest.raises(ValueError, match=r"must have shape \(4,\) for x of shape \(2, 4\). Found 3"):
        quantizer.eval()(torch.randn(2, 4))


def test_an_empty_batch_changes_nothing() -> None:
    quantizer = affine()
    quantizer(torch.linspace(0, 3, 9))
    before = qparams(quantizer)
    assert quantizer(torch.empty(0, 4)).shape == (0, 4)
    assert qparams(quantizer) == before


def test_printing_the_qparams(capsys: pytest.CaptureFixture[str]) -> None:
    affine(scale=0.25, zero_point=3.0).observe_quant_params()
    assert capsys.readouterr().out.splitlines() == [
        "LearnableFakeQuantize scale: tensor([0.2500])",
        "LearnableFakeQuantize zero_point: tensor([3.])",
    ]


def test_values_that_are_not_finite_warn_once_and_are_left_out() -> None:
    quantizer = affine()
    with pytest.warns(UserWarning, match="NaN or infinite"):
        y = quantizer(torch.tensor([0.0, 3.0, torch.nan, torch.inf]))
    assert quantizer.scale.item() == pytest.approx(0.2)
    assert y.tolist() == [0.0, pytest.approx(3.0), pytest.approx(torch.nan, nan_ok=True), pytest.approx(3.0)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer(torch.tensor([torch.nan]))


def test_the_saturated_share_counts_what_is_clamped_to_the_codes() -> None:
    quantizer = affine(scale=1.0)
    assert quantizer.saturation(torch.tensor([-0.4, 0.0, 15.0, 15.4])).tolist() == [0.0, 0.0]
    assert quantizer.saturation(torch.tensor([-1.0, 3.0, 20.0, 30.0])).tolist() == [0.75, 0.0]
    assert quantizer.saturation(torch.tensor([3.0, torch.nan])).tolist()[1] == 1.0
