"""What loggers take beside numbers: histograms of scales at each epoch, and a picture when a fit ends."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from lfq_lightning.records import history
from lfq_lightning.records.plot import plot_trajectories

PICTURE = "lfq/trajectories"
_TAKE_PICTURES = (TensorBoardLogger, WandbLogger, MLFlowLogger)


def log_histograms(loggers: Iterable[Logger], vectors: Mapping[str, npt.NDArray[np.float32]], step: int) -> None:
    """Give the distribution over channels to the loggers that draw one: TensorBoard and Weights & Biases.

    Args:
        loggers: those of the Trainer; MLflow has no histograms, and gets the vectors themselves with the picture.
        vectors: scales and zero points by key in the state dict; those of one channel are numbers, and are left out.
        step: optimizer steps taken.
    """
    chosen = {f"lfq/channels/{key}": v for key, v in vectors.items() if v.size > 1 and (v != 0).any()}
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            for name, values in chosen.items():
                logger.experiment.add_histogram(name, values, step)
        elif isinstance(logger, WandbLogger) and chosen:
            from wandb import Histogram

            drawn = {name: Histogram(values.tolist()) for name, values in chosen.items()}
            logger.experiment.log({**drawn, "trainer/global_step": step})


def log_picture(loggers: Iterable[Logger], trajectory: Path, step: int) -> None:
    """Give the picture of the trajectories to TensorBoard, Weights & Biases and MLflow, and MLflow the vectors too.

    Args:
        loggers: those of the Trainer.
        trajectory: the run's trajectory.csv.
        step: optimizer steps taken.
    """
    loggers = [logger for logger in loggers if isinstance(logger, _TAKE_PICTURES)]
    if not loggers or not trajectory.is_file():
        return
    with tempfile.TemporaryDirectory() as directory:
        try:
            picture = plot_trajectories(trajectory, Path(directory, "trajectories.png"))
        except (ImportError, ValueError) as error:  # no matplotlib, or nothing was quantized yet
            rank_zero_info(f"The loggers get no picture of the trajectories. {error}")
            return
        for logger in loggers:
            _log_picture(logger, picture, trajectory.with_name(history.FILE_NAME), step)


def _log_picture(logger: Logger, picture: Path, vectors: Path, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        from matplotlib.image import imread

        logger.experiment.add_image(PICTURE, imread(picture)[..., :3], step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(PICTURE, [str(picture)])
    elif isinstance(logger, MLFlowLogger):
        for path in (picture, vectors):
            if path.is_file():
                logger.experiment.log_artifact(logger.run_id, str(path), "lfq")
