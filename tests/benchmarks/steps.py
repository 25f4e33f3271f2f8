"""One training step of a network, in float and quantized by us and by others; as a program, its memory or price."""

from __future__ import annotations

import re
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.training.hiding import hidden_qparams
from lfq_lightning.training.stepping.qparams import QParamOptimizer
from tests.benchmarks import peers
from tests.benchmarks.measuring import Call, keep_freed_memory
from tests.benchmarks.networks import make

Prepare = Callable[[nn.Module, Tensor], None]


def keep_float(model: nn.Module, x: Tensor) -> None:
    """Nothing."""


def with_ours(model: nn.Module, x: Tensor, compress_saved: bool = False, rules: Sequence[lfq.Rule] = ()) -> None:
    lfq.attach(model, weight=4, activation=4, rules=rules, compress_saved=compress_saved, example=x)
    lfq.calibrate(model, [x])
    lfq.set_phase(model, "learn")


def with_ours_compressed(model: nn.Module, x: Tensor) -> None:
    with_ours(model, x, compress_saved=True)


def with_ours_everywhere(model: nn.Module, x: Tensor) -> None:
    """And the operands of what stands between the layers, in 8 bits."""
    with_ours(model, x, rules=[lfq.Rule("*/add*", activation=8), lfq.Rule("*/adaptive_avg_pool2d", activation=8)])


def fake_quantize_calls(network: str) -> tuple[int, int]:
    """How often a step quantizes a tensor, and how often it would if no two readers shared one."""
    model, x, _ = make(network)
    lfq.attach(model, weight=4, activation=4, example=x)
    lfq.calibrate(model, [x])
    lfq.set_phase(model, "learn")
    called: list[None] = []
    for quantizer in lfq.quantizers(model).values():
        quantizer.register_forward_hook(lambda *_: called.append(None))
    model(x)
    held = (child for module in model.modules() for child in module.children())
    return len(called), sum(isinstance(child, lfq.LearnableFakeQuantize) for child in held)


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
EVERYWHERE = "ours, additions and pooling too"
PEERS = {"brevitas": with_brevitas, "torchao": with_torchao}
MISSING = [name for name, installed in peers.INSTALLED.items() if not installed]
PREPARATIONS |= {name: prepare for name, prepare in PEERS.items() if name not in MISSING}


def training_step(network: str, preparation: str) -> Call:
    """A function that takes one step of SGD with momentum; the qparams are stepped by the optimizer that is theirs."""
    model, x, labels = make(network)
    (with_ours_everywhere if preparation == EVERYWHERE else PREPARATIONS[preparation])(model, x)
    with hidden_qparams(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if preparation.startswith("ours"):
        QParamOptimizer(model, [optimizer])

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, -2), labels.flatten()).backward()
        optimizer.step()

    return step


def ratio_to_float(network: str, preparation: str, seconds: float = 40.0) -> tuple[float, float]:
    """The median of the ratios of steps to the float steps before them, and the float step's median in seconds."""
    step, other = training_step(network, "float"), training_step(network, preparation)
    for _ in range(3):
        step(), other()
    ratios, taken, began = list[float](), list[float](), perf_counter()
    while perf_counter() - began < seconds or len(ratios) < 8:
        times = [perf_counter()]
        for each in (step, other):
            each()
            times.append(perf_counter())
        taken.append(times[1] - times[0])
        ratios.append((times[2] - times[1]) / taken[-1])
    return statistics.median(ratios), statistics.median(taken)


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
    if sys.argv[1] == "--ratio":
        keep_freed_memory()
        print(*ratio_to_float(*sys.argv[2:]))
    else:
        print(peak_memory(*sys.argv[1:]))
