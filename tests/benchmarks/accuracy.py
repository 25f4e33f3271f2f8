"""Accuracy at 2 to 8 bits: float checkpoints, then each method with the same budget.

python -m tests.benchmarks.accuracy --seeds 10            # minutes to hours; goes on where it was stopped
python -m tests.benchmarks.accuracy --tasks residual --cells W2A2 --methods ours torch.ao --seeds 3
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import lfq_lightning as lfq
from tests.benchmarks.accuracy_methods import CELLS, METHODS, VARIANTS
from tests.benchmarks.accuracy_tasks import TASKS, Data, fit, score
from tests.benchmarks.measuring import Table, machine

FLOAT = "float"
Key = tuple[str, str, str, int]  # task, cell, method, seed


class Results:
    """Scores in a file of JSON lines, one a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scores: dict[Key, float] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            row = json.loads(line)
            self.scores[(row["task"], row["cell"], row["method"], row["seed"])] = row["score"]

    def add(self, key: Key, value: float) -> None:
        self.scores[key] = value
        row = dict(zip(("task", "cell", "method", "seed"), key, strict=True)) | {"score": value}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def trained(task_name: str, seed: int, data: Data, folder: Path) -> nn.Module:
    """The float network that every method starts from."""
    task = TASKS[task_name]
    torch.manual_seed(seed)
    network = task.network()
    path = folder / f"{task_name}_{seed}.pt"
    if path.exists():
        network.load_state_dict(torch.load(path))
    else:
        fit(task, network, data, seed, [])
        torch.save(network.state_dict(), path)
    return network


def measure(task_name: str, method: str, cell: str, seed: int, folder: Path) -> float | None:
    """The score after the second budget; None where the method has nothing for the cell."""
    task = TASKS[task_name]
    data = task.data(seed)
    network = copy.deepcopy(trained(task_name, seed, data, folder))
    callbacks = []
    if method != FLOAT:
        steps = task.epochs * (len(data.train[0]) // task.batch_size)
        network.train()
        made = (METHODS | VARIANTS)[method](CELLS[cell], network, lfq.PhaseSchedule.for_run(task.epochs, steps))
        if made is None:
            return None
        callbacks = made
    torch.manual_seed(seed)
    fit(task, network, data, seed + 1000, callbacks)
    return score(task, network, data)


def runs(arguments: argparse.Namespace) -> Iterator[Key]:
    for seed in range(arguments.seeds):
        for task in arguments.tasks:
            yield task, "", FLOAT, seed
            for cell in arguments.cells:
                for method in arguments.methods:
                    yield task, cell, method, seed


def tables(results: Results) -> Iterator[Table]:
    """For each task and cell: mean, standard deviation, and the mean difference from float and from ours by seed."""
    grouped: dict[str, dict[str, dict[str, dict[int, float]]]] = defaultdict(lambda: defaultdict(dict))
    for (task, cell, method, seed), value in results.scores.items():
        grouped[task][cell].setdefault(method, {})[seed] = value
    for task, cells in grouped.items():
        table = Table(f"accuracy_{task}")
        table.notes.append(
            f"{TASKS[task].unit}; paired differences by seed; higher is better: {TASKS[task].higher_is_better}"
        )
        base = cells[""][FLOAT]
        for cell, methods in cells.items():
            for method, by_seed in methods.items():
                values = list(by_seed.values())
                own = methods.get("ours", {})
                table.add(
                    cell=cell or FLOAT,
                    method=method,
                    seeds=str(len(values)),
                    mean=mean(values),
                    sd=stdev(values) if len(values) > 1 else None,
                    minus_float=_paired(by_seed, base) if cell else None,
                    ours_minus_it=_paired(own, by_seed) if cell and method != "ours" else None,
                )
        yield table


def _paired(a: dict[int, float], b: dict[int, float]) -> float | None:
    both = a.keys() & b.keys()
    return mean(a[seed] - b[seed] for seed in both) if both else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS | VARIANTS))
    parser.add_argument("--folder", type=Path, default=Path(".benchmarks"), help="float checkpoints and results")
    parser.add_argument("--report", action="store_true", help="print the tables of what is there, and train nothing")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results = Results(arguments.folder / "accuracy.jsonl")
    for key in () if arguments.report else runs(arguments):
        task, cell, method, seed = key
        if key not in results.scores:
            found = measure(task, method, cell, seed, arguments.folder)
            if found is not None:
                results.add(key, found)
                print(*key, f"{found:.4f}", flush=True)
    print("  ".join(f"{name} {value}" for name, value in machine().items()))
    for table in tables(results):
        print(f"\n{table}")


if __name__ == "__main__":
    main()
