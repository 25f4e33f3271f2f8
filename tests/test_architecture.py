"""The house: imports point one way, nothing lies about at the top."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lfq_lightning"

# From the ground up: a room, which is a folder or a file at the top, imports only from rooms before it. Of a folder's
# files none imports one that, over however many others, imports it.
ROOMS = [
    "private",
    "private_triton",
    "checking",
    "schedule",
    "telling",
    "reading",
    "running",
    "tables",
    "ops",
    "spec",
    "rules",
    "observers",
    "quantizer",
    "flow",
    "targets",
    "placement",
    "gathering",
    "phases",
    "calibration",
    "state_dicts",
    "checkpoint",
    "records",
    "analysis",
    "export",
    "training",
    "callback",
    "techniques",
    "report",
    "commands",
    "__init__",
    "__main__",
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
    upwards = [
        f"{name_of(path)} imports {imported}"
        for path in FILES
        for imported in imports(path)
        if ROOMS.index(imported.partition(".")[0]) > ROOMS.index(name_of(path).partition(".")[0])
    ]
    assert upwards == []


def test_no_import_leads_back() -> None:
    TopologicalSorter({name_of(path): imports(path) for path in FILES}).prepare()  # or CycleError, with the way


def listed(path: Path) -> list[str] | None:
    """The public face of a folder: `__all__` of its `__init__.py`, in its order."""
    for node in ast.parse(path.read_text()).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "__all__":
            return ast.literal_eval(node.value)
    return None


def test_every_folder_lists_its_public_face_and_the_package_takes_nothing_else_of_it() -> None:
    faces = {name_of(path): listed(path) for path in FILES if path.name == "__init__.py"}
    folders = {name: face for name, face in faces.items() if not name.startswith(("conf", "plugins"))}
    assert all(face is not None for face in folders.values()), folders
    public = [
        node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.ImportFrom)
    ]
    taken = {alias.name: node.module.removeprefix("lfq_lightning.") for node in public for alias in node.names}
    assert sorted(taken) == sorted(folders["__init__"])
    for name, room in taken.items():
        assert "." not in room, f"{name} comes from a file inside a folder, {room}"
        assert name in folders.get(room, [name]), f"{room} does not list {name}"


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
