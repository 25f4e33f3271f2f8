"""Kills, full disks, bad batches, broken checkpoints: what a run survives, and how it ends where it does not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lfq_lightning as lfq
from tests.processes import run_python
from tests.ranks import start_two
from tests.runs import Net, every_epoch, fit, images, loader, qat, trainer

ROOT = Path(__file__).parents[1]
BATCHES = 3  # of an epoch into which a bad one falls

KILLED = """
import os, random, signal, sys, threading, warnings
from pathlib import Path
import lightning as L, torch
from lightning.pytorch.callbacks import ModelCheckpoint
import lfq_lightning as lfq
from tests.runs import StatefulLoader, fit, qat

warnings.simplefilter("ignore")
torch.set_num_threads(1)
directory, kills, epochs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
random.seed(kills)

class Killed(L.Callback):
    # Counted in batches, so that a slow machine gets as far; within the last, any moment.
    def __init__(self, batches, seconds):
        self.batches, self.seconds = batches, seconds

    def on_train_batch_start(self, trainer, *_):
        Path(trainer.default_root_dir, "started").write_text(str(trainer.global_step))
        self.batches -= 1
        if self.batches == 0:
            threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

def train(where, killed):
    where.mkdir(exist_ok=True)
    last = where / "last.ckpt"
    keep = ModelCheckpoint(where, "{step}", every_n_train_steps=1, save_last=True)
    schedule = lfq.PhaseSchedule(observe=0, estimate=1, learn=2, freeze=8 * epochs - 4, unit="step")
    run = {"callback": qat(schedule=schedule), "callbacks": [killed, keep], "data": StatefulLoader()}
    model, made, _ = fit(where, ckpt_path=last if last.exists() else None, max_epochs=epochs, **run)
    torch.save(model.state_dict(), where / "final.pt")

def in_a_process(where, batches=-1, seconds=0.0):
    child = os.fork()
    if child == 0:
        train(where, Killed(batches, seconds))
        os._exit(0)
    return os.waitpid(child, 0)[1]

assert in_a_process(directory / "whole") == 0
for _ in range(kills):
    ended = in_a_process(directory / "killed", random.randint(1, 7), random.uniform(0.0, 0.03))
    assert os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGKILL, ended
    last = directory / "killed/last.ckpt"
    step = int((directory / "killed/started").read_text() or 0)
    assert step == 0 or torch.load(last, weights_only=True)["global_step"] >= step
