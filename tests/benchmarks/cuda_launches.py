"""The kernels that an eager training step launches for its quantizers, and what Python takes for each."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import torch
from torch import nn

from lfq_lightning.ops import autograd
from lfq_lightning.ops import triton as ops
from tests.benchmarks.measuring import Table, times
from tests.benchmarks.on_cuda import make
from tests.benchmarks.steps import PREPARATIONS
from tests.benchmarks.test_cuda_step import BATCHES
from tests.compiled_kernels import both_passes, launches

_SIMILAR = {"resnet50": (slice(1), slice(None), slice(32), slice(32)), "transformer": (slice(1), slice(4))}


def launches_of_a_step() -> Table:
    """Count the launches of one forward and backward pass, with every size as on the GPU; nothing is computed."""
    table = Table("kernels that one eager training step launches, W4A4 with scales per channel of weights")
    for network, batch in BATCHES.items():
        model, x, labels = make(network, 1)
        PREPARATIONS["ours"](model, x[_SIMILAR[network]])  # as few values as do
        x, labels = (t.to("meta").expand(batch, *t.shape[1:]).contiguous() for t in (x, labels))
        model = model.to("meta")
        weights = {parameter.shape for parameter in model.parameters()}
        with launches(90, compiling=False) as found, mock.patch.object(autograd, "select", lambda x: ops):
            loss = nn.functional.cross_entropy(model(x).flatten(0, -2), labels.flatten())
            loss.backward()
        count: Counter[tuple[str, str]] = Counter()
        of = "weights"
        for launch in found:
            if "x" in launch.arguments:  # sums of sums follow their pass
                of = "weights" if launch.arguments["x"].shape in weights else "inputs"
            count[of, launch.name.split("_")[0]] += 1
        for of in ("weights", "inputs"):
            passes = {kind: str(count[of, kind]) for kind in ("forward", "backward", "add")}
            table.add(network=f"{network}, batch {batch}", of=of, **passes, all=str(sum(map(int, passes.values()))))
        table.add(network="", of="both", all=str(len(found)))
    return table


def python_per_launch() -> Table:
    """What Python takes for a pass on tensors that hold nothing, short of the driver's own call."""
    table = Table("microseconds of Python for the passes over one small weight, without the driver's launch")
    table.notes.append("checks, plan, results' memory, and the way to the driver: Triton's look-up, or a kept launch")
    shape, axis, settings = (512, 512), 0, ("lsq", True, True)
    with launches(90) as found:
        x = both_passes(shape, axis, None, torch.float32)
        count = len(found)
        bare = min(times({"tensors": lambda: [torch.empty(shape, device="meta") for _ in range(3)]})["tensors"])
        plan = ops._plan(x.shape, x.stride(), x.dtype, x.get_device(), axis, None, shape[axis])
        for way in ("look-up", "kept"):
            if way == "kept":
                for launch in (plan.forward, *plan.backward(*settings)):
                    if launch is not None:
                        launch._launch = lambda *arguments: None
            taken = min(times({way: lambda: both_passes(shape, axis, None, torch.float32)})[way])
            each = (taken - bare) * 1e6 / count
            table.add(way=way, launches=str(count), both_passes=(taken - bare) * 1e6, each=each)
    return table
