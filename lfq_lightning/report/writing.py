"""Gathers what a report shows about a run or a checkpoint, and writes the page."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from lfq_lightning.analysis.evaluating import Forward, MetricLike
from lfq_lightning.analysis.sensitivity import Sensitivity, sensitivity
from lfq_lightning.checking import check_batches, check_flags, check_function, check_path, in_words
from lfq_lightning.checkpoint import load_from_checkpoint
from lfq_lightning.placement.quantized_layer import first_quantizer
from lfq_lightning.quantizer.saved import role_in_name
from lfq_lightning.reading import read_checkpoint
from lfq_lightning.records.summary import Summary, describe
from lfq_lightning.records.trajectory import TrajectoryRow, read_trajectory
from lfq_lightning.report.findings import WeightFindings, bytes_in_float, describe_weights
from lfq_lightning.report.sources import find_run, recorded_path
from lfq_lightning.report.stored import stored_model

if TYPE_CHECKING:
    from lfq_lightning.report.page import Section


@dataclass(frozen=True)
class _Findings:
    """All that a page shows; None or empty where it is not known."""

    source: str
    facts: list[tuple[str, str]]
    rows: list[TrajectoryRow]
    summary: Summary | None
    weights: list[WeightFindings]
    lost: Sensitivity | None
    metric: str


def write_report(
    source: Path | str,
    path: Path | str | None = None,
    *,
    model: nn.Module | type[L.LightningModule] | None = None,
    dataloader: Iterable[Any] | None = None,
    metric: MetricLike | None = None,
    higher_is_better: bool | None = None,
    forward: Forward | None = None,
) -> Path:
    """Write one HTML page about a run: quantizers, trajectories, sizes, noise, weights, and what each layer loses.

    A checkpoint says all but what takes a model that runs: how well inputs are represented, which takes a batch, and
    what each layer loses alone, which takes a metric.

    Args:
        source: a checkpoint, or the directory of a run with its trajectory and its checkpoints, of which the newest is
            taken.
        path: page to write; None means `report.html` in the run's directory.
        model: the quantized model, or its LightningModule's class, which is loaded from the checkpoint.
        dataloader: held-out batches; the first shows how well inputs are represented.
        metric: what each layer loses of; see `lfq_lightning.sensitivity`.
        higher_is_better: where the metric does not say it itself.
        forward: from model and batch to outputs and targets; by default a batch is a pair of inputs and targets.

    Returns:
        The path of the page, which opens in any browser without a network.

    Raises:
        FileNotFoundError, ValueError, TypeError: if there is nothing to report about, or an argument lacks another.
        ImportError: plotly is not installed.

    Example:
        >>> write_report("lightning_logs/version_0")  # doctest: +SKIP
        PosixPath('lightning_logs/version_0/report.html')
    """
    try:
        from lfq_lightning.report.page import render
    except ImportError as error:
        raise ImportError(
            f'A report draws with plotly. Found none ({error}): install it with `pip install "lfq_lightning[report]"`.'
        ) from error
    check_path("source", source)
    check_path("path", path, written=True, needed=False)
    if model is not None and not isinstance(model, nn.Module) and not _is_module_class(model):
        raise TypeError(
            f"`model` must be a model, or a LightningModule's class. Found {in_words(model)}: leave it out."
        )
    if dataloader is not None:
        check_batches("dataloader", dataloader)
    if metric is not None and not isinstance(metric, str):
        check_function("metric", metric, "outputs and targets")
    if higher_is_better is not None:
        check_flags(higher_is_better=higher_is_better)
    check_function("forward", forward, "the model and a batch")
    if (dataloader is not None and model is None) or (metric is not None and dataloader is None):
        raise ValueError(
            "A metric needs a `dataloader`, and a dataloader needs the `model` that it is for. Found "
            f"metric={metric!r}, a dataloader: {dataloader is not None}, a model: {model is not None}."
        )
    run = find_run(source)
    checkpoint = None if run.checkpoint is None else read_checkpoint(run.checkpoint)
    trajectory = run.trajectory or (checkpoint and recorded_path(checkpoint))
    quantized = _model(model, run.checkpoint, checkpoint)
    batch = _first_batch(quantized, dataloader)
    lost = None
    if quantized is not None and dataloader is not None and metric is not None:
        lost = sensitivity(quantized, dataloader, metric, higher_is_better=higher_is_better, forward=forward)
    found = _Findings(
        source=str(run.checkpoint or run.directory),
        facts=_facts(quantized, checkpoint),
        rows=read_trajectory(trajectory) if trajectory else [],
        summary=None if quantized is None else describe(quantized, batch, forward),
        weights=[] if quantized is None else describe_weights(quantized),
        lost=lost,
        metric=metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__),
    )
    page = render(f"Quantized model {run.directory.name}", found.source, found.facts, _sections(found))
    target = run.directory / "report.html" if path is None else Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def _is_module_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, L.LightningModule)


def _model(
    model: nn.Module | type[L.LightningModule] | None, path: Path | None, checkpoint: dict[str, Any] | None
) -> nn.Module | None:
    if isinstance(model, nn.Module):
        if first_quantizer(model) is None:
            raise ValueError(f"`model` must be quantized. Found {type(model).__name__} without quantizers.")
        return model
    if checkpoint is None or path is None:
        if model is not None:
            raise ValueError("A class needs a checkpoint to be loaded from. Found none in the run: pass a model.")
        return None
    if model is None:
        return stored_model(checkpoint["state_dict"])
    return load_from_checkpoint(model, path).eval()


def _first_batch(model: nn.Module | None, dataloader: Iterable[Any] | None) -> Any:
    if model is None or dataloader is None:
        return None
    first = next((p for p in model.parameters()), None)
    with torch.random.fork_rng(devices=[]):
        batch = next(iter(dataloader), None)
    return batch if first is None else move_data_to_device(batch, first.device)


def _facts(model: nn.Module | None, checkpoint: dict[str, Any] | None) -> list[tuple[str, str]]:
    facts = []
    if checkpoint is not None:
        facts += [("epochs", str(checkpoint.get("epoch", -1) + 1)), ("steps", f"{checkpoint.get('global_step', 0):,}")]
    quantizer = None if model is None else first_quantizer(model)
    if model is None or quantizer is None:
        return facts
    summary = describe(model)
    facts += [
        ("phase", quantizer.phase),
        ("quantizers", str(len(summary.rows))),
        ("weights in float32", f"{summary.float_weight_bytes:,} bytes"),
        ("quantized", f"{summary.weight_bytes:,} bytes"),
        ("smaller by", f"{summary.float_weight_bytes / max(summary.weight_bytes, 1):.2f} x"),
        ("stays in float", f"{bytes_in_float(model):,} bytes"),
    ]
    return facts


def _sections(found: _Findings) -> list[Section]:
    from lfq_lightning.report import figures
    from lfq_lightning.report.page import Section

    return [
        _quantizers(found),
        Section(
            "trajectories",
            "Trajectories",
            "Scales with a band over channels, their movement while learning, clamped elements and zero points; phases "
            "are shaded. Click a layer in the legend to hide it, double-click to see it alone."
            if found.rows
            else "No trajectory.csv was found beside the checkpoint.",
            figures.trajectories(found.rows) if found.rows else None,
        ),
        Section(
            "sizes",
            "Size by layer",
            "" if found.weights else "No weights are known without a checkpoint.",
            figures.sizes(found.weights) if found.weights else None,
        ),
        Section(
            "noise",
            "Signal to quantization noise",
            "Power of a tensor over power of what quantization changes in it. "
            + ("" if _measured_inputs(found) else "Inputs are measured on a batch, from a model and a dataloader."),
            figures.noise(found.summary) if found.summary else None,
        ),
        Section(
            "sensitivity",
            "Sensitivity",
            "What the metric loses with that layer alone quantized and all others in float."
            if found.lost
            else "Not measured: that takes a model, a dataloader and a metric.",
            figures.drops(found.lost, found.metric) if found.lost else None,
        ),
        Section(
            "weights",
            "Weights before and after quantization",
            "How the chosen layer's weights are distributed, and how many have each integer code.",
            figures.histograms(found.weights) if found.weights else None,
        ),
    ]


def _measured_inputs(found: _Findings) -> bool:
    return found.summary is not None and any(
        role_in_name(row.quantizer) != "weight" and math.isfinite(row.sqnr) for row in found.summary.rows
    )


def _quantizers(found: _Findings) -> Section:
    from lfq_lightning.report.page import Section

    if found.summary is None:
        return Section("quantizers", "Quantizers", "No checkpoint was found, so only the trajectories are known.")
    table = found.summary.table()
    return Section("quantizers", "Quantizers", "Scales and zero points are means over channels.", table=table)
