"""Time against the number of elements, and one thread against two."""

from __future__ import annotations

import os

import torch

from tests.benchmarks.measuring import Table, keep_freed_memory, times
from tests.benchmarks.test_operation import Operands


def test_scaling(table: Table) -> None:
    table.notes.append("nanoseconds an element and their ratio to a memcpy, float32, one scale, forward + backward")
    table.notes.append("a memcpy goes to memory that is there; two clones ask for as much memory as the operation does")
    table.notes.append(keep_freed_memory())
    threads = [n for n in (1, 2) if n <= (os.cpu_count() or 1)]
    for exponent in range(3, 9):
        operands = Operands(torch.randn(10**exponent))
        x = operands.x.detach()
        calls = {"clones": _with_threads(1, lambda x=x: (x.clone(), x.clone()))}
        for count in threads:
            for name, call in (("memcpy", operands.memcpy), ("ours", operands.both_ways(operands.ours))):
                calls[f"{name}_{count}"] = _with_threads(count, call)
        best = {name: min(taken) / 10**exponent * 1e9 for name, taken in times(calls, 1.0, least=3).items()}
        torch.set_num_threads(1)
        row: dict[str, str | float | None] = {"elements": f"1e{exponent}"}
        for count in threads:
            row[f"ns_{count}_thread"] = best[f"ours_{count}"]
            row[f"memcpys_{count}_thread"] = best[f"ours_{count}"] / best[f"memcpy_{count}"]
        row["of_two_clones"] = best["ours_1"] / best["clones"]
        if len(threads) > 1:
            row["speedup"] = best["ours_1"] / best["ours_2"]
        table.add(**row)


def _with_threads(count, call):
    def run() -> None:
        torch.set_num_threads(count)
        call()

    return run
