"""What an earlier version has written is loaded and resumed, and what is written for it now is the same."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lfq_lightning as lfq
from lfq_lightning.records.files import History, RunFiles, Trajectory
from lfq_lightning.records.history import read_qparams
from lfq_lightning.records.trajectory import read_trajectory
from tests.runs import BATCHES, Net, every_epoch, fit

# `fit` with four epochs, recorded by the version before the files' writer was one; the checkpoint is of the third.
RECORDED = Path(__file__).parent / "recorded"
STEP = 3 * BATCHES


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of the earlier run, in which its checkpoint finds its files."""
    directory = tmp_path / "earlier"
    directory.mkdir()
    for file in RECORDED.glob("*.gz"):
        (directory / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
    checkpoint = torch.load(directory / "epoch=2.ckpt", weights_only=True)
    checkpoint["callbacks"]["QuantizationAwareTraining"]["recorder"]["path"] = str(directory / "trajectory.csv")
    torch.save(checkpoint, directory / "epoch=2.ckpt")
    return directory


def test_what_was_read_is_written_as_it_was(run: Path, tmp_path: Path) -> None:
    rows = read_trajectory(run / "trajectory.csv")
    trajectory = Trajectory(tmp_path / "again")
    for step in dict.fromkeys(row.step for row in rows):
        trajectory.append([row for row in rows if row.step == step])
    assert trajectory.path.read_bytes() == (run / "trajectory.csv").read_bytes()
    found, history = read_qparams(run / "qparams.npz"), History(tmp_path / "again")
    for i, step in enumerate(found["step"]):
        vectors = {key: values[i] for key, values in found.items() if key not in ("step", "epoch", "phase")}
        history.append(int(step), int(found["epoch"][i]), str(found["phase"][i]), vectors)
    assert_equal_arrays(read_qparams(history.path), found)


def test_every_entry_up_to_the_step_of_the_checkpoint_is_carried_over_bit_for_bit(run: Path, tmp_path: Path) -> None:
    header, *lines = (run / "trajectory.csv").read_text().splitlines(keepends=True)
    kept = [line for line in lines if int(line.split(",")[0]) <= STEP]
    assert 0 < len(kept) < len(lines)
    carried = Trajectory(tmp_path / "again", continue_from=run / "trajectory.csv", step=STEP)
    assert carried.path.read_text() == "".join([header, *kept])
    found = read_qparams(run / "qparams.npz")
    history = History(tmp_path / "again", continue_from=run / "qparams.npz", step=STEP)
    assert_equal_arrays(read_qparams(history.path), {key: values[:3] for key, values in found.items()})


def test_the_checkpoint_is_loaded_bit_for_bit(run: Path) -> None:
    saved, loaded = (
        {key: value for key, value in state.items() if isinstance(value, Tensor) and value.is_floating_point()}
        for state in (
            torch.load(run / "epoch=2.ckpt", weights_only=True)["state_dict"],
            lfq.load_from_checkpoint(Net, run / "epoch=2.ckpt").state_dict(),
        )
    )
    assert sum(key.endswith(".scale") for key in loaded) == 6
    for key, value in loaded.items():
        assert torch.equal(saved[key], value), key


def test_the_run_is_resumed_and_goes_on_as_the_earlier_version_did(run: Path, tmp_path: Path) -> None:
    fit(tmp_path / "resumed", ckpt_path=run / "epoch=2.ckpt", callbacks=[every_epoch(tmp_path)], max_epochs=4)
    found, expected = (read_trajectory(directory / "trajectory.csv") for directory in (tmp_path / "resumed", run))
    moments = [[(row.step, row.epoch, row.phase, row.quantizer) for row in rows] for rows in (found, expected)]
    assert moments[0] == moments[1]
    before = sum(row.step <= STEP for row in expected)
    assert found[:before] == expected[:before]
    assert len(found) > before
    for ours, theirs in zip(found[before:], expected[before:], strict=True):  # another processor rounds otherwise
        assert ours.scale_mean == pytest.approx(theirs.scale_mean, rel=1e-3), ours
    vectors, earlier = (read_qparams(directory / "qparams.npz") for directory in (tmp_path / "resumed", run))
    assert list(vectors) == list(earlier)
    assert_equal_arrays(*({key: values[:3] for key, values in file.items()} for file in (vectors, earlier)))
    assert all(vectors[key].shape == values.shape for key, values in earlier.items())


def test_a_run_that_stopped_in_its_first_epoch_is_resumed_without_a_word(run: Path, tmp_path: Path) -> None:
    (run / "qparams.npz").unlink()
    RunFiles(str(tmp_path / "again"), str(run / "trajectory.csv"), STEP).close()  # warnings are errors
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["trajectory.csv"]


def assert_equal_arrays(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for key, values in expected.items():
        assert found[key].dtype == values.dtype and np.array_equal(found[key], values), key
