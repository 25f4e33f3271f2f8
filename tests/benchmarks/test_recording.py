"""What a record of every quantizer adds to a training step, spread over the default interval of 50 steps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

import lfq_lightning as lfq
from lfq_lightning.placement.points import points
from lfq_lightning.records.files import Trajectory
from lfq_lightning.records.measuring import measure_weights, probed, snapshot
from lfq_lightning.records.recorder import metrics_of
from lfq_lightning.training.hiding import hidden_qparams
from lfq_lightning.training.stepping.qparams import QParamOptimizer
from tests.benchmarks.measuring import Call, Table, middle, times
from tests.benchmarks.networks import make, resnet18
from tests.benchmarks.steps import with_ours

INTERVAL = 50  # Lightning's log_every_n_steps


@pytest.mark.parametrize("network", ["resnet18", "transformer", "tiny resnet18"])
def test_recording(table: Table, network: str, tmp_path: Path) -> None:
    table.name = f"recording_{network.replace(' ', '_')}"
    table.notes.append(f"one thread, processor time; one record in {INTERVAL} steps: to trajectory.csv and loggers")
    torch.set_num_threads(1)
    if network == "tiny resnet18":  # 8 channels wide, 64 images of 8x8: little work to set a record against
        model, x, labels = resnet18(width=8), torch.randn(64, 3, 8, 8), torch.randint(10, (64,))
    else:
        model, x, labels = make(network)
    with_ours(model, x)
    with hidden_qparams(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    QParamOptimizer(model, [optimizer])
    trajectory = Trajectory(tmp_path)
    logger = TensorBoardLogger(tmp_path)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, -2), labels.flatten()).backward()
        optimizer.step()

    def recorded(to_logger: bool) -> None:
        with probed(points(model)) as measured:
            step()
        rows = snapshot(points(model), measured | measure_weights(points(model))).rows(1, 0)
        trajectory.append(rows)
        if to_logger:
            logger.log_metrics(metrics_of(rows, points(model)), step=1)

    calls: dict[str, Call] = {
        "file": lambda: recorded(False),
        "file and TensorBoard": lambda: recorded(True),
    }
    for name, call in calls.items():
        taken = times({"plain": step, "recorded": call}, seconds=15.0, least=5, clock=time.process_time)
        best, typical = {n: min(t) for n, t in taken.items()}, middle(taken)
        table.add(
            network=network,
            quantizers=f"{len(lfq.quantizers(model))}",
            record_to=name,
            step_ms=best["plain"] * 1e3,
            record_ms=(best["recorded"] - best["plain"]) * 1e3,
            percent_of_minima=100 * (best["recorded"] / best["plain"] - 1) / INTERVAL,
            percent_of_medians=100 * (typical["recorded"] / typical["plain"] - 1) / INTERVAL,
        )
