"""What public functions do with wrong arguments: they say rule, found and remedy, and change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lfq_lightning as lfq
from lfq_lightning.running import example_of, inputs_of
from tests.processes import run_python
from tests.runs import Net, fit, qat

ROOT = Path(__file__).parents[1]
X, Y = torch.randn(4, 6), torch.randn(4, 3)


def test_no_call_ends_in_an_obscure_error_or_a_crash(tmp_path: Path) -> None:
    run = run_python("-m", "tests.fuzzing", "0", "2000", tmp_path, cwd=ROOT, directory=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]  # negative after a segmentation fault
    found = json.loads(run.stdout.splitlines()[-1])
    assert not found["obscure"], "\n".join(found["obscure"][:5])
    assert found["succeeded"] > 300  # the values are not all wrong
    assert found["succeeded"] + found["refused"] >= 2000


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 3))


def attached() -> nn.Module:
    model = linear()
    lfq.attach(model)
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: qat(reobserve="yes"), "`reobserve` must be True or False. Found 'yes'"),
        (lambda: qat(compress_saved="4"), "`compress_saved` must be True or False. Found '4'"),
        (lambda: qat(export=-1), "`export` must be a path. Found -1"),
        (lambda: qat(record_every_n_steps=2.5), "`record_every_n_steps` must be a whole number. Found 2.5"),
        (lambda: lfq.attach(linear(), compress_saved=1), "`compress_saved` must be True or False. Found 1"),
        (lambda: lfq.OscillationControl(freeze="4"), "`freeze` must be a number. Found '4'"),
        (lambda: lfq.Distillation(weight="0.5"), "`weight` must be a number. Found '0.5'"),
        (lambda: lfq.BatchNormStatistics(freeze=0, batches=2.5), "`batches` must be a whole number. Found 2.5"),
        (
            lambda: lfq.while_learning(qat()),
            "must judge epochs.*Found QuantizationAwareTraining.*pass it to the Trainer",
        ),
        (lambda: lfq.export_onnx(attached(), X, "x.onnx", opset=13), "`opset` must be at least 18. Found 13"),
        (lambda: lfq.quantizers(3), "`model` must be a torch.nn.Module. Found 3"),
        (lambda: lfq.attach(nn.Linear), "`model` must be a torch.nn.Module. .*make one of the class first"),
        (lambda: lfq.calibrate(attached(), X), "`batches` must give batches. Found a tensor .*put it in brackets"),
        (lambda: lfq.calibrate(attached(), {"x": X}), "`batches` must give batches. Found a dict .*put it in brackets"),
        (lambda: lfq.load_rules(b"rules.yaml"), "`path` must be a path. Found b'rules.yaml'"),
        (lambda: lfq.save_rules([], ROOT), "`path` must be a file to write. Found the directory"),
        (lambda: lfq.propose_bits([], 100), "`sensitivity` must be what `lfq_lightning.sensitivity` gave"),
        (lambda: lfq.load_from_checkpoint(Net(), "x.ckpt"), "`module_class` must be a LightningModule's class"),
    ],
)
def test_a_wrong_argument_is_named_with_what_was_found(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            [lfq.BatchNormStatistics(reestimate=99)],
            "`reestimate` must be an epoch of the run.*Found epoch 99 in a run of 3",
        ),
        ([lfq.BatchNormStatistics(freeze=3)], "`freeze` must be an epoch of the run.*Found epoch 3 in a run of 3"),
        ([qat()], "quantized by one QuantizationAwareTraining. Found 2 .*leave one, and say .*`rules`"),
    ],
)
def test_what_a_run_cannot_do_is_said_before_it_trains(callbacks: list[Any], message: str, tmp_path: Path) -> None:
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, model, callbacks=callbacks)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize(
    "technique",
    [
        lfq.Distillation(),
        lfq.BitAnnealing({0: 8, 1: 4}),
        lfq.OscillationControl(),
        lfq.BatchNormStatistics(freeze="learn"),
    ],
    ids=lambda technique: type(technique).__name__,
)
def test_a_technique_without_quantizers_is_refused_with_the_callbacks_to_use(technique: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Found Net in float: use `callbacks=\[QuantizationAwareTraining"):
        fit(tmp_path, callback=technique)


def test_an_error_of_the_models_own_code_goes_on_with_a_note_of_what_it_was_given() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        lfq.calibrate(attached(), [torch.randn(2, 5)])
    [note] = caught.value.__notes__
    assert note.startswith("Sequential must take the inputs of a batch. Found a tensor of shape (2, 5)")


class Two(nn.Module):
    """Needs two inputs, and takes a third."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.layer(x + y) * scale


def test_of_a_batch_as_many_entries_are_inputs_as_forward_must_be_given() -> None:
    assert inputs_of(linear(), [X, Y]) == ((X,), {})
    assert inputs_of(linear(), (X, Y)) == ((X,), {})
    assert inputs_of(Two(), [X, X, Y]) == ((X, X), {})
    assert inputs_of(linear(), {"input": X}) == ((), {"input": X})
    assert inputs_of(linear(), X) == ((X,), {})
    assert example_of(Two(), (X, X, 2.0)) == ((X, X, 2.0), {})  # a tuple that `forward` takes as it is
    assert example_of(linear(), (X, Y)) == ((X,), {})  # and one that it cannot: a batch


def test_every_function_that_takes_a_batch_takes_a_loaders_inputs_and_targets(tmp_path: Path) -> None:
    model, batch = attached(), [X, Y]
    lfq.calibrate(model, [batch])
    assert lfq.summarize(model, batch).rows[1].sqnr > 10
    loss = nn.functional.mse_loss
    assert lfq.sensitivity(model, [batch], loss, higher_is_better=False).rows
    assert lfq.export_onnx(model, batch, tmp_path / "m.onnx", batches=[batch]).agrees
    two = Two()
    lfq.attach(two)
    lfq.calibrate(two, [[X, X, Y]])
    assert lfq.sensitivity(two, [[X, X, Y]], loss, higher_is_better=False).rows
