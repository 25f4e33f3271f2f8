"""Records quantizers during a run: to trajectory.csv and qparams.npz, to every logger, and as a summary to log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, Protocol, cast

import lightning as L
import torch
from torch import Tensor

from lfq_lightning.phases import phase_of
from lfq_lightning.placement.points import Points
from lfq_lightning.records.files import RunFiles
from lfq_lightning.records.loggers import log_histograms, log_picture
from lfq_lightning.records.measuring import measure_weights, probed, snapshot
from lfq_lightning.records.place import directory_for
from lfq_lightning.records.trajectory import TrajectoryRow
from lfq_lightning.schedule import PHASES, Phase
from lfq_lightning.telling import tell


class HasRates(Protocol):
    """What steps qparams."""

    @property
    def learning_rates(self) -> list[float]:
        """One for each optimizer or group."""


class Recorder:
    """Measures one batch in `every`, counted in optimizer steps, and keeps whole scales and zero points at each epoch.

    It goes on with the interval and the rows of the run that is resumed.

    Args:
        trainer: whose loggers and directory are used; every rank makes one.
        points: of the model.
        every: optimizer steps between two records; None takes the Trainer's interval for logging, less in a short run.
        write_files: whether there are files beside what loggers get.
        steps: the length of the run in optimizer steps, or infinity; a short run is recorded 50 times.
        restored: what `state_dict` gave, or nothing.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        points: Points,
        every: int | None,
        write_files: bool,
        steps: float,
        restored: Mapping[str, Any],
    ) -> None:
        usual = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        self.interval = every or restored.get("every") or int(max(1, min(usual, steps // 50)))
        self._points, self._barebones = points, trainer.barebones
        self._files: RunFiles | None = None  # on rank zero, where the run has a directory
        self._probes = ExitStack()
        self._measured: dict[str, Tensor] = {}
        self._step_before = 0
        self._logged_epoch: int | None = None
        directory = directory_for(trainer) if write_files else None  # every rank takes part
        if directory is not None and trainer.is_global_zero:
            self._files = RunFiles(directory, restored.get("path"), trainer.global_step)
        elif write_files and directory is None and not self._barebones:
            tell(
                trainer,
                "This run leaves no trajectory.csv and qparams.npz: it has no directory of its own. Give the Trainer a "
                "logger that writes to one, or a `default_root_dir`.",
            )

    def state_dict(self) -> dict[str, Any]:
        """The interval, and where the rows are on the rank that writes them."""
        return {"every": self.interval, "path": None if self._files is None else self._files.name}

    def _log_epoch(self, trainer: L.Trainer, model: L.LightningModule, optimizer: HasRates | None) -> None:
        """Log the phase and the qparams' learning rate, in an epoch's first batch: a resumed epoch has no start."""
        if self._barebones or self._logged_epoch == trainer.current_epoch:
            return
        self._logged_epoch = trainer.current_epoch
        values: dict[str, float] = {"lfq/phase": PHASES.index(cast(Phase, self._phase))}
        if optimizer is not None and (rates := optimizer.learning_rates):
            values["lfq/lr"] = rates[0]
        for name, value in values.items():
            log(model, name, value, on_step=False, on_epoch=True, sync_dist=True)

    def before_batch(self, trainer: L.Trainer, model: L.LightningModule, optimizer: HasRates | None) -> None:
        """Log an epoch's phase and the learning rate of what steps the qparams; measure if a record may be due."""
        self._log_epoch(trainer, model, optimizer)
        self._step_before = trainer.global_step
        if self._is_due(trainer.global_step + max(1, len(trainer.optimizers))):
            self._measured = self._probes.enter_context(probed(self._points))

    def after_batch(self, trainer: L.Trainer, model: L.LightningModule) -> tuple[list[TrajectoryRow], dict[str, float]]:
        """Record if it is due; on every rank the rows, and by quantizer the share of values in too few codes."""
        self._probes.close()
        measured, self._measured = self._measured, {}
        if not self._is_due(trainer.global_step):
            return [], {}
        state = snapshot(self._points, measured | measure_weights(self._points))
        rows = state.rows(trainer.global_step, trainer.current_epoch)
        for name, flag in zip(state.names, state.not_finite, strict=True):
            if flag > 0:
                self._points[name].quantizer.warn_non_finite(name)
        if self._files is not None:
            self._files.append(rows)
        for logger in trainer.loggers:
            logger.log_metrics(metrics_of(rows, self._points), step=trainer.global_step)
        for name, value in summary_of(rows, self._points).items():
            log(model, name, value, on_step=True, on_epoch=False)
        return rows, dict(zip(state.names, state.in_few_codes, strict=True))

    def after_epoch(self, trainer: L.Trainer) -> None:
        """Keep every scale and zero point, and give their distributions to the loggers that draw them."""
        if self._barebones or not trainer.is_global_zero:
            return
        vectors = snapshot(self._points, {}).vectors()
        if self._files is not None:
            self._files.keep(trainer.global_step, trainer.current_epoch, self._phase, vectors)
        log_histograms(trainer.loggers, vectors, trainer.global_step)

    def after_fit(self, trainer: L.Trainer) -> None:
        """Give the picture of the trajectories to the loggers that take pictures."""
        if self._files is not None and self._files.written:
            log_picture(trainer.loggers, self._files.path, trainer.global_step)

    def close(self) -> None:
        """Stop measuring and writing."""
        self._probes.close()
        if self._files is not None:
            self._files.close()

    @property
    def _phase(self) -> str:
        return phase_of(point.quantizer for point in self._points.values())

    def _is_due(self, step: int) -> bool:
        return not self._barebones and step // self.interval > self._step_before // self.interval


def summary_of(rows: Iterable[TrajectoryRow], points: Points) -> dict[str, float]:
    """Mean scale and saturation over the points of each role that `attach` gave; what was not measured is left out."""
    measured: dict[str, list[float]] = {}
    for row in rows:
        point = points[row.quantizer]
        for kind, value in (("scale", row.scale_mean), ("saturation", row.saturation)):
            if point.owner is not None and value == value:
                measured.setdefault(f"lfq/{point.role}_{kind}", []).append(value)
    return {name: sum(values) / len(values) for name, values in measured.items()}


def metrics_of(rows: Iterable[TrajectoryRow], points: Points) -> dict[str, float]:
    """The rows as logger metrics; what was not measured is left out, and so are zero points that are always 0."""
    metrics: dict[str, float] = {}
    for row in rows:
        values = {"scale": row.scale_mean, "saturation": row.saturation}
        if not points[row.quantizer].quantizer.symmetric:
            values["zero_point"] = row.zero_point_mean
        metrics |= {f"lfq/{kind}/{row.quantizer}": value for kind, value in values.items() if value == value}
    return metrics


def log(
    model: L.LightningModule, name: str, value: float | Tensor, on_step: bool, on_epoch: bool, sync_dist: bool = False
) -> None:
    """`model.log`, for which a float would be copied to a GPU and waited for; filling a tensor there is not."""
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=torch.float32, device=model.device)
    model.log(name, value, on_step=on_step, on_epoch=on_epoch, sync_dist=sync_dist, batch_size=1)