assert in_a_process(directory / "killed") == 0
"""


@pytest.mark.parametrize(
    ("kills", "epochs"),
    [
        (3, 4),
        pytest.param(20, 28, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    tmp_path: Path, kills: int, epochs: int
) -> None:
    arguments = ["-c", KILLED, tmp_path, str(kills), str(epochs)]
    done = run_python(*arguments, cwd=ROOT, directory=tmp_path, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, killed = (torch.load(tmp_path / kind / "final.pt") for kind in ("whole", "killed"))
    for key, value in whole.items():
        assert torch.equal(killed[key], value) if isinstance(value, Tensor) else killed[key] == value, key
    rows = [(tmp_path / kind / "trajectory.csv").read_text() for kind in ("whole", "killed")]
    assert rows[0] == rows[1]


# ---- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [None, "user"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("phase", ["observe", "estimate", "learn", "freeze"])
def test_a_bad_batch_leaves_every_quantizer_finite(tmp_path: Path, phase: str, value: float, optimizer: Any) -> None:
    at = ["observe", "estimate", "learn", "freeze"].index(phase) * BATCHES + 1

    class Bad(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.second(torch.relu(self.first(x)))).flatten(1))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if self.trainer.global_step != at:
                return super().training_step(batch, batch_idx)
            x = batch[0].clone()
            x[0] = value
            return super().training_step([x, batch[1]], batch_idx).nan_to_num(0.0) * 0.0

        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                if parameter.grad is not None and parameter.ndim > 1:  # the user guards the weights
                    parameter.grad.nan_to_num_(0.0, 0.0, 0.0)

    schedule = lfq.PhaseSchedule(0, 1, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callback = qat(schedule=schedule, optimizer=optimizer)
        short = {"max_epochs": 4, "limit_train_batches": BATCHES, "limit_val_batches": 0}
        model, _, _ = fit(tmp_path, Bad(), callback=callback, **short)
    for name, quantizer in lfq.quantizers(model).items():
        assert quantizer.scale.isfinite().all(), name
        assert (quantizer.scale > 0).all(), name
        assert quantizer.zero_point.isfinite().all(), name


# ---- disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_stops_recording_with_one_warning_and_not_training(tmp_path: Path) -> None:
    (tmp_path / "trajectory.csv").symlink_to("/dev/full")
    with pytest.warns(UserWarning, match="No space left") as caught:
        model, made, _ = fit(tmp_path)
    assert sum("trajectory" in str(w.message) for w in caught) == 1
    assert made.current_epoch == 3
    assert {q.phase for q in lfq.quantizers(model).values()} == {"learn"}


# ---- exceptions ---------------------------------------------------------------------------------------------------

HOOKS = ["setup", "configure_model", "configure_optimizers", "on_fit_start", "on_train_start", "training_step"]
HOOKS += ["on_before_optimizer_step", "validation_step", "on_train_epoch_end"]


@pytest.mark.parametrize("optimizer", [None, "user"])
@pytest.mark.parametrize("hook", HOOKS)
def test_an_exception_anywhere_leaves_a_model_that_can_be_fitted(tmp_path: Path, hook: str, optimizer: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("on purpose")

    model = Net()
    broken = type("Broken", (Net,), {hook: fail})
    model.__class__ = broken
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(tmp_path, model, callback=qat(optimizer=optimizer), limit_train_batches=2)
    model.__class__ = Net
    assert not {"configure_model", "configure_optimizers", "on_load_checkpoint"} & set(model.__dict__)
    assert all("scale" in q._parameters for q in lfq.quantizers(model).values())
    assert {q.gathering for q in lfq.quantizers(model).values()} <= {None}
    assert torch.optim.Optimizer.__init__.__name__ == "__init__"
    assert model(images().tensors[0]).isfinite().all()
    fit(tmp_path / "again", model.train(), limit_train_batches=2)
    assert {q.phase for q in lfq.quantizers(model).values()} == {"learn"}


# ---- checkpoints --------------------------------------------------------------------------------------------------


def assert_refused_unchanged(directory: Path, path: Path, error: Any, message: str) -> None:
    torch.manual_seed(7)
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error) as raised:
        trainer(directory, [qat(), every_epoch(directory)], max_epochs=9).fit(
            model, loader(), ckpt_path=path, weights_only=True
        )
    assert message in "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert "on_load_checkpoint" not in model.__dict__


def test_a_truncated_checkpoint_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, callbacks=[every_epoch(tmp_path)])
    whole = (tmp_path / "epoch=2.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    assert_refused_unchanged(
        tmp_path, tmp_path / "cut.ckpt", (OSError, RuntimeError), "A checkpoint must be a whole file"
    )


@pytest.mark.parametrize("kind", ["another model", "wider", "without quantizers of a layer"])
def test_a_foreign_checkpoint_is_refused_and_changes_nothing(tmp_path: Path, kind: str) -> None:
    fit(tmp_path, Net(width=8) if kind == "wider" else None, callbacks=[every_epoch(tmp_path)])
    saved = torch.load(tmp_path / "epoch=2.ckpt", weights_only=True)
    message = {"wider": "has shape", "another model": "missing head.weight"}.get(kind, "the checkpoint has float")
    if kind == "another model":
        saved["state_dict"] = {key.replace("head", "tail"): v for key, v in lfq_free(saved["state_dict"]).items()}
    if kind == "without quantizers of a layer":
        saved["state_dict"] = {k: v for k, v in saved["state_dict"].items() if not k.startswith("second.input")}
    torch.save(saved, tmp_path / "foreign.ckpt")
    assert_refused_unchanged(tmp_path, tmp_path / "foreign.ckpt", ValueError, message)


def lfq_free(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if "quantizer" not in key}


# ---- ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dying", [1, 0])
def test_when_one_rank_dies_the_other_ends_with_an_error(tmp_path: Path, dying: int) -> None:
    failed = start_two(tmp_path, f"rank {dying} dies", timeout=60)
    assert failed[f"rank {dying}"].startswith("ended with -9,")
    assert failed[f"rank {1 - dying}"].startswith("ended with 1,")  # by itself: it was not ended for waiting
    assert "Error" in failed[f"rank {dying} dies"]
