"""The recorded trajectory survives crashes, resumed runs and full disks."""

from __future__ import annotations

import contextlib
import math
import random
import struct
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lfq_lightning.records.files import Trajectory
from lfq_lightning.records.trajectory import COLUMNS, TrajectoryRow, read_trajectory

pytestmark = pytest.mark.quick

FC1, FC2 = "fc1.weight_quantizer", "fc2.input_quantizer"


def row(step: int, quantizer: str = FC1, scale: float = 0.5, saturation: float = 0.25) -> TrajectoryRow:
    numbers = [scale, scale / 2, scale * 2, 3.0, 2.0, 4.0, saturation, 0.0123456789]
    return TrajectoryRow(step, step // 2, "learn", quantizer, *numbers)


def write(directory: Path, steps: range) -> Trajectory:
    trajectory = Trajectory(directory)
    for step in steps:
        trajectory.append([row(step, FC1), row(step, FC2)])
    return trajectory


def tear(path: Path) -> None:
    """Cut the last record in half, as a crash during a write would."""
    path.write_bytes(path.read_bytes()[:-12])


def assert_same_rows(found: list[TrajectoryRow], expected: list[TrajectoryRow]) -> None:
    # By representation: NaN is not equal to itself.
    assert [repr(r) for r in found] == [repr(r) for r in expected]


def assert_steps(path: Path, expected: list[int]) -> None:
    assert [r.step for r in read_trajectory(path) if r.quantizer == FC1] == expected


def test_the_header_is_written_with_the_first_rows_and_names_the_columns_in_order(tmp_path: Path) -> None:
    trajectory = Trajectory(tmp_path / "not" / "there" / "yet")
    trajectory.append([])
    assert not trajectory.path.parent.exists()
    trajectory.append([row(1)])
    trajectory.append([row(2)])
    assert trajectory.path.read_text().splitlines() == [
        "step,epoch,phase,quantizer,scale_mean,scale_min,scale_max,"
        "zero_point_mean,zero_point_min,zero_point_max,saturation,gradient_norm",
        "1,0,learn,fc1.weight_quantizer,0.5,0.25,1,3,2,4,0.25,0.0123456789",
        "2,1,learn,fc1.weight_quantizer,0.5,0.25,1,3,2,4,0.25,0.0123456789",
    ]


def test_what_was_not_measured_is_an_empty_field_and_comes_back_as_nan(tmp_path: Path) -> None:
    trajectory = Trajectory(tmp_path)
    trajectory.append([row(1, saturation=math.nan)])
    assert trajectory.path.read_text().endswith(",4,,0.0123456789\n")
    assert_same_rows(read_trajectory(trajectory.path), [row(1, saturation=math.nan)])


@settings(deadline=None)
@example(scale=0.01000000350177288, name="needs nine digits")
@given(
    scale=st.floats(width=32, allow_nan=False),
    name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1) | st.just('a,b."c"\nd'),
)
def test_numbers_and_names_survive(tmp_path_factory: pytest.TempPathFactory, scale: float, name: str) -> None:
    trajectory = Trajectory(tmp_path_factory.mktemp("run"))
    trajectory.append([TrajectoryRow(1, 0, "observe", name, *[scale] * 8)])
    (found,) = read_trajectory(trajectory.path)
    assert found.quantizer == name
    assert struct.pack("f", found.scale_mean) == struct.pack("f", scale)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["same_directory", "another_directory"])
def test_a_resumed_run_equals_an_uninterrupted_one_byte_for_byte(tmp_path: Path, elsewhere: bool) -> None:
    uninterrupted = write(tmp_path / "uninterrupted", range(1, 9)).path
    crashed = write(tmp_path / "crashed", range(1, 7)).path
    tear(crashed)
    resumed = Trajectory(tmp_path / ("resumed" if elsewhere else "crashed"), continue_from=crashed, step=4)
    assert_steps(resumed.path, [1, 2, 3, 4])
    for step in range(5, 9):
        resumed.append([row(step, FC1), row(step, FC2)])
    assert resumed.path.read_bytes() == uninterrupted.read_bytes()
    assert [file.name for file in resumed.path.parent.iterdir()] == ["trajectory.csv"]


