"""Tables in a terminal: no line is wider than it, no name is wrapped, and shortened names stay apart."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lfq_lightning as lfq
from lfq_lightning.analysis import SensitivityRow
from lfq_lightning.export.parity import OutputParity, Parity, QuantizerParity
from lfq_lightning.records.comparison import Comparison, Method
from lfq_lightning.tables import aligned, shortened

pytestmark = pytest.mark.quick

NAMES = [f"model.encoder.layers.{i}.attention.{part}.projection" for i in range(12) for part in ("query", "key")]


class Deep(nn.Module):
    """Linear layers with long names, and one that is left in float."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            owner: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            owner.add_module(last, nn.Linear(4, 4))
        self.attention_with_a_long_name = nn.MultiheadAttention(4, 2)


def in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)


def printed(capsys: pytest.CaptureFixture[str], table: Any) -> list[str]:
    capsys.readouterr()
    print(table)
    return capsys.readouterr().out.splitlines()


def tables() -> dict[str, Callable[[], Any]]:
    model = Deep()
    placement = lfq.attach(model, weight=4, activation=4)
    rows = tuple(SensitivityRow((name,), 4, 12345, 0.123456, 0.0123, None) for name in NAMES)
    ways = [Method(f"model.width={n} optimizer=adamw schedule=cosine weight=4", 1e6, (0.9, 0.8)) for n in range(3)]
    output = OutputParity(0.001, 0.5, 1e-6, 1.0)
    codes = tuple(QuantizerParity(f"{name}.input_quantizer", 1000, 1.0, 0) for name in NAMES)
    return {
        "placement": lambda: placement,
        "summary": lambda: lfq.records.summary.describe(model),
        "sensitivity": lambda: lfq.Sensitivity(0.9, True, rows),
        "comparison": lambda: Comparison("test/accuracy", tuple(ways), (Path("a/run"),)),
        "parity": lambda: Parity(codes, 8, output, output, 10**6, 10**7),
    }


@pytest.mark.parametrize("kind", ["placement", "summary", "sensitivity", "comparison", "parity"])
def test_in_80_columns_every_row_is_one_line_and_no_line_is_longer(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_terminal(monkeypatch)
    lines = printed(capsys, tables()[kind]())
    assert max(map(len, lines)) <= 80
    cut = [line.split("  ")[0] for line in lines if "…" in line]
    assert len(set(cut)) == len(cut) >= 3  # names stay apart


def test_in_80_columns_rich_wraps_no_cell_of_a_summary(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    in_a_terminal(monkeypatch)
    model = Deep()
    lfq.attach(model)
    lfq.summarize(model)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line for line in lines if re.search(r"\.(weight|input) ", line)]
    assert len({row.split()[0] for row in rows}) == len(lfq.quantizers(model))


def test_where_no_terminal_is_nothing_is_shortened() -> None:
    model = Deep()
    placement = str(lfq.attach(model))
    assert all(name in placement for name in NAMES)
    assert "left in float, as attention reads" in placement


def test_names_are_cut_in_the_middle_and_where_they_differ() -> None:
    assert shortened(["short", "encoder.attention.output"], 12) == ["short", "encod…output"]
    assert len(set(shortened(NAMES, 30))) == len(NAMES)
    assert all(len(name) <= 30 for name in shortened(NAMES, 30))


def test_numbers_and_titles_are_never_cut() -> None:
    text = aligned(("layer", "zero point"), [("a" * 60, "123456789.5")], (False, True), width=40)
    assert "123456789.5" in text
    assert [line.strip() for line in text.splitlines()[:2]] == ["zero", "layer                              point"]


def test_the_bytes_of_all_parameters_stand_beside_those_of_quantized_layers() -> None:
    model = nn.Sequential(nn.Linear(10, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    lfq.attach(model, weight=4, activation=None, rules=[lfq.Rule("*", weight=4)])
    lfq.set_phase(model, "estimate")
    summary = lfq.summarize(model)
    others = 4 * (6 + 2 * 6 + 3)
    assert (
        summary.float_parameter_bytes
        == summary.float_weight_bytes + others
        == 4 * sum(p.numel() for n, p in model.named_parameters() if "quantizer" not in n)
    )
    assert summary.parameter_bytes == summary.weight_bytes + others
    assert f"all parameters: {summary.float_parameter_bytes:,} -> {summary.parameter_bytes:,} bytes" in str(summary)
    assert torch.isfinite(model(torch.randn(2, 10))).all()


def test_a_process_without_a_console_prints_nothing_and_goes_on() -> None:
    model = nn.Linear(2, 2)
    lfq.attach(model)
    with contextlib.redirect_stdout(None):
        assert lfq.summarize(model).rows
