"""Compares the runs of a sweep: what they cost in bytes, and what they reach."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from omegaconf import OmegaConf

from lfq_lightning.checking import check_flags, check_path, check_texts
from lfq_lightning.tables import Table


class Job(NamedTuple):
    """One job of a sweep: the overrides that made it but the seed, its seed, and its metrics.json by section."""

    directory: Path
    overrides: dict[str, str]
    seed: str
    results: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Method:
    """Runs that differ in their seed alone.

    Args:
        name: the overrides that set it apart, or "float".
        size: bytes.
        values: the metric of each seed.
        on_front: no other method is as small and as good, and better in one of the two.
    """

    name: str
    size: float
    values: tuple[float, ...]
    on_front: bool = False

    @property
    def mean(self) -> float:
        """The metric's mean over the seeds."""
        return fmean(self.values)

    @property
    def deviation(self) -> float:
        """The metric's sample standard deviation over the seeds; NaN with one."""
        return stdev(self.values) if len(self.values) > 1 else math.nan


@dataclass(frozen=True)
class Comparison:
    """Every method of a sweep from the smallest to the largest; prints as a table, the Pareto front marked."""

    metric: str
    methods: tuple[Method, ...]
    skipped: tuple[Path, ...] = ()

    def __str__(self) -> str:
        rows = []
        for m in self.methods:
            spread = "" if math.isnan(m.deviation) else f" ± {m.deviation:.4f}"
            rows.append((m.name, str(len(m.values)), f"{m.size:,.0f}", f"{m.mean:.4f}{spread}", "*" * m.on_front))
        notes = [f"without metrics.json, left out: {path}" for path in self.skipped]
        columns = {"method": "<", "seeds": ">", "bytes": ">", self.metric: "<", "front": "<"}
        return str(Table(columns, rows, notes))


def compare(
    directory: Path | str,
    metric: str = "test/accuracy",
    size: str = "parameter_bytes",
    lower_is_better: bool = False,
    seed: str = "seed",
) -> Comparison:
    """Compare the runs below a directory, as Hydra's ``--multirun`` leaves them.

    A run is a directory with ``.hydra/overrides.yaml`` and the ``metrics.json`` that the job wrote: the numbers of the
    model, or a mapping of such with the keys ``float`` and ``quantized``. Runs whose overrides are equal but for the
    seed are one method. The float model of each size is a method as well, counted once for each seed.

    Args:
        directory: where the runs lie, at any depth.
        metric: name of the number that methods are judged by.
        size: name of the number that holds their size in bytes.
        lower_is_better: for a loss or an error.
        seed: the override by which repetitions differ.

    Returns:
        The methods; a method is on the Pareto front if no other is as small and as good, by the mean over seeds, and
        better in one of the two.

    Raises:
        ValueError: if there is no run with metrics, or a run's metrics lack a name.

    Example:
        >>> print(compare("outputs/multirun/2026-01-31/12-00-00"))  # doctest: +SKIP
    """
    check_path("directory", directory)
    check_texts(metric=metric, size=size, seed=seed)
    check_flags(lower_is_better=lower_is_better)
    runs, skipped = read_runs(Path(directory), seed)
    names = _names([run.overrides for run in runs])
    found: dict[tuple[str, float], dict[tuple[str, float], None]] = {}
    for run, name in zip(runs, names, strict=True):
        for section, numbers in run.results.items():
            for wanted in (metric, size):
                if wanted not in numbers:
                    raise ValueError(
                        f"`{run.directory / 'metrics.json'}` must hold {wanted!r}. Found {', '.join(sorted(numbers))}: "
                        "choose with --metric and --size."
                    )
            key = ("float" if section == "float" else name, numbers[size])
            # Every run of a sweep over bits fits the same float model again: equal results of a seed count once.
            repeated = run.seed if section == "float" else str(run.directory)
            found.setdefault(key, {})[repeated, numbers[metric]] = None
    methods = [Method(name, bytes_, tuple(v for _, v in values)) for (name, bytes_), values in found.items()]
    sign = -1 if lower_is_better else 1
    front = [_on_front(m, methods, sign) for m in methods]
    methods = [Method(m.name, m.size, m.values, best) for m, best in zip(methods, front, strict=True)]
    return Comparison(metric, tuple(sorted(methods, key=lambda m: (m.size, -sign * m.mean))), tuple(skipped))


def read_runs(directory: Path, seed: str) -> tuple[list[Job], list[Path]]:
    """The runs below a directory, and those that have left no metrics."""
    runs, skipped = [], []
    for file in sorted(directory.rglob(".hydra/overrides.yaml"), key=lambda f: _natural(str(f))):
        run = file.parent.parent
        if not (run / "metrics.json").exists():
            skipped.append(run)
            continue
        overrides = dict(str(line).lstrip("+~").partition("=")[::2] for line in OmegaConf.load(file))
        results = json.loads((run / "metrics.json").read_text())
        if not all(isinstance(section, dict) for section in results.values()):
            results = {"quantized": results}
        runs.append(Job(run, overrides, overrides.pop(seed, ""), results))
    if not runs:
        raise ValueError(
            f"A comparison needs runs with .hydra/overrides.yaml and metrics.json. Found {len(skipped)} without "
            f"metrics and none with them below `{directory}`: give the directory of a --multirun."
        )
    return runs, skipped


def _natural(text: str) -> list[tuple[int, str]]:
    """Run 10 stands after run 9."""
    return [(int(digits or 0), word) for word, digits in re.findall(r"(\D*)(\d*)", text)]


def _names(overrides: list[dict[str, str]]) -> list[str]:
    """What sets each run apart: the overrides that not all share, a word such as `w4a4` without its key."""
    keys = list(dict.fromkeys(key for given in overrides for key in given))
    telling = [key for key in keys if len({given.get(key) for given in overrides}) > 1] or keys[:1]
    return [" ".join(_word(key, given[key]) for key in telling if key in given) or "defaults" for given in overrides]


def _word(key: str, value: str) -> str:
    words = re.fullmatch(r"\[?([A-Za-z]\w*(, ?[A-Za-z]\w*)*)\]?", value)
    return words[1] if words and value not in ("null", "true", "false") else f"{key}={value}"


def _on_front(method: Method, others: Iterable[Method], sign: int) -> bool:
    here = (-method.size, sign * method.mean)
    there = [(-other.size, sign * other.mean) for other in others]
    return not any(o != here and o[0] >= here[0] and o[1] >= here[1] for o in there)