@pytest.mark.parametrize("cut", range(1, 120, 7))
def test_wherever_a_crash_tears_the_last_write_only_its_rows_are_lost(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path, range(1, 4)).path
    path.write_bytes(path.read_bytes()[:-cut])
    complete = read_trajectory(path)
    assert {r.step for r in complete} >= {1, 2}
    assert_same_rows(complete, [row(s, q) for s in (1, 2, 3) for q in (FC1, FC2)][: len(complete)])
    resumed = Trajectory(tmp_path, continue_from=path, step=3)
    assert_same_rows(read_trajectory(resumed.path), complete)


def test_a_record_torn_at_a_line_break_inside_a_name_is_left_out(tmp_path: Path) -> None:
    trajectory = Trajectory(tmp_path)
    trajectory.append([row(1), row(1, quantizer="a\nb")])
    content = trajectory.path.read_bytes()
    trajectory.path.write_bytes(content[: content.rindex(b"a\nb") + 2])
    assert_same_rows(read_trajectory(trajectory.path), [row(1)])


def test_resuming_into_a_directory_that_holds_another_runs_file_keeps_both(tmp_path: Path) -> None:
    other = write(tmp_path / "here", range(1, 3)).path
    others = other.read_bytes()
    Trajectory(other.parent, continue_from=write(tmp_path / "there", range(1, 6)).path, step=5)
    assert_steps(other, [1, 2, 3, 4, 5])
    assert other.with_name("trajectory.csv.bak").read_bytes() == others


def test_a_run_that_carries_no_row_over_keeps_the_file_aside(tmp_path: Path) -> None:
    path = write(tmp_path, range(1, 4)).path
    written = path.read_bytes()
    Trajectory(tmp_path, continue_from=path, step=0)
    assert_steps(path, [])
    assert path.with_name("trajectory.csv.bak").read_bytes() == written


def test_a_run_that_continues_nothing_keeps_the_last_file_aside_and_no_other(tmp_path: Path) -> None:
    for last in (2, 3, 4):
        write(tmp_path, range(1, last))
    assert_steps(tmp_path / "trajectory.csv.bak", [1, 2])
    assert_steps(tmp_path / "trajectory.csv", [1, 2, 3])
    assert {path.name for path in tmp_path.iterdir()} == {"trajectory.csv", "trajectory.csv.bak"}


def test_a_vanished_trajectory_is_named_once_and_recording_starts_afresh(tmp_path: Path) -> None:
    gone = tmp_path / "gone" / "trajectory.csv"
    with pytest.warns(UserWarning, match="cannot be continued") as caught:
        trajectory = Trajectory(tmp_path / "new", continue_from=gone, step=4)
        trajectory.append([row(5)])
        trajectory.append([row(6)])
    assert len(caught) == 1
    assert str(gone) in str(caught[0].message)
    assert_steps(trajectory.path, [5, 6])


@pytest.mark.parametrize(
    "foreign",
    [
        b"epoch,loss\n1,0.5\n",
        b"notes in one line",
        b"",
        b'"' + b"\x00\xff" * 200_000 + b"\n",
        (",".join(COLUMNS) + "\nstep\n\n").encode(),
        (",".join(COLUMNS) + "\nx,0,learn,fc,1,1,1,0,0,0,,\n").encode(),
    ],
    ids=["other_columns", "no_line_break", "empty", "binary", "broken_row", "step_is_no_number"],
)
def test_a_file_that_is_no_trajectory_is_kept_aside_with_a_warning(tmp_path: Path, foreign: bytes) -> None:
    path = tmp_path / "trajectory.csv"
    path.write_bytes(foreign)
    with pytest.warns(UserWarning, match=r"trajectory\.csv\.bak"):
        trajectory = Trajectory(tmp_path, continue_from=path, step=9)
    trajectory.append([row(10)])
    assert path.with_name("trajectory.csv.bak").read_bytes() == foreign
    assert_steps(path, [10])


