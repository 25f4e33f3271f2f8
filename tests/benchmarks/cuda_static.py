"""What the compiled CUDA kernels let one predict without a GPU, and what a training step launches.

Run `python -m tests.benchmarks.cuda_static`. Registers, accesses and instructions are counted in compiled code. The
shares of the bandwidth follow from them, with data sheets: they are predictions and no measurements. Where they say
"issue", they are too high, because no kernel issues an instruction at every clock; where they say "in flight", they are
as good as the latency in `cuda_processors.py`. The shares that a GPU reached stand beside, where
`tests/benchmarks/results/cuda/` has a folder of that GPU.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import argparse
import json
import math
from pathlib import Path

import torch
import triton
import triton.language as tl

from tests.benchmarks.cuda_launches import launches_of_a_step, python_per_launch
from tests.benchmarks.cuda_processors import PROCESSORS, WARPS, clocks, executed, resident_programs
from tests.benchmarks.measuring import Table
from tests.compiled_kernels import Launch, both_passes, launches

RESULTS = Path(__file__).parent / "results/cuda"
_ROWS = (2**14, 2**12)  # the 2^26 elements of `test_cuda_bandwidth.py`, and its granularities
GRANULARITIES = {
    "one scale": (_ROWS, None, None),
    "per row": (_ROWS, 0, None),
    "per column": (_ROWS, 1, None),
    "groups of 128": (_ROWS, None, 128),
    "3x3 kernels": ((2048, 512, 3, 3), 0, None),
    "images 56x56": ((64, 256, 56, 56), 1, None),
    "images 14x14": ((256, 1024, 14, 14), 1, None),
    "1000 columns": ((2**15, 1000), 1, None),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def predictions(name: str, granularities: list[str]) -> Table:
    """Every pass on one processor."""
    processor = PROCESSORS[name]
    table = Table(f"{name}, sm_{processor.capability}: predictions from compiled code, not measurements")
    table.notes += [
        f"of a multiprocessor: {WARPS} warps at most; {processor.asked_in_flight / 1024:.0f} KiB of loads in flight "
        "fill the memory's latency",
        "each: instructions of a thread for an element; at most: the share of a copy's bandwidth, by what bounds it",
    ]
    for granularity in granularities:
        for dtype in DTYPES:
            with launches(processor.capability, math.prod(GRANULARITIES[granularity][0])) as found:
                x = both_passes(*GRANULARITIES[granularity], DTYPES[dtype])
            for number, launch in enumerate(found):
                described = {"granularity": granularity, "dtype": dtype, "of": ("forward", "backward")[number]}
                table.add(**described, **prediction(name, launch, x), measured=measured(name, **described))
    return table


def prediction(name: str, launch: Launch, x: torch.Tensor) -> dict[str, str | float]:
    """The row of one launch of a pass over x on a processor."""
    processor, resources = PROCESSORS[name], launch.resources
    large = launch.as_large_as(x)
    met = [access for access in launch.accesses if access.argument in large]
    threads = launch.warps * 32
    elements = x.numel() / launch.programs / threads
    moved = elements * len(large) * x.itemsize
    operations = executed(launch.instructions, elements)
    resident = resident_programs(processor, resources.registers, launch.warps, resources.shared)
    in_flight = resident * threads * sum(access.bits // 8 for access in met if not access.stores)
    shares = {kind: moved / processor.copied / count for kind, count in clocks(processor, operations).items()}
    shares |= {"in flight": in_flight / processor.asked_in_flight, "memory": 1.0}
    bound = min(shares, key=lambda kind: shares[kind])
    return {
        "registers": str(resources.registers),
        "spilled": str(resources.spilled),
        "warps": str(resident * launch.warps),
        "bits": "/".join(str(bits) for bits in sorted({access.bits for access in met})),
        "KiB_in_flight": in_flight / 1024,
        "each": operations.total() / elements,
        "per_byte": operations.total() / moved,
        "bound": bound,
        "at_most": shares[bound],
    }


def measured(name: str, granularity: str, dtype: str, of: str) -> float | None:
    """The share of a copy's bandwidth that this processor reached at 2^26 elements, if that was measured."""
    path = RESULTS / name.lower() / f"cuda_bandwidth_{granularity.replace(' ', '_')}_{dtype}.json"
    if not path.exists():
        return None
    rows = json.loads(path.read_text())["rows"]
    return next((row[f"{of}_share"] for row in rows if row["elements"] == "2^26"), None)


# ---- what a division costs ------------------------------------------------------------------------------------------


@triton.jit
def _divide(x, y, s):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(y + at, tl.div_rn(tl.load(x + at), tl.load(s)))


@triton.jit
def _multiply(x, y, s):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(y + at, tl.load(x + at) * tl.load(s))


def division(names: list[str]) -> Table:
    """Instructions of an IEEE division by a scale that a thread's elements share, beyond those of a multiplication."""
    table = Table("instructions of a float32 division that rounds as IEEE asks, where a multiplication has one")
    table.notes.append("of eight elements of a thread; rarely: beyond normal numbers, the longest way and its call")
    for capability in dict.fromkeys(PROCESSORS[name].capability for name in names):
        x = torch.empty(2**20, device="meta")
        with launches(capability) as found:
            for kernel in (_divide, _multiply):
                kernel[(2**10,)](x, x, x[:1], num_warps=4, enable_fp_fusion=False)
        divided, multiplied = (launch.instructions for launch in found)
        more = executed(divided, 8).total() - executed(multiplied).total()
        start = next(each.target for each in divided if each.operation == "CALL")
        rare = executed([each for each in divided if start is not None and each.address >= start])
        table.add(processor=f"sm_{capability}", usually=1 + more / 8, rarely=str(rare.total()))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processors", nargs="*", choices=PROCESSORS, default=list(PROCESSORS))
    parser.add_argument("--granularities", nargs="*", choices=GRANULARITIES, default=list(GRANULARITIES))
    given = parser.parse_args()
    for name in given.processors:
        print(predictions(name, given.granularities), end="\n\n", flush=True)
    for table in (division(given.processors), launches_of_a_step(), python_per_launch()):
        print(table, end="\n\n", flush=True)


if __name__ == "__main__":
    main()
