"""`python -m lfq_lightning report CHECKPOINT_OR_RUN_DIR`: one HTML page about a quantized model."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import lightning as L

from lfq_lightning.reading import read_checkpoint
from lfq_lightning.report import write_report
from lfq_lightning.report.sources import find_run

_EXAMPLE = (
    "for instance: python -m lfq_lightning report lightning_logs/version_0 --model networks:Classifier "
    "--data digits:Digits --metric val/loss --mode min"
)


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "report", help="write one HTML page about a run or a checkpoint", description=__doc__, epilog=_EXAMPLE
    )
    parser.add_argument("source", type=Path, help="a checkpoint, or the directory of a run")
    parser.add_argument("-o", "--output", type=Path, help="page to write (report.html in the run's directory)")
    parser.add_argument("--model", metavar="MODULE:CLASS", help="the LightningModule, to measure with --data")
    parser.add_argument("--data", metavar="MODULE:CLASS", help="a LightningDataModule, for its validation batches")
    parser.add_argument("--metric", help="what `validation_step` logs, or MODULE:NAME of a metric or function")
    parser.add_argument("--mode", choices=["min", "max"], help="whether the metric is better low or high")
    parser.set_defaults(run=_report)


def _report(given: argparse.Namespace) -> None:
    model = None if given.model is None else _named(given.model, "--model")
    batches = None if given.data is None else _validation_batches(_named(given.data, "--data"), given.source)
    metric = given.metric
    if metric is not None and ":" in metric:
        metric = _named(metric, "--metric")
        metric = metric() if isinstance(metric, type) else metric
    better = None if given.mode is None else given.mode == "max"
    print(
        write_report(
            given.source, given.output, model=model, dataloader=batches, metric=metric, higher_is_better=better
        )
    )


def _named(reference: str, option: str) -> Any:
    module, _, name = reference.partition(":")
    if not module or not name:
        raise ValueError(f"`{option}` must be MODULE:NAME. Found {reference!r}: for instance networks:Classifier.")
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"`{option}` must name something that Python can import from here. Found {reference!r} ({error}): run in "
            "the directory of the module, or put that on PYTHONPATH."
        ) from error


def _validation_batches(data: Any, source: Path) -> Any:
    if not (isinstance(data, type) and issubclass(data, L.LightningDataModule)):
        raise ValueError(f"`--data` must name a LightningDataModule. Found {data!r}.")
    checkpoint = find_run(source).checkpoint
    if checkpoint is not None:
        read_checkpoint(checkpoint)  # refuses a damaged one with the reason
    try:
        made = data() if checkpoint is None else data.load_from_checkpoint(checkpoint)
    except TypeError as error:
        raise ValueError(
            f"`--data` is made from the checkpoint's hyper-parameters, or without arguments. {data.__name__} says: "
            f"{error}. Call `save_hyperparameters()` in it, or `lfq_lightning.write_report` from Python."
        ) from error
    made.prepare_data()
    made.setup("validate")
    return made.val_dataloader()