def test_a_foreign_file_in_another_directory_stays_where_it_is(tmp_path: Path) -> None:
    foreign = tmp_path / "metrics.csv"
    foreign.write_text("epoch,loss\n1,0.5\n")
    with pytest.warns(UserWarning, match="afresh"):
        Trajectory(tmp_path / "run", continue_from=foreign, step=9)
    assert foreign.read_text() == "epoch,loss\n1,0.5\n"


def assert_warns_once_and_goes_on(trajectory: Trajectory, error: str) -> None:
    with pytest.warns(UserWarning, match=error) as caught:
        trajectory.append([row(1)])
        trajectory.append([row(2)])
    assert len(caught) == 1
    assert str(trajectory.path) in str(caught[0].message)
    assert not trajectory.recording


def test_a_full_disk_switches_recording_off_with_one_warning(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    trajectory = Trajectory(tmp_path)
    trajectory.path.symlink_to("/dev/full")
    assert_warns_once_and_goes_on(trajectory, "No space left")


def test_a_directory_where_the_file_should_be_switches_recording_off(tmp_path: Path) -> None:
    (tmp_path / "trajectory.csv").mkdir()
    assert_warns_once_and_goes_on(Trajectory(tmp_path), "directory")


def test_a_run_directory_that_cannot_be_made_switches_recording_off(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_warns_once_and_goes_on(Trajectory(tmp_path / "file" / "run"), "Training goes on")


def test_a_resumed_run_that_cannot_be_written_warns_once_and_leaves_the_earlier_file(tmp_path: Path) -> None:
    earlier = write(tmp_path / "earlier", range(1, 3)).path
    content = earlier.read_bytes()
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        trajectory = Trajectory(tmp_path / "file" / "run", continue_from=earlier, step=2)
        trajectory.append([row(3)])
    assert len(caught) == 1
    assert earlier.read_bytes() == content


def test_a_changed_working_directory_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trajectory = Trajectory("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    trajectory.append([row(1)])
    assert_steps(tmp_path / "run" / "trajectory.csv", [1])


def test_rows_written_after_the_file_was_deleted_still_have_a_header(tmp_path: Path) -> None:
    trajectory = write(tmp_path, range(1, 3))
    trajectory.path.unlink()
    trajectory.append([row(3)])
    assert_steps(trajectory.path, [3])


def test_reading_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Found no file `.*nothing\.csv`"):
        read_trajectory(tmp_path / "nothing.csv")


def test_reading_names_the_missing_columns(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(",".join(COLUMNS[:-2]) + "\n")
    with pytest.raises(ValueError, match="none named saturation, gradient_norm"):
        read_trajectory(tmp_path / "metrics.csv")


def test_reading_names_the_broken_line(tmp_path: Path) -> None:
    path = write(tmp_path, range(1, 3)).path
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "1,0,learn\n", *lines[2:]]))
    with pytest.raises(ValueError, match="line 3"):
        read_trajectory(path)
    path.write_text("".join([*lines[:2], lines[2].replace("0.5", "half"), *lines[3:]]))
    with pytest.raises(ValueError, match=r"line 3.*half"):
        read_trajectory(path)


def test_reading_accepts_further_columns_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "edited.csv"
    values = dict(zip(COLUMNS, ["7", "3", "learn", "fc", *"12345678"], strict=True))
    header = ["note", *reversed(COLUMNS)]
    path.write_text(",".join(header) + "\n" + ",".join(["mine", *(values[c] for c in header[1:])]) + "\n")
    (found,) = read_trajectory(path)
    assert found == TrajectoryRow(7, 3, "learn", "fc", *map(float, range(1, 9)))


@pytest.mark.filterwarnings("ignore:The trajectory of the resumed run cannot be continued")
def test_a_damaged_file_never_stops_a_run_wherever_it_is_damaged(tmp_path: Path) -> None:
    whole, chosen, path = write(tmp_path, range(4)).path.read_bytes(), random.Random(0), tmp_path / "damaged.csv"
    for _ in range(30):
        damaged = bytearray(whole)
        damaged[chosen.randrange(len(whole))] ^= 1 << chosen.randrange(8)
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            read_trajectory(path)
        resumed = Trajectory(tmp_path / "resumed", path, 2)
        resumed.append([row(9)])
        assert read_trajectory(resumed.path)[-1].step == 9
