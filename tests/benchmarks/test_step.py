"""A whole training step, W4A4 on every projection, in multiples of the float step; and the peak memory of each."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from tests.benchmarks.measuring import Table, middle, times
from tests.benchmarks.steps import MISSING, PREPARATIONS, training_step


@pytest.mark.parametrize("network", ["resnet18", "transformer"])
def test_step(table: Table, network: str, pytestconfig: pytest.Config) -> None:
    table.name = f"step_{network}"
    table.notes.append("one thread; memory: rise over the idle process, each in a process of its own")
    if MISSING:
        table.notes.append(f"not installed, left out: {', '.join(MISSING)}")
    torch.set_num_threads(1)
    for name in PREPARATIONS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what other libraries deprecate
            calls = {"float": training_step(network, "float"), name: training_step(network, name)}
            taken = times(calls, seconds=20.0, least=5)
        best, typical = {n: min(t) for n, t in taken.items()}, middle(taken)
        memory = float(
            subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.steps", network, name],
                cwd=pytestconfig.rootpath,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        table.add(
            network=network,
            training=name,
            ms=best[name] * 1e3,
            ratio_of_minima=best[name] / best["float"],
            ratio_of_medians=typical[name] / typical["float"],
            peak_MB=memory,
        )
    first = table.rows[0]["peak_MB"]
    for row in table.rows:
        row["peak_ratio"] = float(row["peak_MB"]) / float(first)  # type: ignore[arg-type]
    table.columns.append("peak_ratio")
