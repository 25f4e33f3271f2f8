"""Bit annealing: stages with the clipping range carried over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lfq_lightning as lfq
from lfq_lightning.techniques.bit_annealing import carried_over, change_range
from tests.runs import Net, every_epoch, fit, qat
from tests.test_resume import assert_same_run

pytestmark = pytest.mark.quick

SCHEDULE = lfq.PhaseSchedule(0, 1, 2)
STAGES = {0: 8, 3: 4, 5: 2}


def two_bits(**options: Any) -> lfq.QuantizationAwareTraining:
    return qat(weight=2, activation=2, schedule=SCHEDULE, **options)


class Ranges(L.Callback):
    """Notes each epoch's range of codes, clipping range and what the qparams' optimizer remembers."""

    def __init__(self) -> None:
        self.codes: dict[str, list[tuple[int, int]]] = {}
        self.steps: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        for name, quantizer in lfq.quantizers(pl_module).items():
            assert (quantizer.observer.quant_min, quantizer.observer.quant_max) == quantizer.code_range
            seen = self.codes.setdefault(name, [])
            if seen[-1:] != [quantizer.code_range]:
                seen.append(quantizer.code_range)
        own = trainer.callbacks[0].qparam_optimizer.optimizers[0]
        self.steps.append(min((float(s["step"]) for s in own.state.values()), default=0.0))


@pytest.mark.parametrize("new", [(0, 15), (0, 3), (-8, 7), (-1, 1)])
def test_the_clipping_range_is_kept(new: tuple[int, int]) -> None:
    scale, zero_point = torch.tensor([0.02, 0.5]), torch.tensor([10.0, 200.0])
    then_scale, then_zero_point = carried_over(scale, zero_point, (0, 255), new)
    for code, code_then in zip((0, 255), new, strict=True):
        torch.testing.assert_close(then_scale * (code_then - then_zero_point), scale * (code - zero_point))


def test_a_range_that_does_not_begin_at_zero_keeps_its_clipping_range_too() -> None:
    scale, zero_point = torch.tensor([0.1]), torch.tensor([-128.0])
    then_scale, then_zero_point = carried_over(scale, zero_point, (-128, 127), (-8, 7))
    torch.testing.assert_close(then_scale, torch.tensor([1.7]))
    torch.testing.assert_close(then_zero_point, torch.tensor([-8.0]))  # 0 stays the least that is represented


def test_without_data_the_clipping_range_is_kept_and_the_reference_scale_follows() -> None:
    quantizer = lfq.LearnableFakeQuantize.from_spec(lfq.QuantSpec(bits=2), weight=True)
    change_range(quantizer, (-128, 127))
    quantizer.scale.data.fill_(0.01)
    quantizer.scale_reference.fill_(0.02)
    change_range(quantizer, (-2, 1))
    torch.testing.assert_close(quantizer.scale_reference / quantizer.scale, torch.tensor([2.0]))
    assert quantizer.zero_point.item() == 0.0
    assert quantizer.scale.item() == pytest.approx(0.85)


def test_qparams_are_those_of_a_fresh_quantizer_of_these_bits() -> None:
    weight, x = torch.randn(4, 9), torch.randn(64).relu()
    made = []
    for bits in (4, 2):
        spec = lfq.QuantSpec(bits=bits, granularity="per_channel", axis=0)
        of_weight = lfq.LearnableFakeQuantize.from_spec(spec, 4, weight=True)
        of_input = lfq.LearnableFakeQuantize.from_spec(lfq.QuantSpec(bits=bits, symmetric=False))
        of_weight.estimate_from(weight)
        of_input.estimate_from(x)
        made.append((of_weight, of_input))
    change_range(made[0][0], (-2, 1), weight)
    change_range(made[0][1], (0, 3))
    for found, expected in zip(*made, strict=True):
        assert torch.equal(found.scale, expected.scale)
        assert torch.equal(found.scale_reference, expected.scale)
        assert torch.equal(found.zero_point, expected.zero_point)


def test_stages_lower_the_bits_of_the_inner_layer_and_leave_the_first_and_last_at_eight(tmp_path: Path) -> None:
    ranges = Ranges()
    model, _, _ = fit(tmp_path, callback=two_bits(), callbacks=[lfq.BitAnnealing(STAGES), ranges], max_epochs=7)
    assert ranges.codes["second.weight_quantizer"] == [(-128, 127), (-8, 7), (-2, 1)]
    assert ranges.codes["second.input_quantizer"] == [(0, 255), (0, 15), (0, 3)]
    for name in ("first", "head"):
        assert ranges.codes[f"{name}.weight_quantizer"] == [(-128, 127)]
        assert ranges.codes[f"{name}.input_quantizer"] == [(0, 255)]
    assert ranges.steps[-1] == 16  # of two epochs in the last stage: momentum before it is forgotten
    assert len(model.second(torch.randn(1, 4, 8, 8)).unique()) > 1


def test_codes_whose_sign_the_data_decides_are_annealed_too(tmp_path: Path) -> None:
    ranges = Ranges()
    activation = lfq.QuantSpec(bits=2, symmetric=True)
    callback = two_bits()
    callback.activation = activation
    fit(tmp_path, callback=callback, callbacks=[lfq.BitAnnealing(STAGES), ranges], max_epochs=7)
    assert ranges.codes["second.input_quantizer"][-3:] == [(0, 255), (0, 15), (0, 3)]


def test_a_resumed_run_equals_the_uninterrupted_one_and_checkpoints_say_the_final_bits(tmp_path: Path) -> None:
    def run(directory: Path, **more: Any) -> tuple[Any, ...]:
        callbacks = [lfq.BitAnnealing(STAGES), every_epoch(tmp_path)]
        return fit(directory, callback=two_bits(), callbacks=callbacks, max_epochs=6, **more)

    whole = run(tmp_path)
    for epoch in (1, 2, 3, 4):
        assert_same_run(run(tmp_path / str(epoch), ckpt_path=tmp_path / f"epoch={epoch}.ckpt"), whole)
    midway = lfq.load_from_checkpoint(Net, tmp_path / "epoch=3.ckpt")
    assert midway.second.weight_quantizer.code_range == (-8, 7)
    assert midway.second.weight_quantizer.spec.bits == 2


@pytest.mark.parametrize(
    ("stages", "epochs", "message"),
    [({0: 8, 9: 2}, 5, "end with 8 bits"), ({0: 8, 1: 4}, 5, "must end with the bits"), ({0: 8, 1: 2}, 5, None)],
)
def test_a_run_that_would_not_end_with_its_bits_is_refused(
    tmp_path: Path, stages: dict[int, int], epochs: int, message: str | None
) -> None:
    if message is None:
        fit(tmp_path, callback=two_bits(), callbacks=[lfq.BitAnnealing(stages)], max_epochs=epochs)
        return
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, callback=two_bits(), callbacks=[lfq.BitAnnealing(stages)], max_epochs=epochs)


@pytest.mark.parametrize("stages", [{}, {1: 8}, {0: 4, 2: 8}, {0: 4, 2: 4}, {0: 32}, {0: 8, 2: 1}])
def test_stages_out_of_order_or_range_are_refused(stages: dict[int, int]) -> None:
    with pytest.raises(ValueError, match="`bits` must"):
        lfq.BitAnnealing(stages)


def test_the_wrong_order_of_callbacks_is_refused_with_the_right_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"QuantizationAwareTraining\(...\), BitAnnealing"):
        fit(tmp_path, callback=lfq.BitAnnealing(STAGES), callbacks=[two_bits()], max_epochs=7)
