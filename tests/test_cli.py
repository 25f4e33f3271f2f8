"""LightningCLI: the callback from YAML by class name, settings printed and read again, mistakes named by their key."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cli as example
import pytest
import yaml
from digits import Digits, DigitsClassifier
from lightning.pytorch.cli import LightningCLI
from torch import nn

import lfq_lightning as lfq

EXAMPLE = Path(__file__).parents[1] / "examples/cli.yaml"


@pytest.fixture(autouse=True)
def _as_started_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # they are about Lightning
    monkeypatch.setattr(sys, "argv", ["cli.py"])  # LightningCLI warns of any beside `args`


def cli(*arguments: str) -> Any:
    options: dict[str, Any] = {"run": False, "save_config_callback": None, "seed_everything_default": 0}
    return LightningCLI(DigitsClassifier, Digits, args=list(arguments), **options)


def callback(*arguments: str) -> lfq.QuantizationAwareTraining:
    made = cli("--trainer.logger=false", "--trainer.accelerator=cpu", *arguments)
    [found] = [c for c in made.trainer.callbacks if isinstance(c, lfq.QuantizationAwareTraining)]
    return found


def written(path: Path, settings: dict[str, Any]) -> str:
    found = {"trainer": {"callbacks": [{"class_path": "QuantizationAwareTraining", "init_args": settings}]}}
    path.write_text(yaml.safe_dump(found))
    return f"--config={path}"


def test_the_callback_is_made_from_yaml_with_nested_specifications_rules_and_schedule() -> None:
    qat = callback(f"--config={EXAMPLE}")
    assert qat.weight == 3
    assert qat.activation == lfq.QuantSpec(bits=4, symmetric=False, observer="moving_average")
    assert qat.rules == (
        lfq.Rule("network.classifier", weight=8, activation=8),
        lfq.Rule("*.shortcut.conv", weight=lfq.QuantSpec(bits=4, granularity="per_channel")),
    )
    assert qat.schedule == lfq.PhaseSchedule(observe=0, estimate=1, learn=2, freeze=18)
    [group] = qat.optimizer([nn.Parameter()]).param_groups
    assert group["lr"] == 1e-3


def test_printed_settings_make_the_same_callback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli(f"--config={EXAMPLE}", "--print_config")
    printed = capsys.readouterr().out
    assert "on_collapse: warn" in printed  # defaults as well
    assert "Unable to serialize" not in printed
    (tmp_path / "printed.yaml").write_text(printed)
    assert repr(callback(f"--config={tmp_path / 'printed.yaml'}")) == repr(callback(f"--config={EXAMPLE}"))


def test_settings_are_taken_from_the_command_line() -> None:
    name = "--trainer.callbacks"
    qat = callback(f"{name}+=QuantizationAwareTraining", f"{name}.weight=2", f"{name}.activation.bits=4")
    assert (qat.weight, qat.activation) == (2, lfq.QuantSpec(bits=4))


def test_the_users_optimizers_can_be_chosen_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(tmp_path / "user.yaml", {"optimizer": "user"})
    assert callback(config).optimizer == "user"
    with pytest.raises(SystemExit, match="0"):
        cli(config, "--print_config")
    assert "optimizer: user" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"wieght": 4}, ["QuantizationAwareTraining", "wieght"]),
        ({"weight": "four"}, ['"weight"', "Expected a <class 'int'>", "four"]),
        ({"weight": {"bits": "four"}}, ['"weight"', '"bits"', "Got value: four"]),
        ({"weight": {"observer": "max"}}, ['"weight"', '"observer"', "moving_average", "Got value: max"]),
        ({"rules": [{"match": "a", "wieght": 4}]}, ['"rules"', "Rule", "wieght"]),
        ({"rules": [{"weight": 4}]}, ['"rules"', "Rule", "match"]),
        ({"schedule": {"learn": 2.5}}, ['"schedule"', '"learn"', "Got value: 2.5"]),
        ({"on_collapse": "explode"}, ['"on_collapse"', "reinit", "Got value: explode"]),
    ],
    ids=str,
)
def test_a_bad_value_is_rejected_with_the_path_of_its_key(
    settings: dict[str, Any], keys: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        callback(written(tmp_path / "bad.yaml", settings))
    error = capsys.readouterr().err
    assert '"trainer.callbacks"' in error
    for key in keys:
        assert key in error


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weight": 1}, "`weight`: `bits` must be between 2 and 16. Found 1"),
        ({"weight": {"bits": 1}}, "`bits` must be between 2 and 16. Found 1"),
        ({"rules": [{"match": "a", "activation": 1}]}, "`activation`: `bits` must be between 2 and 16. Found 1"),
        ({"schedule": {"observe": 3}}, "Phases start in the order"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_in_our_words(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        callback(written(tmp_path / "bad.yaml", settings))


def test_the_example_says_in_one_line_what_is_wrong_with_a_value(tmp_path: Path) -> None:
    config = written(tmp_path / "bad.yaml", {"weight": 1})
    with pytest.raises(SystemExit) as stopped:
        example.CLI(DigitsClassifier, Digits, args=[config], run=False, save_config_callback=None)
    assert stopped.value.code == "error: `weight`: `bits` must be between 2 and 16. Found 1: 2 are the fewest."
