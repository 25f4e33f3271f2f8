"""Accuracy in ONNX Runtime itself: networks trained for it, and its own post-training quantization of the float ones.

python -m tests.benchmarks.in_runtimes                     # half an hour on one core; goes on where it was stopped
python -m tests.benchmarks.in_runtimes --report --folder tests/benchmarks/results/in_runtimes
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import onnxruntime
import torch
from torch import Tensor, nn

import lfq_lightning as lfq
from tests.benchmarks.accuracy import FLOAT, Results, trained
from tests.benchmarks.accuracy_tasks import TASKS, Data, fit, score
from tests.benchmarks.measuring import Table, machine
from tests.benchmarks.test_target import by_onnxruntime

NETWORKS = ("residual", "separable", "mnist_residual", "mnist_separable")
OWN = "its own W8A8"
HALF = lfq.QuantSpec(8, granularity="per_channel", quant_min=-63, quant_max=63)
OURS = {"W8A8": (8, 8), "W8A8 within 63": (HALF, 8), "W4A8": (4, 8), "W4A4": (4, 4)}
EXAMPLES = 256  # that ONNX Runtime takes its ranges from


class InOnnxRuntime(nn.Module):
    """A file as a module."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(self, x: Tensor) -> Tensor:
        [given] = self.session.get_inputs()
        return torch.as_tensor(self.session.run(None, {given.name: x.numpy()})[0])


def quantized_by_onnxruntime(network: nn.Module, data: Data, folder: Path) -> Path:
    """Its post-training quantization, with a scale for each channel."""
    images, path = data.train[0][:EXAMPLES], folder / "float.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(network.eval(), (images[:2],), path, dynamo=True, verbose=False, dynamic_shapes=shapes)
    return by_onnxruntime(path, images, "")


def trained_for_it(network: nn.Module, task_name: str, data: Data, seed: int, method: str, folder: Path) -> Path:
    """The file of a fit of as many epochs as float has had."""
    weight, activation = OURS[method]
    qat = lfq.QuantizationAwareTraining(weight, activation, target="onnxruntime", record_every_n_steps=10**9)
    torch.manual_seed(seed)
    fit(TASKS[task_name], network.train(), data, seed + 1000, [qat])
    path = folder / "m.onnx"
    lfq.export_onnx(network, data.train[0][:8], path, optimize_for="speed", on_mismatch="warn")
    return path


def measure(task_name: str, method: str, seed: int, floats: Path) -> float:
    task = TASKS[task_name]
    data = task.data(seed)
    network = copy.deepcopy(trained(task_name, seed, data, floats))
    if method == FLOAT:
        return score(task, network, data.test)
    with tempfile.TemporaryDirectory() as folder:
        if method == OWN:
            path = quantized_by_onnxruntime(network, data, Path(folder))
        else:
            path = trained_for_it(network, task_name, data, seed, method, Path(folder))
        return score(task, InOnnxRuntime(path), data.test)


def report(results: Results) -> Table:
    """Means, and by how many points each is ahead of what ONNX Runtime makes of the float network, by seed."""
    found: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for (task, _, method, seed), value in results.scores.items():
        found[task, method][seed] = value
    table = Table("in_runtimes", notes=["% of the test images, in ONNX Runtime; differences by seed, standard error"])
    for (task, method), values in found.items():
        own = found[task, OWN]
        over = [values[seed] - own[seed] for seed in values.keys() & own.keys()]
        error = f" ± {stdev(over) / len(over) ** 0.5:.2f}" if len(over) > 1 else ""
        table.add(
            network=task,
            quantized=method,
            seeds=str(len(values)),
            mean=f"{mean(values.values()):.2f}",
            over_its_own=f"{mean(over):+.2f}{error}" if method != OWN else "",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(".benchmarks/in_runtimes"))
    parser.add_argument("--report", action="store_true", help="print the table of what is there, and train nothing")
    arguments = parser.parse_args()
    floats = arguments.folder / "float"
    floats.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.folder / "accuracy.jsonl")
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for seed in () if arguments.report else range(arguments.seeds):
        for task in arguments.networks:
            for method in (FLOAT, OWN, *OURS):
                key = (task, "", method, seed)
                if key not in results.scores:
                    results.add(key, measure(task, method, seed, floats))
                    print(*key, f"{results.scores[key]:.2f}", flush=True)
    print("  ".join(f"{name} {value}" for name, value in machine().items()))
    print(report(results))


if __name__ == "__main__":
    main()
