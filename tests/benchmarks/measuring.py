"""Times as ratios: what is compared runs alternately in one process, and the quietest repetition counts."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median

from lfq_lightning.tables import aligned

Call = Callable[[], object]

_ENOUGH = 2e-3  # seconds that one timed repetition should last, so that neither the clock nor cold caches count


@dataclass
class Table:
    """Rows of names and figures; prints aligned."""

    name: str
    columns: list[str] = field(default_factory=list)
    rows: list[dict[str, str | float | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, **row: str | float | None) -> None:
        self.columns += [column for column in row if column not in self.columns]
        self.rows.append(row)

    def __str__(self) -> str:
        cells = [[_shown(row.get(column)) for column in self.columns] for row in self.rows]
        table = aligned([c.replace("_", " ") for c in self.columns], cells, [True] * len(self.columns))
        return "\n".join([self.name, *self.notes, table])


def _shown(value: str | float | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"


def machine() -> dict[str, str]:
    """What the figures depend on beside the code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    about = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in about.items()}
    names = [facts[key] for key in ("model name", "model") if key in facts]
    return {
        "processor": " model ".join(names) or platform.processor(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": version("torch"),
    }


def keep_freed_memory() -> str:
    """Let glibc keep what is freed, so that no call's time is the kernel's for fresh pages; the note to print."""
    trim_threshold, mmap_threshold, most = -1, -3, 32 << 20
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, most)  # the highest there is: larger tensors are fresh pages each time
    return "glibc keeps freed memory (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_), for all alike"


def times(
    calls: Mapping[str, Call], seconds: float = 1.0, least: int = 5, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds per call, in alternation, for about `seconds` in all and at least `least` repetitions.

    `time.process_time` as the clock leaves out the time of other processes; it counts that of every thread.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(_ENOUGH / max(time.perf_counter() - start, 1e-9)))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while len(taken[name]) < least or time.perf_counter() < end:
        for name, call in calls.items():
            start = clock()
            for _ in range(repeats[name]):
                call()
            taken[name].append((clock() - start) / repeats[name])
    return taken


def ratios(calls: Mapping[str, Call], base: Call, seconds: float = 0.5) -> dict[str, float]:
    """How many times as long as `base` each call takes; each is measured in alternation with `base` alone."""
    found = {}
    for name, call in calls.items():
        both = times({"base": base, name: call}, seconds)
        found[name] = min(both[name]) / min(both["base"])
    return found


def middle(taken: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: median(values) for name, values in taken.items()}
