"""One training step of a network, in float and quantized by us and by others; as a program, its peak memory."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.training.hiding import hidden_qparams
from lfq_lightning.training.stepping.qparams import QParamOptimizer
from tests.benchmarks import peers
from tests.benchmarks.measuring import Call
from tests.benchmarks.networks import make

Prepare = Callable[[nn.Module, Tensor], None]


def keep_float(model: nn.Module, x: Tensor) -> None:
    """Nothing."""


def with_ours(model: nn.Module, x: Tensor, compress_saved: bool = False) -> None:
    options = {"compress_saved": True} if compress_saved else {}
    lfq.attach(model, weight=4, activation=4, **options)
    lfq.calibrate(model, [x])
    lfq.set_phase(model, "learn")


def with_ours_compressed(model: nn.Module, x: Tensor) -> None:
    with_ours(model, x, compress_saved=True)


def with_torch_ao(model: nn.Module, x: Tensor) -> None:
    """Learning."""
    peers.quantized_by(model, peers.torch_ao_weight, peers.torch_ao_activation, 4, 4)
    model(x)
    peers.torch_ao_phase(model, "learn")


def with_brevitas(model: nn.Module, x: Tensor) -> None:
    """Learned scales."""
    peers.quantized_by(model, peers.BrevitasWeight, peers.brevitas_activation(1), 4, 4)
    model(x)


def with_torchao(model: nn.Module, x: Tensor) -> None:
    """Learned scales of weights; inputs have their ranges computed at each step."""
    peers.quantized_by(model, lambda bits, layer: peers.TorchaoWeight(bits), peers.torchao_activation, 4, 4)
    model(x)


PREPARATIONS: dict[str, Prepare] = {
    "float": keep_float,
    "ours": with_ours,
    "ours, compress_saved": with_ours_compressed,
    "torch.ao": with_torch_ao,
}
PEERS = {"brevitas": with_brevitas, "torchao": with_torchao}
MISSING = [name for name, installed in peers.INSTALLED.items() if not installed]
PREPARATIONS |= {name: prepare for name, prepare in PEERS.items() if name not in MISSING}


def training_step(network: str, preparation: str) -> Call:
    """A function that takes one step of SGD with momentum; the qparams are stepped by the optimizer that is theirs."""
    model, x, labels = make(network)
    PREPARATIONS[preparation](model, x)
    with hidden_qparams(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if preparation.startswith("ours"):
        QParamOptimizer(model, [optimizer])

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, -2), labels.flatten()).backward()
        optimizer.step()

    return step


def peak_memory(network: str, preparation: str) -> float:
    """MB by which three steps raise the most memory that this process ever held, above its idle state."""
    idle = _most_held()
    step = training_step(network, preparation)
    for _ in range(3):
        step()
    return _most_held() - idle


def _most_held() -> float:
    # getrusage's ru_maxrss would begin at what the parent process held.
    status = Path("/proc/self/status").read_text()
    return float(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(peak_memory(*sys.argv[1:]))
