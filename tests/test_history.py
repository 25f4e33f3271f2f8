"""The scales and zero points of every channel, epoch by epoch, survive crashes, resumed runs and full disks."""

from __future__ import annotations

import contextlib
import io
import os
import random
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

import lfq_lightning as lfq
from lfq_lightning.records import history
from lfq_lightning.records.files import History
from lfq_lightning.records.history import read_qparams
from tests.runs import BATCHES, Net, every_epoch, fit, loader, qat, trainer

KEY = "fc.weight_quantizer.scale"


def vectors(step: int, channels: int = 3) -> dict[str, Any]:
    scale = np.arange(1, channels + 1, dtype=np.float32) * step
    return {KEY: scale, KEY.replace("scale", "zero_point"): np.zeros(channels, np.float32)}


def write(directory: Path, epochs: range, **options: Any) -> History:
    kept = History(directory, **options)
    for epoch in epochs:
        kept.append(10 * (epoch + 1), epoch, "learn", vectors(epoch))
    return kept


def assert_epochs(path: Path, expected: list[int]) -> None:
    found = read_qparams(path)
    assert found["epoch"].tolist() == expected
    assert found[KEY].tolist() == [[e, 2 * e, 3 * e] for e in expected]
    assert found[KEY].dtype == np.float32


def test_each_epoch_adds_a_line_of_every_channel_that_numpy_reads(tmp_path: Path) -> None:
    path = write(tmp_path / "not" / "there", range(3)).path
    assert path.name == "qparams.npz"
    with np.load(path, allow_pickle=False) as file:
        assert file["step"].tolist() == [10, 20, 30]
        assert file["phase"].tolist() == ["learn"] * 3
        assert file[KEY].shape == file[KEY.replace("scale", "zero_point")].shape == (3, 3)
    assert_epochs(path, [0, 1, 2])


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same_directory", "another_directory"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, elsewhere: bool) -> None:
    crashed = write(tmp_path / "crashed", range(5)).path
    directory = tmp_path / ("resumed" if elsewhere else "crashed")
    resumed = write(directory, range(3, 7), continue_from=crashed, step=30)
    assert_epochs(resumed.path, list(range(7)))
    assert [file.name for file in directory.iterdir()] == ["qparams.npz"]
    assert_epochs(crashed, list(range(5 if elsewhere else 7)))


def test_a_crash_while_writing_leaves_the_epochs_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = write(tmp_path, range(2))

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            kept.append(30, 2, "learn", vectors(2))
    assert_epochs(kept.path, [0, 1])
    assert_epochs(write(tmp_path, range(2, 4), continue_from=kept.path, step=20).path, [0, 1, 2, 3])


def test_an_epoch_that_ends_twice_is_kept_once(tmp_path: Path) -> None:
    kept = write(tmp_path, range(3))
    kept.append(30, 2, "learn", vectors(2))
    assert_epochs(kept.path, [0, 1, 2])


def test_a_long_run_keeps_its_file_small_and_its_first_and_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "MOST_BYTES", 600)
    kept = write(tmp_path, range(100))
    epochs = read_qparams(kept.path)["epoch"].tolist()
    assert epochs == sorted(set(epochs))
    assert (epochs[0], epochs[-1]) == (0, 99)
    assert 4 <= len(epochs) <= 14
    assert_epochs(kept.path, epochs)


def test_another_runs_file_is_kept_aside(tmp_path: Path) -> None:
    write(tmp_path, range(2))
    write(tmp_path, range(5, 7))
    assert_epochs(tmp_path / "qparams.npz.bak", [0, 1])
    assert_epochs(tmp_path / "qparams.npz", [5, 6])


