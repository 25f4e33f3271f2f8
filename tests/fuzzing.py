"""Calls of every public name with right and wrong values: `python -m tests.fuzzing SEED CALLS DIRECTORY`.

Run in a process of its own, so that a crash of the interpreter is seen. An error is ours if it was raised by a `raise`
of the package and says what was found, or begins with the argument's name; or, where a user's own code failed (as a
model's `forward`), if it carries a note of the package that says what that code was given. All others are obscure.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import faulthandler
import functools
import inspect
import io
import json
import os
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn

import lfq_lightning as lfq
from lfq_lightning import observers
from lfq_lightning.__main__ import main as command_line
from lfq_lightning.records.comparison import compare
from lfq_lightning.training.batch_norm import reestimate_batch_norm

PACKAGE = Path(lfq.__file__).parent
X = torch.linspace(-1, 1, 8).view(2, 4)
Y = torch.zeros(2, 2)


class Tiny(L.LightningModule):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def attached(calibrated: bool = True) -> nn.Module:
    return copy.deepcopy(_attached(calibrated))


@functools.cache
def _attached(calibrated: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 2))
    lfq.attach(model)
    if calibrated:
        lfq.calibrate(model, [X])
    return model


@functools.cache
def measured() -> lfq.Sensitivity:
    return lfq.sensitivity(
        nn.Sequential(nn.Linear(4, 2)), [(X, Y)], nn.functional.mse_loss, (2, 8), higher_is_better=False
    )


def files(directory: Path) -> dict[str, Any]:
    """Paths of several kinds; what is written goes below the directory."""
    (directory / "folder").mkdir(exist_ok=True)
    (directory / "text.yaml").write_text("a: [1")
    lfq.save_rules([lfq.Rule("0", weight=8)], directory / "rules.yaml")
    torch.save({"state_dict": attached().state_dict()}, directory / "plain.ckpt")
    trainer = L.Trainer(logger=False, enable_checkpointing=False, barebones=False, accelerator="cpu")
    model = Tiny()
    lfq.attach(model)
    lfq.calibrate(model, [X])
    trainer.strategy.connect(model)
    trainer.save_checkpoint(directory / "saved.ckpt")
    (directory / "torn.ckpt").write_bytes((directory / "saved.ckpt").read_bytes()[:1500])
    names = ("folder", "text.yaml", "rules.yaml", "plain.ckpt", "saved.ckpt", "torn.ckpt", "none", "text.yaml/below")
    return {name: directory / name for name in names}


def right_values(paths: dict[str, Any]) -> dict[str, list[Callable[[], Any]]]:
    """By argument: what makes a value that fits it, so that calls go beyond their first check."""

    def path(*names: str) -> list[Callable[[], Any]]:
        return [functools.partial(paths.__getitem__, name) for name in names]

    model = [attached, functools.partial(attached, False), lambda: nn.Sequential(nn.Linear(4, 2)), Tiny]
    return {
        "model": model,
        "path": path("rules.yaml", "saved.ckpt", "none", "folder"),
        "source": path("saved.ckpt", "folder"),
        "run_directory": path("folder"),
        "directory": path("folder"),
        "teacher": path("saved.ckpt"),
        "module_class": [lambda: Tiny],
        "example_inputs": [lambda: X, lambda: [X, Y]],
        "batch": [lambda: X, lambda: [X, Y]],
        "batches": [lambda: [X], lambda: [[X, Y]]],
        "dataloader": [lambda: [(X, Y)]],
        "metric": [lambda: nn.functional.mse_loss],
        "higher_is_better": [lambda: False],
        "bits": [lambda: 4, lambda: (2, 8), lambda: {0: 8, 1: 4}],
        "x": [lambda: X],
        "scale": [lambda: torch.ones(1), lambda: 1.0],
        "zero_point": [lambda: torch.zeros(1), lambda: 0.0],
        "quant_min": [lambda: 0],
        "quant_max": [lambda: 15],
        "observer": [lambda: observers.MinMaxObserver(), lambda: "minmax"],
        "phase": [lambda: "estimate", lambda: "learn"],
        "callback": [lambda: EarlyStopping("loss")],
        "rules": [lambda: [lfq.Rule("0", weight=4)]],
        "match": [lambda: "0"],
        "checkpoint": [lambda: attached().state_dict()],
        "sensitivity": [measured],
        "freeze": [lambda: 1, lambda: 0.1],
        "opset": [lambda: 21],
    }


def any_values(paths: dict[str, Any]) -> list[Callable[[], Any]]:
    """Makers of values of every kind; fresh ones, as a call may change what it is given."""

    class Part:
        weight = 1

    tensors = [torch.zeros(0), torch.ones(1), torch.arange(3), torch.ones(2, 2).half(), torch.ones(2, 4, device="meta")]
    tensors += [torch.tensor(True), torch.full((4,), float("nan")), torch.ones(1, 1, 2, 2), torch.tensor(1j)]
    plain: list[Any] = [None, True, False, 0, 1, 2, 3, 8, -1, -7, 10**30, 2**31, 0.0, 0.5, -2.5, 1e308, float("nan")]
    plain += [
        float("inf"),
        -float("inf"),
        "",
        "4",
        "yes",
        "learn",
        "observe",
        "user",
        "lsq",
        "weight",
        "*",
        "\0",
        "a" * 300,
    ]
    plain += ["no such file", "per_channel", b"", b"\x80", [], [1, "a"], (), (1, 2), (0.1, 0.01), {}, {"a": 1}, {1: 2}]
    plain += [{"bits": 4}, {0: 8, 1: 2}, {"state_dict": {}}, set(), 1j, ..., range(3), slice(1), object, int, nn.Linear]
    plain += [
        Part,
        Part(),
        print,
        lambda: None,
        lambda *a: a,
        lambda *a: 1 / 0,
        iter([1]),
        torch.float32,
        torch.float16,
    ]
    plain += [
        torch.device("cpu"),
        lfq.QuantSpec(),
        lfq.Rule("*", weight=4),
        lfq.PhaseSchedule(),
        nn.ReLU(),
        nn.Module(),
    ]
    plain += [[("a", torch.ones(2))], [X, Y], {"x": X}, [[X, Y]], (X, Y), [None], "cpu", "meta", "nowhere", *tensors]
    makers = [functools.partial(lambda value: value, value) for value in [*plain, *paths.values()]]
    return [*makers, lambda: lfq.QuantizationAwareTraining(), lambda: EarlyStopping("loss"), Tiny, attached, measured]


def public() -> dict[str, Callable[..., Any]]:
    """All that a user calls: the package's names, its observers, and what the command line is made of."""
    named = {name: getattr(lfq, name) for name in lfq.__all__}
    named |= {name: getattr(observers, name) for name in observers.__all__ if name.endswith("Observer")}
    return named | {"compare": compare, "reestimate_batch_norm": reestimate_batch_norm}


