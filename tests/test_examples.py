"""The examples and every configuration, run as a user runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf

import lfq_lightning as lfq
from lfq_lightning.records.trajectory import read_trajectory

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
NEEDS_TORCHVISION = {"cifar10", "imagenet", "imagenet_resnet18", "imagenet_mobilenet_v2"}


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def test_the_main_job_trains_to_four_bits_and_writes_what_it_says(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/train.py"), f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    accuracy = {stage: next(v for k, v in m.items() if "accuracy" in k) for stage, m in metrics.items()}
    assert accuracy["quantized"] >= 0.97
    assert accuracy["quantized"] >= accuracy["float"] - 0.01
    assert metrics["quantized"]["weight_bytes"] < 0.16 * metrics["float"]["weight_bytes"]
    rows = read_trajectory(tmp_path / "quantized/trajectory.csv")
    assert [p for p in dict.fromkeys(r.phase for r in rows)] == ["observe", "estimate", "learn"]
    assert (tmp_path / "trajectories.png").stat().st_size > 10_000
    for word in (
        "SQNR",
        "weight_quantizer",
        "trajectory.csv",
        "trajectories.png",
        "last_epoch.ckpt",
        "metrics.json",
        "same largest output",
    ):
        assert word in done.stdout
    assert (tmp_path / "quantized.onnx").stat().st_size < 30_000
    saved = torch.load(tmp_path / "quantized/last_epoch.ckpt", weights_only=True)
    assert any("QuantizationAwareTraining" in key for key in saved["callbacks"])


def test_the_export_example_ends_with_files_that_agree(tmp_path: Path) -> None:
    code = "import export; export.main(max_epochs=5)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "examples")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "same largest output" in done.stdout
    written = {path.name for path in tmp_path.rglob("*") if path.suffix in (".onnx", ".pt2")}
    assert written == {"digits.onnx", "by_hand.onnx", "digits.pt2"}


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_composes(experiment: str) -> None:
    config = composed(f"experiment={experiment}")
    assert isinstance(instantiate(config.quant), lfq.QuantizationAwareTraining)
    assert config.quantized.trainer.max_epochs > 0
    for technique in config.get("technique", {}).values():
        assert isinstance(instantiate(technique), L.Callback)
    targets = re.findall(r"_target_: (\S+)", OmegaConf.to_yaml(config))
    for target in targets:
        assert target.startswith("torchvision.") or get_object(target), target


@pytest.mark.parametrize("technique", choices("technique"))
def test_every_technique_makes_a_callback(technique: str) -> None:
    [made] = composed(f"technique=[{technique}]").technique.values()
    assert isinstance(instantiate(made), L.Callback)


@pytest.mark.parametrize(
    ("experiment", "bits", "rate", "decay", "epochs"),
    [
        ("w4a4", 4, 0.01, 1e-4, 90),
        ("w3a3", 3, 0.01, 5e-5, 90),
        ("w2a2", 2, 0.01, 2.5e-5, 90),
        ("w8a8", 8, 1e-3, 1e-4, 1),
    ],
)
@pytest.mark.parametrize("data", ["cifar10", "imagenet"])
def test_the_recipes_of_lsq_differ_as_the_paper_says(
    data: str, experiment: str, bits: int, rate: float, decay: float, epochs: int
) -> None:
    config = composed(f"experiment={data}_resnet18_{experiment}")
    assert (config.quant.weight, config.quant.activation) == (bits, bits)
    assert dict(config.quantized.model) == {"learning_rate": rate, "weight_decay": decay}
    assert config.quantized.trainer.max_epochs == epochs


@pytest.mark.parametrize("quant", choices("quant"))
def test_every_quantizer_configuration_makes_a_callback(quant: str) -> None:
    callback = instantiate(composed(f"quant={quant}").quant)
    assert callback is None if quant == "float" else isinstance(callback, lfq.QuantizationAwareTraining)


@pytest.mark.parametrize("model", [m for m in choices("model") if m not in NEEDS_TORCHVISION])
def test_every_model_is_made_and_takes_quantizers(model: str) -> None:
    config = composed(f"model={model}")
    made = instantiate(config.model, **config.quantized.model)
    assert lfq.attach(made, weight=4, activation=4).layers


@pytest.mark.parametrize("logger", choices("logger"))
def test_every_logger_is_made(logger: str, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    config = composed(f"logger={logger}")
    config.logger.save_dir = str(tmp_path)
    assert isinstance(instantiate(config.logger, name="x"), Logger)


def test_the_cpu_trainer_is_made() -> None:
    assert instantiate(composed("trainer=cpu").trainer, max_epochs=1, logger=False).max_epochs == 1


def test_a_misspelt_group_names_the_choices() -> None:
    with pytest.raises(Exception, match="w4a4"):
        composed("quant=w4a5")
