"""A training step on a GPU, W4A4 with scales per channel of weights, in multiples of the float step."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lfq_lightning.training.hiding import hidden_qparams
from lfq_lightning.training.stepping.qparams import QParamOptimizer
from tests.benchmarks.measuring import Table
from tests.benchmarks.on_cuda import device_note, make, medians, needs_cuda
from tests.benchmarks.steps import PREPARATIONS

pytestmark = needs_cuda

TRAININGS = ("float", "ours", "torch.ao")
COMPILED = ("float", "ours")  # Dynamo breaks torch.ao's graph at each of its quantizers
BATCHES = {"resnet50": 64, "transformer": 16}


def training_step(network: str, training: str, mixed: bool, compiled: bool) -> Callable[[], None]:
    """One step of SGD with momentum on the GPU; the qparams are stepped by the optimizer that is theirs."""
    model, x, labels = make(network, BATCHES[network])
    PREPARATIONS[training](model, x[:2])  # on the CPU: torch.ao's makes its tensors there
    model, x, labels = model.cuda(), x.cuda(), labels.cuda()
    if network == "resnet50":
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    with hidden_qparams(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if training == "ours":
        QParamOptimizer(model, [optimizer])
    # In CUDA graphs, without which Python's time for a launch counts.
    call = torch.compile(model, mode="reduce-overhead") if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16) if mixed else contextlib.nullcontext():
            loss = nn.functional.cross_entropy(call(x).flatten(0, -2), labels.flatten())
        loss.backward()
        optimizer.step()

    return step


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "bf16_mixed"])
@pytest.mark.parametrize("network", BATCHES)
def test_cuda_step(table: Table, network: str, mixed: bool, compiled: bool) -> None:
    table.name = f"cuda_step_{network}_{'bf16_mixed' if mixed else 'float32'}_{'compiled' if compiled else 'eager'}"
    table.notes += [device_note(), f"batch {BATCHES[network]}; medians of 30 steps, with what Python takes"]
    float_ms = None
    for training in COMPILED if compiled else TRAININGS:
        torch.compiler.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what other libraries deprecate
            try:
                step = training_step(network, training, mixed, compiled)
                for _ in range(5):
                    step()
            except Exception as error:
                if training == "ours":
                    raise
                table.notes.append(f"{training} does not run: {type(error).__name__}")
                continue
            taken = medians({training: step}, repetitions=30)[training]
        float_ms = taken if float_ms is None else float_ms
        peak = torch.cuda.max_memory_allocated() / 2**20
        table.add(training=training, ms=taken, ratio=taken / float_ms, peak_MB=peak)
