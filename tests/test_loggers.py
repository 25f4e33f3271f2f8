"""Real loggers get the numbers, and those that can draw get distributions and the picture."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from tests.runs import BATCHES, Net, fit

STEPS = [BATCHES, 2 * BATCHES, 3 * BATCHES]
SCALE = "second.weight_quantizer.scale"


def events(directory: str) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(directory, size_guidance={"histograms": 0, "images": 0, "scalars": 0})
    found.Reload()
    return found


def test_tensorboard_shows_numbers_the_distribution_over_channels_and_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    model, _, _ = fit(tmp_path, logger=TensorBoardLogger(tmp_path, name="run"))
    found = events(str(tmp_path / "run/version_0"))
    assert {f"lfq/scale/{n}" for n in ("head.input_quantizer", "second.weight_quantizer")} <= set(
        found.Tags()["scalars"]
    )
    assert [e.step for e in found.Histograms(f"lfq/channels/{SCALE}")] == STEPS
    last = found.Histograms(f"lfq/channels/{SCALE}")[-1].histogram_value
    scale = model.second.weight_quantizer.scale.detach()
    assert (last.num, last.min, last.max) == pytest.approx((4, float(scale.min()), float(scale.max())))
    # One scale in all is a number already; the zero points of a symmetric quantizer are 0.
    assert not any("input" in tag or "zero_point" in tag for tag in found.Tags()["histograms"])
    (picture,) = found.Images("lfq/trajectories")
    assert picture.step == STEPS[-1]
    assert picture.width > picture.height / 2 > 200


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_tensorboard_draws_the_graph_of_the_users_layers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")

    class Example(Net):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = torch.randn(2, 1, 8, 8)

    model, made, _ = fit(tmp_path, Example(), logger=TensorBoardLogger(tmp_path, name="run", log_graph=True))
    graph = events(str(tmp_path / "run/version_0")).Graph()
    assert any("second" in node.name for node in graph.node)
    assert not any("quantizer" in node.name for node in graph.node)
    assert model.second.input_quantizer.learned
    assert "log_graph" not in made.logger.__dict__


def test_a_logger_without_pictures_gets_numbers_and_nothing_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    _, made, _ = fit(tmp_path, logger=CSVLogger(tmp_path))
    assert "lfq/scale/second.weight_quantizer" in Path(made.log_dir, "metrics.csv").read_text()


def test_without_matplotlib_the_run_goes_on_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, logger=TensorBoardLogger(tmp_path, name="run"))
    assert "draws with matplotlib" in caplog.text
    assert "images" not in events(str(tmp_path / "run/version_0")).Tags()["images"]


def test_wandb_keeps_numbers_distributions_and_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the client's own
        logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
        fit(tmp_path / "run", logger=logger)
        summary = dict(logger.experiment.summary)
        logger.experiment.finish()
    assert "lfq/scale/second.weight_quantizer" in summary
    assert len(list(tmp_path.rglob("media/images/**/*.png"))) == 1
    assert summary[f"lfq/channels/{SCALE}"]["_type"] == "histogram"


def test_mlflow_keeps_numbers_the_picture_and_the_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # from MLflow 3.17 on, a folder is asked for by name
    from lightning.pytorch.loggers import MLFlowLogger

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the client's own
        logger = MLFlowLogger("test", tracking_uri=f"file:{tmp_path}/mlruns")
        fit(tmp_path / "run", logger=logger)
        kept = {file.path for file in logger.experiment.list_artifacts(logger.run_id, "lfq")}
        history = logger.experiment.get_metric_history(logger.run_id, "lfq/scale/second.weight_quantizer")
    assert kept == {"lfq/trajectories.png", "lfq/qparams.npz"}
    assert [entry.step for entry in history] == list(range(3, STEPS[-1] + 1, 3))
