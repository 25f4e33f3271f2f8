"""Two real processes: the same scales on each, and the run of one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = """
import os, sys, warnings
import lightning as L, torch
from torch import nn
from torch.utils.data import DataLoader
import lfq_lightning as lfq
from tests.runs import images, qat, trainer

warnings.simplefilter("ignore")
ranks, out, options = int(sys.argv[1]), sys.argv[2], eval(sys.argv[3])
rank = int(os.environ.get("LOCAL_RANK", 0))
local = 8 // ranks

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
        )
        self.equal = True

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)

    def on_train_batch_end(self, *_):
        mine = torch.cat([q.scale.detach() for q in lfq.quantizers(self).values()])
        every = self.all_gather(mine).view(-1, mine.numel())
        self.equal = self.equal and bool((every == every[0]).all())

data = images(400)
parts = [list(range(i * 8 + rank * local, i * 8 + (rank + 1) * local)) for i in range(50)]
L.seed_everything(3, verbose=False)
model = Net()
schedule = lfq.PhaseSchedule(observe=0, estimate=10, learn=20, unit="step")
strategy = "ddp" if ranks > 1 else "auto"
made = trainer(
    out, [qat(schedule=schedule)], max_epochs=1, devices=ranks, strategy=strategy, **options,
    use_distributed_sampler=False,
)
made.fit(model, DataLoader(data, batch_sampler=parts))
assert model.equal, "ranks differ"
if made.is_global_zero:
    state = {k: v for k, v in model.state_dict().items() if "quantizer" in k and torch.is_tensor(v)}
    torch.save(state, out + "/state.pt")
"""


def run(ranks: int, directory: Path, **options: Any) -> dict[str, torch.Tensor]:
    directory.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(ranks), str(directory), repr(options)]
    if ranks > 1:  # Lightning starts the other process with this script's own command line
        (directory / "script.py").write_text(SCRIPT)
        command = [sys.executable, str(directory / "script.py"), str(ranks), str(directory), repr(options)]
        environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(command, env=environment, timeout=180, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(directory / "state.pt")


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}])
def test_two_ranks_with_half_the_batch_follow_one_process_with_the_whole(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    one, two = run(1, tmp_path / "one", **options), run(2, tmp_path / "two", **options)
    assert list(one) == list(two)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-5 if "zero_point" in key else 0.0, msg=key)
