"""The files that a run leaves: where there is a place for them, and nowhere else."""

from __future__ import annotations

import logging
import multiprocessing
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.records.history import read_qparams
from lfq_lightning.records.place import Place
from lfq_lightning.records.trajectory import read_trajectory
from tests.runs import Net, fit, loader, qat

pytestmark = pytest.mark.quick

SHORT: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 0}
STEPS = lfq.PhaseSchedule(observe=0, estimate=1, learn=2, unit="step")
QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, **SHORT}


class Silent(Net):
    """Logs nothing, as a barebones run wants it."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize(
    "options",
    [
        {"logger": False, "enable_checkpointing": False},
        {"barebones": True, "enable_progress_bar": None, "enable_model_summary": None, "limit_val_batches": None},
    ],
    ids=["nothing", "barebones"],
)
def test_a_run_without_a_directory_of_its_own_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {name: value for name, value in {**QUIET, **options}.items() if value is not None}
    for _ in range(2):
        model = Silent()
        L.Trainer(callbacks=[qat(schedule=STEPS)], **options).fit(model, loader())
        assert model.head.input_quantizer.phase == "learn"
    assert names(tmp_path) == set()


def test_a_barebones_run_writes_nothing_to_a_given_directory_either(tmp_path: Path) -> None:
    L.Trainer(
        callbacks=[qat(schedule=STEPS)], barebones=True, max_epochs=1, accelerator="cpu", default_root_dir=tmp_path
    ).fit(Silent(), loader())
    assert names(tmp_path) == set()


def test_a_run_that_leaves_no_files_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        L.Trainer(callbacks=[qat(schedule=STEPS)], logger=False, enable_checkpointing=False, **QUIET).fit(
            Net(), loader()
        )
    assert "This run leaves no trajectory.csv" in caplog.text


def test_files_can_be_turned_off_and_loggers_get_their_values_all_the_same(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(tmp_path, callback=qat(schedule=STEPS, write_files=False), logger=logger, **SHORT)
    assert names(Path(logger.log_dir)) == {"metrics.csv", "hparams.yaml"}
    assert "lfq/scale/head.weight_quantizer" in Path(logger.log_dir, "metrics.csv").read_text()


def test_any_number_of_runs_in_one_directory_leave_one_backup(tmp_path: Path) -> None:
    for _ in range(3):
        fit(tmp_path, callback=qat(schedule=STEPS), **SHORT)
    files = {"trajectory.csv", "qparams.npz"}
    assert names(tmp_path) == files | {f"{name}.bak" for name in files}


def _hold(directory: Path, holds: Any) -> None:
    place = Place(str(directory), ())
    holds.set()
    time.sleep(60)
    place.close()


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_second_process_in_one_directory_is_told_so_and_a_killed_one_is_in_nobodys_way(tmp_path: Path) -> None:
    forked = multiprocessing.get_context("fork")
    holds = forked.Event()
    other = forked.Process(target=_hold, args=(tmp_path, holds), daemon=True)
    (tmp_path / "trajectory.csv").write_text("of the other process")
    other.start()
    assert holds.wait(60)
    with pytest.warns(UserWarning, match=r"Found another that is writing to .* now: this one keeps no files"):
        fit(tmp_path, callback=qat(schedule=STEPS), **SHORT)
    assert (tmp_path / "trajectory.csv").read_text() == "of the other process"
    other.kill()
    other.join()
    _, _, callback = fit(tmp_path, callback=qat(schedule=STEPS), **SHORT)
    assert names(tmp_path) == {"trajectory.csv", "trajectory.csv.bak", "qparams.npz"}
    assert callback.state_dict()["recorder"]["path"] == str(tmp_path / "trajectory.csv")


def test_a_remote_run_keeps_its_files_beside_its_checkpoints_and_is_resumed_from_them(tmp_path: Path) -> None:
    root = "memory://records"
    checkpoint = ModelCheckpoint(filename="{epoch}", save_top_k=-1)
    run: dict[str, Any] = {"limit_val_batches": 0}
    fit(root, callbacks=[checkpoint], **run)
    files = MemoryFileSystem()
    assert files.exists("/records/checkpoints/epoch=1.ckpt")
    whole = _fetched(files, tmp_path / "whole")
    fit(
        root,
        callbacks=[ModelCheckpoint(filename="{epoch}", save_top_k=-1)],
        ckpt_path=f"{root}/checkpoints/epoch=1.ckpt",
        **run,
    )
    again = _fetched(files, tmp_path / "again")
    # As text, since NaN equals no NaN, and dataclasses follow it from Python 3.13 on.
    assert repr(read_trajectory(again / "trajectory.csv")) == repr(read_trajectory(whole / "trajectory.csv"))
    assert read_qparams(again / "qparams.npz")["step"].tolist() == read_qparams(whole / "qparams.npz")["step"].tolist()


def _fetched(files: MemoryFileSystem, into: Path) -> Path:
    into.mkdir()
    for name in ("trajectory.csv", "qparams.npz"):
        files.get_file(f"/records/{name}", str(into / name))
    return into