def as_bytes(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("foreign", [b"", b"PK\x03\x04 torn", as_bytes(np.ones(3))], ids=["empty", "torn", "one_array"])
def test_a_file_that_cannot_be_read_is_kept_aside_with_a_warning(tmp_path: Path, foreign: bytes) -> None:
    path = tmp_path / "qparams.npz"
    path.write_bytes(foreign)
    with pytest.warns(UserWarning, match=r"qparams\.npz\.bak"):
        write(tmp_path, range(3, 5), continue_from=path, step=30)
    assert path.with_name("qparams.npz.bak").read_bytes() == foreign
    assert_epochs(path, [3, 4])


def test_a_file_of_other_arrays_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    with pytest.raises(ValueError, match=r"must hold step, epoch and phase\. Found weights"):
        read_qparams(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError):
        read_qparams(tmp_path / "none.npz")


def test_other_quantizers_start_a_new_file_with_a_warning(tmp_path: Path) -> None:
    kept = write(tmp_path, range(2))
    with pytest.warns(UserWarning, match="other quantizers"):
        kept.append(30, 2, "learn", vectors(2, channels=4))
    assert read_qparams(kept.path)[KEY].shape == (1, 4)
    assert_epochs(tmp_path / "qparams.npz.bak", [0, 1])


def test_where_nothing_can_be_written_one_warning_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(UserWarning, match="Training goes on") as caught:
        write(tmp_path / "file" / "run", range(3))
    assert len(caught) == 1


def test_what_could_not_be_put_in_its_place_is_not_left_beside_it(tmp_path: Path) -> None:
    (tmp_path / "qparams.npz").mkdir()
    with pytest.warns(UserWarning, match="Training goes on"):
        write(tmp_path, range(2))
    assert [path.name for path in tmp_path.iterdir()] == ["qparams.npz"]


def test_a_fit_keeps_every_channel_of_every_quantizer_at_each_epoch(tmp_path: Path) -> None:
    model, _, _ = fit(tmp_path)
    found = read_qparams(tmp_path / "qparams.npz")
    assert found["step"].tolist() == [BATCHES, 2 * BATCHES, 3 * BATCHES]
    assert found["epoch"].tolist() == [0, 1, 2]
    assert found["phase"].tolist() == ["observe", "estimate", "learn"]
    for key, value in model.state_dict().items():
        if key.endswith((".scale", ".zero_point")):
            assert torch.equal(torch.from_numpy(found[key][-1]), value), key
    assert len(found) == 3 + 2 * len(lfq.quantizers(model))


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_resumed_fit_keeps_the_same_epochs_as_an_uninterrupted_one(tmp_path: Path, epoch: int) -> None:
    fit(tmp_path / "whole", callbacks=[every_epoch(tmp_path)], max_epochs=5)
    L.seed_everything(3, verbose=False)
    resumed = trainer(tmp_path / "resumed", [qat(), every_epoch(tmp_path)], max_epochs=5)
    resumed.fit(Net(), loader(), loader(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
    found, expected = (read_qparams(tmp_path / run / "qparams.npz") for run in ("resumed", "whole"))
    assert list(found) == list(expected)
    for key, values in expected.items():
        assert np.array_equal(found[key], values), key


@pytest.mark.filterwarnings("ignore:The scales of the resumed run cannot be continued")
def test_a_damaged_file_never_stops_a_run_wherever_it_is_damaged(tmp_path: Path) -> None:
    whole, chosen = write(tmp_path, range(2)).path.read_bytes(), random.Random(0)
    entry = whole.rfind(b"PK\x01\x02")  # the last of the archive's list, in which a version and a method stand
    path = tmp_path / "damaged" / "qparams.npz"
    path.parent.mkdir()
    for at in (*range(entry, entry + 20, 2), *(chosen.randrange(len(whole)) for _ in range(20))):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << chosen.randrange(6, 8)
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            read_qparams(path)
        resumed = write(tmp_path / "resumed", range(2, 3), continue_from=path, step=20)
        assert read_qparams(resumed.path)["epoch"][-1] == 2


@pytest.mark.parametrize("odd", [np.float32(3), np.array(["a"]), np.zeros((2, 2), np.int64)])
def test_an_archive_with_other_arrays_is_refused_as_such(tmp_path: Path, odd: Any) -> None:
    np.savez(tmp_path / "qparams.npz", step=odd, epoch=odd, phase=np.array(["learn"]))
    with pytest.raises(ValueError, match="must hold step, epoch and phase"):
        read_qparams(tmp_path / "qparams.npz")