def arguments(function: Callable[..., Any], right: Any, anything: Any, chance: random.Random) -> dict[str, Any]:
    given = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is not parameter.empty and chance.random() < 0.7:
            continue
        fits = name in right and chance.random() < 0.6
        given[name] = chance.choice(right[name] if fits else anything)()
    return given


def command(chance: random.Random, paths: dict[str, Any]) -> list[str]:
    words = [
        *map(str, paths.values()),
        "report",
        "plot",
        "compare",
        "--model",
        "a:b",
        "json:loads",
        "--data",
        "-o",
        "--mode",
    ]
    return [chance.choice(["report", "plot", "compare", "x"]), *chance.choices(words, k=chance.randrange(4))]


@functools.cache
def _raises(path: str) -> set[int]:
    """The lines of a file on which a `raise` stands."""
    nodes = ast.walk(ast.parse(Path(path).read_text()))
    spans = [(n.lineno, n.end_lineno or n.lineno) for n in nodes if isinstance(n, ast.Raise)]
    return {line for first, last in spans for line in range(first, last + 1)}


def is_ours(error: BaseException) -> bool:
    if any("Found" in note for note in getattr(error, "__notes__", ())):
        return True
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = PACKAGE in Path(frame.filename).parents and frame.lineno in _raises(frame.filename)
    said = str(error)
    return (
        ours
        and ("Found" in said or said.startswith("`"))
        and isinstance(error, (TypeError, ValueError, OSError, ImportError))
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def outcomes(seed: int, calls: int, directory: Path) -> dict[str, Any]:
    """How many calls succeeded and were refused, and the obscure errors."""
    chance = random.Random(seed)
    with _quiet():
        paths = files(directory)
        right, anything, functions = right_values(paths), any_values(paths), public()
    names = [*functions, "main"]
    counts: dict[str, Any] = {"succeeded": 0, "refused": 0, "obscure": []}
    for number in range(calls):
        name = names[number % len(names)]
        given: Any = None
        try:
            with _quiet():
                if name == "main":
                    given = command(chance, paths)
                    command_line(given)
                else:
                    given = arguments(functions[name], right, anything, chance)
                    repr(functions[name](**given))
            counts["succeeded"] += 1
        except SystemExit:  # argparse has said what is wrong
            counts["refused"] += 1
        except Exception as error:
            if is_ours(error):
                counts["refused"] += 1
            else:
                where = traceback.extract_tb(error.__traceback__)[-1]
                said = f"{type(error).__name__}: {error} at {where.filename}:{where.lineno}"
                counts["obscure"].append(f"{name}({_shown(given)}): {said}")
    return counts


def _shown(given: Any) -> str:
    with contextlib.suppress(Exception):
        return repr(given)[:300]
    return "..."


if __name__ == "__main__":
    faulthandler.enable()
    torch.set_num_threads(1)
    os.chdir(sys.argv[3])  # a relative path is written there
    print(json.dumps(outcomes(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
