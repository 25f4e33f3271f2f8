"""Comparing the runs of a sweep: what counts as one method, and which are on the Pareto front."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from lfq_lightning.__main__ import main
from lfq_lightning.records.comparison import compare

pytestmark = pytest.mark.quick


def leave(directory: Path, overrides: list[str], results: dict[str, Any] | None) -> None:
    """A run as a job leaves it."""
    (directory / ".hydra").mkdir(parents=True)
    (directory / ".hydra/overrides.yaml").write_text(yaml.safe_dump(overrides))
    if results is not None:
        (directory / "metrics.json").write_text(json.dumps(results))


def numbers(accuracy: float, size: int) -> dict[str, float]:
    return {"test/accuracy": accuracy, "test/loss": 1 - accuracy, "parameter_bytes": size}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    reached = {"w8a8": (200, 0.97, 0.99), "w4a4": (100, 0.96, 0.98), "w3a3": (80, 0.90, 0.96), "dear": (150, 0.9, 0.9)}
    for i, (quant, (size, *accuracies)) in enumerate(reached.items()):
        for seed, accuracy in enumerate(accuracies):
            results = {"float": numbers(0.98 + 0.01 * seed, 800), "quantized": numbers(accuracy, size)}
            leave(tmp_path / str(2 * i + seed), [f"quant={quant}", f"seed={seed}", "threads=1"], results)
    return tmp_path


def test_runs_that_differ_in_their_seed_are_one_method_with_mean_and_deviation(sweep: Path) -> None:
    found = {m.name: m for m in compare(sweep).methods}
    assert list(found) == ["w3a3", "w4a4", "dear", "w8a8", "float"]
    assert found["w4a4"].size == 100
    assert found["w4a4"].mean == pytest.approx(0.97)
    assert found["w4a4"].deviation == pytest.approx(0.02 / math.sqrt(2))


def test_the_float_model_counts_once_for_each_seed_however_many_jobs_fitted_it(sweep: Path) -> None:
    leave(sweep / "8", ["quant=float", "seed=2", "threads=1"], {"float": numbers(0.97, 800)})
    *_, last = compare(sweep).methods
    assert (last.name, last.values) == ("float", (0.98, 0.99, 0.97))


def test_the_front_holds_what_nothing_beats_in_both(sweep: Path) -> None:
    assert [m.name for m in compare(sweep).methods if m.on_front] == ["w3a3", "w4a4", "w8a8", "float"]
    assert [m.name for m in compare(sweep, "test/loss", lower_is_better=True).methods if not m.on_front] == ["dear"]
    assert [m.name for m in compare(sweep, "test/loss").methods if m.on_front] == ["w3a3", "dear"]


def test_of_two_equally_good_methods_the_smaller_is_on_the_front(tmp_path: Path) -> None:
    for i, (quant, size) in enumerate({"large": 20, "small": 10, "equal": 10}.items()):
        leave(tmp_path / str(i), [f"quant={quant}"], numbers(0.9, size))
    assert {m.name: m.on_front for m in compare(tmp_path).methods} == {"small": True, "equal": True, "large": False}


def test_a_name_says_what_not_all_runs_share(tmp_path: Path) -> None:
    leave(
        tmp_path / "0", ["quant=w2a2", "technique=[distillation,bit_annealing]", "+a.lr=0.1", "x=1"], numbers(0.9, 10)
    )
    leave(tmp_path / "1", ["quant=w3a3", "technique=[]", "+a.lr=0.2", "x=1"], numbers(0.9, 20))
    leave(tmp_path / "2", ["quant=w3a3", "x=1"], numbers(0.9, 30))
    names = [m.name for m in compare(tmp_path).methods]
    assert names == ["w2a2 distillation,bit_annealing a.lr=0.1", "w3a3 technique=[] a.lr=0.2", "w3a3"]


def test_the_command_prints_the_table_and_draws_the_picture(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(sweep / "9", ["quant=broken", "seed=0", "threads=1"], None)
    assert main(["compare", str(sweep)]) == 0
    printed = capsys.readouterr().out
    assert ["w4a4", "2", "100", "0.9700", "±", "0.0141", "*"] in [line.split() for line in printed.splitlines()]
    assert f"without metrics.json, left out: {sweep / '9'}" in printed
    assert (sweep / "pareto.png").stat().st_size > 10_000
    assert main(["compare", str(sweep), "-o", str(sweep / "p.svg"), "--metric", "test/loss", "--lower-is-better"]) == 0
    picture = (sweep / "p.svg").read_text()
    assert picture.startswith("<?xml")


def test_what_cannot_be_compared_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path)]) == 1
    assert "needs runs with .hydra/overrides.yaml and metrics.json. Found 0 without" in capsys.readouterr().err
    leave(tmp_path / "0", ["quant=w4a4"], {"quantized": {"accuracy": 0.9, "parameter_bytes": 10}})
    assert main(["compare", str(tmp_path)]) == 1
    assert "must hold 'test/accuracy'. Found accuracy, parameter_bytes: choose" in capsys.readouterr().err
