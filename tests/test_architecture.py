"""The house: imports point one way, nothing lies about at the top."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lfq_lightning"

# A file imports only from rows above its own.
FLOORS = [
    [
        "checking",
        "schedule",
        "telling",
        "records.trajectory",
        "records.history",
        "records.tables",
        "records.codes",
        "training.wrapping",
        "ops.layout",
        "ops.batching",
    ],
    ["running", "reading", "records.curves"],
    ["records.plot", "records.comparison", "ops.reference", "ops.native", "ops.triton_kernels"],
    ["records.plot_comparison", "ops.triton_tiles", "ops.power_of_two"],
    ["ops.triton"],
    ["ops.backends"],
    ["ops.autograd"],
    ["ops.function"],
    ["ops"],
    ["observers.outliers", "observers.passing", "observers.rows"],
    ["spec", "observers.base", "quantizer.saved", "quantizer.switches"],
    ["rules"],
    ["observers.by_batch", "observers.histogram", "observers.checking"],
    ["observers.mse", "observers.moments", "observers.ranges"],
    ["observers.together"],
    ["observers"],
    ["quantizer.observing", "quantizer.description", "quantizer.lsq_factor", "quantizer.start"],
    ["quantizer.learnable"],
    ["quantizer"],
    ["placement.computing", "placement.saving"],
    ["placement.host"],
    ["placement.points"],
    ["gathering"],
    ["placement.layers"],
    ["placement.planning"],
    ["placement.attaching"],
    ["placement"],
    ["phases", "records.recording", "records.summary", "records.loggers", "records.place"],
    ["records.files"],
    ["records.recorder"],
    ["records", "calibration"],
    ["analysis.evaluating"],
    ["analysis.sensitivity"],
    ["analysis.bits"],
    ["analysis"],
    ["export.exportable", "export.inputs", "export.parity"],
    ["export.freeze", "export.integers", "export.tallies"],
    ["export.comparing", "export.fold", "export.packing"],
    ["export.to_onnx", "export.to_pt2"],
    ["export"],
    ["training.sentinel", "training.hiding"],
    ["training.trainer.length", "training.trainer.resuming", "training.trainer.strategy"],
    ["training.trainer.neighbours"],
    ["state_dicts"],
    ["checkpoint"],
    ["training.trainer.module", "training.exporting"],
    ["training.trainer"],
    ["training.stepping.hooks", "training.stepping.slots"],
    ["training.stepping.qparams", "training.stepping.weights"],
    ["training.stepping.users"],
    ["training.stepping"],
    ["training.phases"],
    ["training"],
    ["callback"],
    [
        "techniques.batch_norm",
        "techniques.order",
        "techniques.oscillation",
        "techniques.served",
        "techniques.teacher",
        "techniques.while_learning",
    ],
    [
        "techniques.batch_norm_statistics",
        "techniques.bit_annealing",
        "techniques.distillation",
        "techniques.oscillation_control",
    ],
    ["techniques"],
    ["report.stored", "report.findings", "report.sources", "report.page"],
    ["report.figures"],
    ["report.writing"],
    ["report"],
    ["commands.compare", "commands.plot", "commands.report"],
    ["commands"],
    ["__init__"],
    ["__main__"],
]
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lfq_lightning"):
            module = node.module.removeprefix("lfq_lightning").lstrip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}" if module else alias.name
                is_file = (PACKAGE / (inner.replace(".", "/") + ".py")).exists()
                found.add(inner if is_file else module or "__init__")
    return found


def test_imports_point_downwards() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    upwards = [
        f"{name_of(path)} imports {imported}"
        for path in FILES
        for imported in imports(path)
        if floor[imported] >= floor[name_of(path)]
    ]
    assert upwards == []


def test_the_schedule_and_the_trajectory_need_no_torch() -> None:
    code = "import sys, runpy; [runpy.run_path(p) for p in sys.argv[1:]]; assert 'torch' not in sys.modules"
    files = [str(PACKAGE / "schedule.py"), str(PACKAGE / "records" / "trajectory.py")]
    subprocess.run([sys.executable, "-c", code, *files], check=True, timeout=60)


def test_files_begin_with_one_sentence() -> None:
    docstrings = {name_of(path): ast.get_docstring(ast.parse(path.read_text())) or "" for path in FILES}
    assert [name for name, text in docstrings.items() if not text.split("\n")[0].endswith(".")] == []


def test_the_top_level_holds_what_it_should() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    top = {line.split("/")[0] for line in tracked.splitlines() if not line.startswith(".")}
    allowed = {"pyproject.toml", "LICENSE", "README.md", "lfq_lightning", "conf", "tests", "examples"}
    assert top <= allowed
