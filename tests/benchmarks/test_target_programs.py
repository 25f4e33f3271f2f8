"""What runtimes make of programs: quantized for them, without a target, and by their own post-training quantization.

Needs executorch and torchao, which the extra `bench` brings; what is missing is skipped.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import lfq_lightning as lfq
from tests.benchmarks.measuring import Table
from tests.benchmarks.test_target import NETWORKS

RUNS = 60
PRODUCTS = ("conv1d", "conv2d", "conv3d", "convolution", "linear", "addmm", "mm")
Run = Callable[[Tensor], Any]


def by_pt2e(net: nn.Module, inputs: Tensor, quantizer: Any) -> nn.Module:
    """The network by the post-training quantization of PyTorch's export."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    prepared = prepare_pt2e(torch.export.export(net, (inputs[:1],)).module(), quantizer)
    for x in inputs:
        prepared(x[None])
    converted: nn.Module = convert_pt2e(prepared)
    return converted


def ours(net: nn.Module, inputs: Tensor, runtime: Any, target: Any) -> ExportedProgram:
    """A program of the calibrated network."""
    lfq.attach(net, 8, 8, example=inputs[:1], target=target)
    lfq.calibrate(net, inputs.split(8))
    program = lfq.export_pt2(net, inputs[:1], target=runtime)
    lfq.detach(net)
    return program


class ByExecutorch:
    """XNNPACK in ExecuTorch, one processor core."""

    def __init__(self, folder: Path) -> None:
        pytest.importorskip("executorch.exir")
        import executorch.kernels.quantized  # noqa: F401

        self._folder = folder

    def run(self, name: str, program: ExportedProgram) -> tuple[Run, int, int]:
        """What runs it, the bytes of its file, and how many layers are computed in integers."""
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime

        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        path = self._folder / f"{name}.pte"
        path.write_bytes(edge.to_executorch().buffer)
        method = Runtime.get().load_program(path).load_method("forward")
        return lambda x: method.execute([x])[0], path.stat().st_size, in_integers(program)

    def own(self, net: nn.Module, inputs: Tensor) -> ExportedProgram:
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack

        quantizer = xnnpack.XNNPACKQuantizer()
        quantizer.set_global(xnnpack.get_symmetric_quantization_config(is_per_channel=True))
        return torch.export.export(by_pt2e(net, inputs, quantizer), (inputs[:1],))


class ByInductor:
    """PyTorch's compiler with torchao's lowering to oneDNN."""

    def __init__(self, folder: Path) -> None:
        pytest.importorskip("torchao")
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401

        self._folder = folder

    def run(self, name: str, program: ExportedProgram) -> tuple[Run, int, int]:
        """What runs it, the bytes of its file, and how many layers are computed in integers."""
        from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

        integer = 0
        if name != "float":  # which also has the compiler know the patterns
            lowered = lower_pt2e_quantized_to_x86(program.module(), program.example_inputs[0])
            integer = sum("onednn.q" in str(n.target) and "prepack" not in str(n.target) for n in lowered.graph.nodes)
        path = str(self._folder / f"{name}.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs={"freezing": True})
        compiled: Run = torch._inductor.aoti_load_package(path)  # type: ignore[assignment]
        return compiled, Path(path).stat().st_size, integer

    def own(self, net: nn.Module, inputs: Tensor) -> ExportedProgram:
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        return torch.export.export(by_pt2e(net, inputs, quantizer), (inputs[:1],))


def _name_of(node: Any) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


def in_integers(program: ExportedProgram) -> int:
    """How many layers read codes and give codes, as XNNPACK needs it."""
    count = 0
    for node in program.graph.nodes:
        if node.op != "call_function" or _name_of(node) not in PRODUCTS:
            continue
        last = node
        while len(last.users) == 1 and _name_of(next(iter(last.users))) in ("relu", "relu_", "hardtanh", "hardtanh_"):
            last = next(iter(last.users))
        reads = ["dequantize" in str(each.target) for each in node.args[:2]]
        count += (
            all(reads) and all("quantize_per_tensor" in str(user.target) for user in last.users) and bool(last.users)
        )
    return count


def products(program: ExportedProgram) -> int:
    return sum(node.op == "call_function" and _name_of(node) in PRODUCTS for node in program.graph.nodes)


RUNTIMES: dict[str, Any] = {"executorch": ByExecutorch, "x86": ByInductor}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_programs(table: Table, tmp_path: Path, runtime: str, network: str) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # ExecuTorch has threads of its own
    torch.set_num_threads(1)
    table.name = f"target_{runtime}_{network.replace(' ', '_')}"
    table.notes.append("one example, one thread, medians of runs in turn, in multiples of float")
    with_kernels = RUNTIMES[runtime](tmp_path)
    make, data = NETWORKS[network]
    torch.manual_seed(0)
    net, inputs = make(), data()
    if network != "efficientnet lite0":
        net(inputs)  # statistics for BatchNorm
    net.eval()
    x = inputs[:1]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = net(x)
        programs = {"float": torch.export.export(net, (x,)), "its own W8A8": with_kernels.own(net, inputs)}
        programs["ours, no target"] = ours(net, inputs, runtime, None)
        programs["ours, W8A8"] = ours(net, inputs, runtime, runtime)
        made = {name: with_kernels.run(name, program) for name, program in programs.items()}
        taken: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(RUNS):
            for name, (run, *_) in made.items():
                start = time.perf_counter()
                run(x)
                taken[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times[5:]) for name, times in taken.items()}
    for name, (run, size, integer) in made.items():
        with torch.no_grad():
            noise = float((run(x) - expected).square().sum() / expected.square().sum())
        table.add(
            network=network,
            file=name,
            ms=f"{1e3 * median[name]:.2f}",
            of_float=f"{median[name] / median['float']:.3f}",
            of_its_own=f"{median[name] / median['its own W8A8']:.3f}",
            products_in_integers=f"{integer} of {products(programs[name])}",
            bytes_of_float=f"{size / made['float'][1]:.3f}",
            noise=f"{noise:.1e}",
        )
