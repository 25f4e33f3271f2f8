"""LearnableFakeQuantize.from_spec: the quantizer that a specification describes."""

from __future__ import annotations

import pytest
import torch

from lfq_lightning import LearnableFakeQuantize, QuantSpec

pytestmark = pytest.mark.quick


def test_the_number_of_scales_goes_with_the_granularity() -> None:
    for spec, channels in ((QuantSpec(), 4), (QuantSpec(granularity="per_channel"), None)):
        with pytest.raises(ValueError, match=f"`channels` must be .*{spec.granularity}.* Found {channels}"):
            LearnableFakeQuantize.from_spec(spec, channels)


def test_channels_are_outputs_of_a_weight_and_dimension_one_of_an_activation() -> None:
    spec = QuantSpec(granularity="per_channel")
    assert LearnableFakeQuantize.from_spec(spec, 4, weight=True).axis == 0
    assert LearnableFakeQuantize.from_spec(spec, 4).axis == 1
    assert LearnableFakeQuantize.from_spec(spec, 4, weight=True, axis=1).axis == 1
    named = QuantSpec(granularity="per_channel", axis=-1)
    assert LearnableFakeQuantize.from_spec(named, 4, axis=1).axis == -1


@pytest.mark.parametrize(
    ("signed", "weight", "low", "codes", "scale"),
    [
        (None, False, 0.0, (0, 15), 0.2),
        (None, False, -1.0, (-8, 7), 3 / 7),
        (None, True, 0.0, (-8, 7), 3 / 7),
        (True, False, 0.0, (-8, 7), 3 / 7),
        (False, False, -1.0, (0, 15), 0.2),
    ],
)
def test_the_data_decide_the_sign_of_a_symmetric_activation_that_leaves_it_open(
    signed: bool | None, weight: bool, low: float, codes: tuple[int, int], scale: float
) -> None:
    quantizer = LearnableFakeQuantize.from_spec(QuantSpec(bits=4, signed=signed, observer="minmax"), weight=weight)
    quantizer(torch.linspace(low, 3, 31))
    assert (quantizer.quant_min, quantizer.quant_max) == codes
    assert quantizer.scale.item() == pytest.approx(scale)
    assert quantizer.zero_point.item() == 0.0


def test_groups_of_a_weight_have_a_scale_each() -> None:
    weight = torch.tensor([[7.0, 1.0, 14.0, 2.0, 21.0], [28.0, 3.0, 35.0, 4.0, -48.0]])
    spec = QuantSpec(bits=4, granularity="per_group", group_size=2, observer="minmax")
    quantizer = LearnableFakeQuantize.from_spec(spec, 6, weight=True)
    y = quantizer(weight)
    assert quantizer.scale.tolist() == pytest.approx([1, 2, 3, 4, 5, 6])
    assert y.tolist() == [[7.0, 1.0, 14.0, 2.0, 21.0], [28.0, 4.0, 35.0, 5.0, -48.0]]


def test_a_weight_is_observed_anew_each_time_and_an_activation_accumulates() -> None:
    for weight, scale in ((True, 1 / 7), (False, 3 / 7)):
        quantizer = LearnableFakeQuantize.from_spec(QuantSpec(bits=4, signed=True, observer="minmax"), weight=weight)
        quantizer(torch.linspace(0, 3, 9))
        quantizer(torch.linspace(0, 1, 9))
        assert quantizer.scale.item() == pytest.approx(scale)
