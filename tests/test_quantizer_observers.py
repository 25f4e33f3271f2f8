"""LearnableFakeQuantize works with its own observers and with those of torch.ao, and refuses what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.ao import quantization as ao

import lfq_lightning as lfq
from lfq_lightning import LearnableFakeQuantize
from lfq_lightning.observers import MinMaxObserver
from tests.assertions import assert_bit_equal

pytestmark = pytest.mark.quick


def qparams(quantizer: LearnableFakeQuantize) -> tuple[list[float], list[float]]:
    return quantizer.scale.tolist(), quantizer.zero_point.tolist()


def test_codes_that_the_dtype_of_the_observer_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.qint8 holds -128 to 127\. Found quant_min=0 and quant_max=255"):
        LearnableFakeQuantize(ao.MinMaxObserver(dtype=torch.qint8), 0, 255)


def test_as_many_channels_as_the_observer_has_are_needed() -> None:
    with pytest.raises(ValueError, match=r"`channel_len`.*3"):
        LearnableFakeQuantize(MinMaxObserver(0, 15, axis=0, channels=3), 0, 15)
    with pytest.raises(ValueError, match=r"`channel_len`.*3"):
        LearnableFakeQuantize(MinMaxObserver(0, 15, axis=0), 0, 15, channel_len=3)


@pytest.mark.parametrize("observer", [MinMaxObserver, ao.MinMaxObserver])
def test_the_estimate_fills_the_codes_of_the_quantizer_whatever_the_observer_was_told(observer: Any) -> None:
    quantizer = LearnableFakeQuantize(observer(), quant_min=0, quant_max=15)
    quantizer(torch.linspace(0, 3, 31))
    assert quantizer.scale.item() == pytest.approx(0.2)


def test_an_observer_without_qparams_is_refused() -> None:
    with pytest.raises(TypeError, match="calculate_qparams"):
        LearnableFakeQuantize(nn.Identity())


@pytest.mark.parametrize(
    ("observer", "codes", "channels"),
    [
        (ao.MinMaxObserver(dtype=torch.quint8), (0, 255), -1),
        (ao.MinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric), (-128, 127), -1),
        (ao.MinMaxObserver(dtype=torch.quint8, quant_min=0, quant_max=15), (0, 15), -1),
        (ao.MovingAverageMinMaxObserver(dtype=torch.quint8), (0, 255), -1),
        (ao.HistogramObserver(dtype=torch.quint8), (0, 255), -1),
        (ao.PerChannelMinMaxObserver(ch_axis=1, dtype=torch.quint8), (0, 255), 3),
        (ao.PerChannelMinMaxObserver(dtype=torch.qint8, qscheme=torch.per_channel_symmetric), (-128, 127), 4),
        (ao.MovingAveragePerChannelMinMaxObserver(ch_axis=1, dtype=torch.quint8), (0, 255), 3),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_the_observers_of_torch_estimate_and_then_learning_starts_from_there(
    observer: Any, codes: tuple[int, int], channels: int
) -> None:
    quantizer = LearnableFakeQuantize(observer, *codes, channel_len=channels)
    x = torch.randn(4, 3, 5)
    quantizer(x)
    scale, zero_point = observer.calculate_qparams()
    assert quantizer.scale.tolist() == scale.tolist()
    assert quantizer.zero_point.tolist() == zero_point.tolist()
    axis = None if channels == -1 else observer.ch_axis
    quantizer.enable_param_learning()
    y = quantizer(x * 2)
    expected = lfq.fake_quantize(x * 2, scale, zero_point.float(), quant_min=codes[0], quant_max=codes[1], axis=axis)
    assert_bit_equal(y, expected)
    y.sum().backward()
    assert quantizer.scale.grad is not None
    assert isinstance(quantizer.zero_point, nn.Parameter) == ("symmetric" not in str(observer.qscheme))


def test_an_observer_of_torch_sees_nothing_in_eval() -> None:
    observer = ao.MinMaxObserver(dtype=torch.quint8)
    quantizer = LearnableFakeQuantize(observer)
    quantizer(torch.linspace(0, 1, 5))
    before = qparams(quantizer)
    quantizer.eval()(torch.linspace(-9, 9, 5))
    assert qparams(quantizer) == before
    assert observer.max_val.item() == 1.0
