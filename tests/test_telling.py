"""What a run says beside a progress bar: each line whole, on a line of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

import lfq_lightning as lfq
from tests.runs import fit

pytestmark = pytest.mark.quick

_PHASES = [
    f"step {step}: quantizers go from {way}." for step, way in ((8, "observe to estimate"), (16, "estimate to learn"))
]


@pytest.mark.parametrize(
    "bar",
    [TQDMProgressBar(), RichProgressBar(console_kwargs={"force_terminal": True, "width": 80, "legacy_windows": False})],
    ids=lambda bar: type(bar).__name__,
)
def test_phase_switches_stand_on_lines_of_their_own_above_a_bar(
    bar: ProgressBar, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = lfq.PhaseSchedule(0, 8, 16, unit="step")
    quantization = lfq.QuantizationAwareTraining(schedule=schedule)
    fit(tmp_path, callback=quantization, callbacks=[bar], enable_progress_bar=True)
    printed = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    lines = re.split(r"[\r\n]", printed)
    for number, said in enumerate(_PHASES, start=1):
        assert f"Epoch {number}, {said}" in [line.strip() for line in lines]
