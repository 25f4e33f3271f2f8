"""The picture of a trajectory shows every quantizer that was in use, and leaves no trace in matplotlib."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from lfq_lightning.records.curves import panels_of, phases_of
from lfq_lightning.records.files import Trajectory
from lfq_lightning.records.plot import plot_trajectories
from lfq_lightning.records.trajectory import TrajectoryRow

pytest.importorskip("matplotlib")

PHASES = ["observe"] * 3 + ["estimate"] * 3 + ["learn"] * 12 + ["freeze"] * 3
PNG = b"\x89PNG\r\n"
ONE = ["fc.weight_quantizer"]
MANY = 26  # of thirteen layers, one more than have a colour of their own


def names(count: int) -> list[str]:
    return [f"block{i // 2}.{('weight', 'input')[i % 2]}_quantizer" for i in range(count)]


def run(quantizers: list[str], phases: list[str] = PHASES) -> list[TrajectoryRow]:
    """Scales that double over the run, and zero points for activations alone."""
    rows = []
    for step, phase in enumerate(phases, start=1):
        for index, name in enumerate(quantizers):
            scale = 0.01 * (1 + index) * 2 ** (step / len(phases))
            zero_point = 0.0 if "weight" in name else 7.5
            saturation = 0.01 * index if step % 2 else math.nan
            numbers = [scale, scale / 2, scale * 2, *[zero_point] * 3, saturation, 1.0]
            rows.append(TrajectoryRow(step, step // 3, phase, name, *numbers))
    return rows


def write(directory: Path, rows: list[TrajectoryRow]) -> Path:
    Trajectory(directory).append(rows)
    return directory


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """The picture of a run with so many quantizers, as SVG."""

    @cache
    def svg(count: int) -> str:
        return draw(write(tmp_path_factory.mktemp("run"), run(names(count))))

    return svg


def draw(directory: Path) -> str:
    return plot_trajectories(directory, directory / "picture.svg").read_text()


def lines(svg: str) -> set[str]:
    """Names of the lines of a picture, `<quantizer>.<quantity>`."""
    return set(re.findall(r'<g id="([^"]*quantizer\.\w+)"', svg))


def words(svg: str) -> list[str]:
    # Letters are drawn as outlines; each text stands beside them in a comment.
    return re.findall(r"<!-- (.*?) -->", svg)


@pytest.mark.parametrize("count", [1, MANY])
def test_any_number_of_quantizers_gives_a_picture_beside_the_trajectory(tmp_path: Path, count: int) -> None:
    picture = plot_trajectories(write(tmp_path, run(names(count))))
    assert picture == tmp_path / "trajectories.png"
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.parametrize("count", [4, MANY])
def test_every_quantizer_has_its_line_in_every_panel_that_it_belongs_to(
    drawn: Callable[[int], str], count: int
) -> None:
    expected = {f"{name}.{q}" for name in names(count) for q in ("scale", "movement", "saturation")}
    expected |= {f"{name}.zero_point" for name in names(count) if "input" in name}
    assert lines(drawn(count)) == expected


def test_zero_points_that_stay_zero_take_no_panel(tmp_path: Path) -> None:
    found = words(draw(write(tmp_path, run(ONE))))
    assert "scale" in found and "weights" in found
    assert "zero point" not in found and "activations" not in found


def test_weights_and_activations_have_panels_of_their_own_and_share_colours(drawn: Callable[[int], str]) -> None:
    found = words(drawn(4))
    assert (found.count("weights"), found.count("activations"), found.count("scale")) == (1, 1, 2)
    assert (found.count("block0"), found.count("block1")) == (1, 1)
    assert "all zero points are 0" in found


def test_many_layers_are_explained_by_a_colour_bar_and_the_outermost_lines_are_named(
    drawn: Callable[[int], str],
) -> None:
    explained = [word for word in words(drawn(MANY)) if word.startswith("block")]
    # Beside the bar ten; in each of seven panels the highest, and in the four of scales the lowest too.
    assert len(explained) == 10 + 7 + 4
    assert {"block0", "block12"} <= set(explained)


def test_what_all_names_begin_with_is_left_out(tmp_path: Path) -> None:
    quantizers = [f"model.net.{layer}.weight_quantizer" for layer in ("stem.conv", "head")]
    found = words(draw(write(tmp_path, run(quantizers))))
    assert {"stem.conv", "head"} <= set(found)
    assert not any("model" in word for word in found)


def test_the_phases_of_the_run_and_no_others_are_named_above_each_column(tmp_path: Path) -> None:
    rows = run(names(2), phases=["observe", "observe", "estimate", "learn", "learn"])
    assert phases_of(rows) == [("observe", 1, 3), ("estimate", 3, 4), ("learn", 4, 5)]
    found = words(draw(write(tmp_path, rows)))
    assert [found.count(phase) for phase in ("observe", "estimate", "learn", "freeze")] == [2, 2, 2, 0]


def test_a_scale_that_is_not_in_use_does_not_change_the_picture(tmp_path: Path) -> None:
    rows = run(ONE)
    unset = [replace(r, scale_mean=1e6, zero_point_max=99.0) if r.phase == "observe" else r for r in rows]
    one, other = (plot_trajectories(write(tmp_path / str(i), r)) for i, r in enumerate([rows, unset]))
    assert one.read_bytes() == other.read_bytes()


def test_movement_is_one_on_every_entry_into_learning_and_is_blind_to_units() -> None:
    phases = ["estimate", "learn", "learn", "freeze", "observe", "estimate", "learn", "learn"]
    rows = run(["fc.weight_quantizer"], phases)
    movement = panels_of(rows)["movement", "weights"]["fc.weight_quantizer"]
    growth = 2 ** (1 / len(phases))
    assert [step for step, *_ in movement] == [2, 3, 4, 7, 8]
    assert [ratio for _, ratio, *_ in movement] == pytest.approx([1, growth, growth**2, 1, growth])
    larger = [replace(r, scale_mean=1024 * r.scale_mean) for r in rows]
    assert panels_of(larger)["movement", "weights"]["fc.weight_quantizer"] == movement


def test_saturation_is_drawn_through_the_steps_at_which_it_was_measured() -> None:
    curve = panels_of(run(names(2), ["learn"] * 5))["saturation", "activations"]["block0.input_quantizer"]
    assert [(step, share) for step, share, _, _ in curve] == [(1, 0.01), (3, 0.01), (5, 0.01)]


def test_the_suffix_decides_the_format_and_missing_directories_are_made(tmp_path: Path) -> None:
    write(tmp_path, run(ONE))
    assert plot_trajectories(tmp_path, tmp_path / "new" / "a.png").read_bytes().startswith(PNG)
    assert b"<svg" in plot_trajectories(str(tmp_path), str(tmp_path / "a.svg")).read_bytes()
    assert plot_trajectories(tmp_path, tmp_path / "plain").read_bytes().startswith(PNG)


def test_the_file_itself_may_be_named_instead_of_its_directory(tmp_path: Path) -> None:
    kept = write(tmp_path, run(ONE)).joinpath("trajectory.csv").rename(tmp_path / "best.csv")
    assert plot_trajectories(kept) == tmp_path / "trajectories.png"


@pytest.mark.parametrize(
    "quantizer",
    ["weight_quantizer", "my_own", "_head.weight_quantizer", r"$\frac{$.input_quantizer", "x" * 99],
    ids=["root_module", "neither_weight_nor_input", "underscore", "formula", "long"],
)
def test_unusual_names_are_drawn(tmp_path: Path, quantizer: str) -> None:
    assert plot_trajectories(write(tmp_path, run([quantizer]))).exists()


@pytest.mark.parametrize("scale", [0.0, math.nan, math.inf, 1e-30])
def test_a_collapsed_or_diverged_scale_does_not_prevent_the_picture(tmp_path: Path, scale: float) -> None:
    rows = run(ONE)
    rows[-1] = replace(rows[-1], scale_mean=scale, scale_min=scale)
    rows[16] = replace(rows[16], scale_mean=scale, scale_min=scale)
    assert plot_trajectories(write(tmp_path, rows)).exists()


def test_one_recorded_step_is_enough(tmp_path: Path) -> None:
    assert plot_trajectories(write(tmp_path, run(ONE, ["learn"]))).exists()


def test_global_state_of_matplotlib_is_left_alone(tmp_path: Path) -> None:
    import matplotlib
    from matplotlib import pyplot

    settings, figures = dict(matplotlib.rcParams), pyplot.get_fignums()
    plot_trajectories(write(tmp_path, run(ONE)))
    assert dict(matplotlib.rcParams) == settings
    assert pyplot.get_fignums() == figures


def test_a_run_that_only_observed_so_far_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Found 4 rows without one in .*trajectory\.csv"):
        plot_trajectories(write(tmp_path, run(names(2), ["off", "observe"])))


def test_a_directory_without_a_trajectory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"trajectory\.csv"):
        plot_trajectories(tmp_path)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, run(names(2)))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape('pip install "lfq_lightning[examples]"')):
        plot_trajectories(tmp_path)


def test_the_one_run_below_a_directory_is_drawn_and_several_are_named(tmp_path: Path) -> None:
    write(tmp_path / "job/quantized", run(ONE))
    assert plot_trajectories(tmp_path / "job") == tmp_path / "job/quantized/trajectories.png"
    write(tmp_path / "job/again", run(ONE))
    with pytest.raises(ValueError, match=r"Found 2 in .*: choose one of .*again"):
        plot_trajectories(tmp_path / "job")
