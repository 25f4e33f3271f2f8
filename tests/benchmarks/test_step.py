"""A whole training step, W4A4 on every projection, in multiples of the float step; and the peak memory of each."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from tests.benchmarks.measuring import Table, keep_freed_memory, middle, times
from tests.benchmarks.steps import EVERYWHERE, MISSING, PREPARATIONS, fake_quantize_calls, training_step


@pytest.mark.parametrize("network", ["resnet18", "transformer"])
def test_step(table: Table, network: str, pytestconfig: pytest.Config) -> None:
    table.name = f"step_{network}"
    table.notes.append(
        "one thread; memory: rise over the idle process, each in a process of its own; needed: without holes"
    )
    table.notes.append(keep_freed_memory() + ", for the times")
    if MISSING:
        table.notes.append(f"not installed, left out: {', '.join(MISSING)}")
    torch.set_num_threads(1)
    for name in PREPARATIONS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what other libraries deprecate
            calls = {"float": training_step(network, "float"), name: training_step(network, name)}
            taken = times(calls, seconds=20.0, least=5)
        best, typical = {n: min(t) for n, t in taken.items()}, middle(taken)
        # glibc keeps what was freed in holes that later tensors may not fit; with the second setting it hands all
        # tensors' pages back, and the peak is what was needed at once.
        memory = {
            column: _peak(network, name, pytestconfig.rootpath, settings)
            for column, settings in {"peak_MB": {}, "needed_MB": {"MALLOC_MMAP_THRESHOLD_": "262144"}}.items()
        }
        table.add(
            network=network,
            training=name,
            ms=best[name] * 1e3,
            ratio_of_minima=best[name] / best["float"],
            ratio_of_medians=typical[name] / typical["float"],
            **memory,
        )
    for column in ("peak", "needed"):
        for row in table.rows:
            row[f"{column}_ratio"] = float(row[f"{column}_MB"]) / float(table.rows[0][f"{column}_MB"])  # type: ignore[arg-type]
        table.columns.append(f"{column}_ratio")


PRICED = ["resnet18", "bert", "inverted residuals", "inverted residuals, 2 images", "bert, 16 tokens"]


def test_price(table: Table, pytestconfig: pytest.Config) -> None:
    table.name = "step_price"
    table.notes.append("W4A4, one thread, medians of ratios of steps in turn; calls: fake quantizations of a step")
    table.notes.append(keep_freed_memory() + ", each row in a process of its own")
    for network in PRICED:
        calls, alone = fake_quantize_calls(network)
        for training in ("ours", EVERYWHERE) if network == "resnet18" else ("ours",):
            ratio, floating = map(float, _run(pytestconfig.rootpath, {}, "--ratio", network, training).split())
            table.add(
                network=network,
                training=training,
                float_ms=f"{floating * 1e3:.1f}",
                ratio=f"{ratio:.3f}",
                calls=str(calls) if training == "ours" else None,
                calls_without_sharing=str(alone) if training == "ours" else None,
            )


def _run(root: Path, settings: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, "-m", "tests.benchmarks.steps", *arguments]
    done = subprocess.run(command, cwd=root, env=os.environ | settings, capture_output=True, text=True, check=True)
    return done.stdout


def _peak(network: str, name: str, root: Path, settings: dict[str, str]) -> float:
    return float(_run(root, settings, network, name))
