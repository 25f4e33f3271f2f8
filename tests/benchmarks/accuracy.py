"""Accuracy at 2 to 8 bits: float checkpoints, then each method with the same budget.

python -m tests.benchmarks.accuracy --seeds 10            # minutes to hours; goes on where it was stopped
python -m tests.benchmarks.accuracy --tasks residual --cells W2A2 --methods ours torch.ao --seeds 3
python -m tests.benchmarks.accuracy --report --folder tests/benchmarks/results    # what the tables beside this show
python -m tests.benchmarks.accuracy --report --folder tests/benchmarks/results/fresh    # seeds that chose no default
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
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

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
    """Scores in a file of JSON lines: one a run, and before those of a machine what it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.machines: list[dict[str, str]] = []
        self.scores: dict[Key, float] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            row = json.loads(line)
            if "processor" in row:
                self.machines.append(row)
            else:
                self.scores[(row["task"], row["cell"], row["method"], row["seed"])] = row["score"]

    def add(self, key: Key, value: float) -> None:
        if machine() not in self.machines:
            self.machines.append(machine())
            self._write(self.machines[-1])
        self.scores[key] = value
        self._write(dict(zip(("task", "cell", "method", "seed"), key, strict=True)) | {"score": value})

    def _write(self, row: dict[str, Any]) -> None:
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
    return score(task, network, data.test)


RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def tune(task_name: str, seeds: range) -> None:
    """What float scores on the validation data at each learning rate; on the test data, where there is no other."""
    for rate in RATES:
        task = replace(TASKS[task_name], learning_rate=rate)
        found = []
        for seed in seeds:
            data = task.data(seed)
            torch.manual_seed(seed)
            network = task.network()
            fit(task, network, data, seed, [])
            found.append(score(task, network, data.validation or data.test))
        print(task_name, rate, f"{mean(found):.3f}", flush=True)


def runs(arguments: argparse.Namespace) -> Iterator[Key]:
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
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


def overview(results: Results) -> str:
    """Every method beside float as a Markdown table: mean, standard deviation, mean difference by seed, seeds."""
    by_seed: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    for (task, cell, method, seed), value in results.scores.items():
        by_seed[task, cell, method][seed] = value
    rows = [["network and bits", FLOAT, *METHODS]]
    rows.append(["---"] * len(rows[0]))
    for task in TASKS:
        base = by_seed[task, "", FLOAT]
        for cell in CELLS:
            found = [by_seed[task, cell, method] for method in METHODS]
            if any(found):
                rows.append([f"{task} {cell}", _shown(base, {}), *(_shown(scores, base) for scores in found)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def differences(results: Results) -> str:
    """What ours has over each other method as a Markdown table: the mean difference by seed and its standard error.

    A positive number is in our favour, whichever direction the score has.
    """
    by_seed: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    for (task, cell, method, seed), value in results.scores.items():
        by_seed[task, cell, method][seed] = value
    others = [FLOAT, *(name for name in METHODS if name != "ours")]
    rows = [["network and bits", "seeds", "ours", *(f"over {name}" for name in others)]]
    rows.append(["---"] * len(rows[0]))
    for task in TASKS:
        sign, digits = (1, 2) if TASKS[task].higher_is_better else (-1, 4)
        for cell in CELLS:
            own = by_seed[task, cell, "ours"]
            if own:
                found = [by_seed[task, "" if name == FLOAT else cell, name] for name in others]
                over = [[sign * (own[seed] - other[seed]) for seed in own.keys() & other.keys()] for other in found]
                shown = [
                    f"{mean(d):+.{digits}f} ± {stdev(d) / len(d) ** 0.5:.{digits}f}" if len(d) > 1 else "" for d in over
                ]
                rows.append([f"{task} {cell}", str(len(own)), f"{mean(own.values()):.{digits}f}", *shown])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _shown(scores: dict[int, float], base: dict[int, float]) -> str:
    if not scores:
        return ""
    deviation = f" ± {stdev(scores.values()):.2f}" if len(scores) > 1 else ""
    difference = f" ({_paired(scores, base):+.2f})" if base else ""
    return f"{mean(scores.values()):.2f}{deviation}{difference}, {len(scores)}"


def _paired(a: dict[int, float], b: dict[int, float]) -> float | None:
    both = a.keys() & b.keys()
    return mean(a[seed] - b[seed] for seed in both) if both else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS | VARIANTS))
    parser.add_argument("--folder", type=Path, default=Path(".benchmarks"), help="float checkpoints and results")
    parser.add_argument("--report", action="store_true", help="print the tables of what is there, and train nothing")
    parser.add_argument(
        "--tune", action="store_true", help="score float at several learning rates, and quantize nothing"
    )
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if arguments.tune:
        for name in arguments.tasks:
            tune(name, range(arguments.first_seed, arguments.first_seed + arguments.seeds))
        return
    results = Results(arguments.folder / "accuracy.jsonl")
    for key in () if arguments.report else runs(arguments):
        task, cell, method, seed = key
        if key not in results.scores:
            found = measure(task, method, cell, seed, arguments.folder)
            if found is not None:
                results.add(key, found)
                print(*key, f"{found:.4f}", flush=True)
    for facts in results.machines:
        print("  ".join(f"{name} {value}" for name, value in facts.items()))
    for table in tables(results):
        print(f"\n{table}")
    print(f"\nours over others: mean difference by seed ± its standard error\n\n{differences(results)}")
    print(f"\nmean ± standard deviation (mean difference from float by seed), seeds\n\n{overview(results)}")


if __name__ == "__main__":
    main()
