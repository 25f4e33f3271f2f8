"""The short set of tests with older and newer versions of Python, torch and Lightning: what the lower bounds rest on.

python -m tests.versions                    # every row, in an environment of its own; goes on where it was
python -m tests.versions --torch 2.11.0 --again # this row anew, in the environment that it has
python -m tests.versions --python 3.11      # the rows of this Python alone
python -m tests.versions --report           # the table of what has run

Each row needs its `python3.X` on the PATH, and has its environment, the tests' output and their result in `.versions/`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".versions"
# The quick tests, and of what those leave out, what leans most on how torch works inside.
FILES = ("compile", "ddp", "export_backends")
SETS = (["-m", "quick"], [f"tests/test_{name}.py" for name in FILES])
EXTRAS = ("export", "examples", "report", "cli", "docs", "test")


class Row(NamedTuple):
    """One environment; Triton before 3.7 does not interpret with the newest NumPy."""

    python: str
    torch: str
    lightning: str
    more: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return FOLDER / f"python{self.python}-torch{self.torch}-lightning{self.lightning}"


ROWS = (
    Row("3.11", "2.8.0", "2.6.0", ("numpy<2.4",)),
    Row("3.11", "2.10.0", "2.6.1", ("numpy<2.4",)),
    Row("3.11", "2.14.1", "2.6.6"),
    Row("3.12", "2.11.0", "2.6.6", ("numpy<2.4",)),
    Row("3.13", "2.13.0", "2.6.6"),
)


def requirements(row: Row) -> list[str]:
    """What pyproject.toml asks for, with the versions of this row; torch brings the Triton that it was built with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    ours = {"torch", "lightning", "triton", "lfq_lightning"}
    others = [line for line in asked if re.match(r"[\w-]+", line)[0] not in ours]
    return [f"torch=={row.torch}", f"lightning=={row.lightning}", *row.more, *others]


def install(row: Row) -> Path:
    """The Python of this row's environment, made where it was not."""
    python = row.folder / "bin" / "python"
    done = row.folder / "installed"
    if not done.exists():
        base = shutil.which(f"python{row.python}")
        if base is None:
            raise SystemExit(f"Each row needs its Python on the PATH. Found no `python{row.python}`.")
        subprocess.run([base, "-m", "venv", row.folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *requirements(row)], check=True)
        # Without dependencies and bounds: a row may be older than those, which is how they are found.
        ours = ["--no-deps", "--no-build-isolation", "--ignore-requires-python", "-e", ROOT]
        subprocess.run([*pip, *ours], check=True)
        done.touch()
    return python


def run(row: Row) -> None:
    """The tests, with their warnings as warnings: each version has its own."""
    python = install(row)
    counts: Counter[str] = Counter()
    failed: list[str] = []
    for number, chosen in enumerate(SETS):
        report = row.folder / f"{number}.xml"
        command = [python, "-m", "pytest", "-n", "0", "-W", "default", "--tb=short", "--show-capture=no", "-q"]
        with (row.folder / f"{number}.txt").open("w") as output:
            subprocess.run(
                [*command, f"--junitxml={report}", *chosen],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        for case in ElementTree.parse(report).iter("testcase"):
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            kind = "failed" if kinds & {"failure", "error"} else "skipped" if kinds else "passed"
            counts[kind] += 1
            if kind == "failed":
                failed.append(f"{case.get('classname')}::{case.get('name')}")
    (row.folder / "result.json").write_text(json.dumps({**counts, "tests": failed}, indent=1))


def table(rows: list[Row]) -> str:
    """What has run, as Markdown, and the tests that failed."""
    lines = ["| Python | torch | Lightning | passed | failed | skipped |", "| --- | --- | --- | --- | --- | --- |"]
    failed = []
    for row in rows:
        path = row.folder / "result.json"
        if path.exists():
            result = json.loads(path.read_text())
            numbers = [str(result.get(kind, 0)) for kind in ("passed", "failed", "skipped")]
            lines.append(f"| {' | '.join([row.python, row.torch, row.lightning, *numbers])} |")
            failed += [f"torch {row.torch}: {test}" for test in result["tests"]]
    return "\n".join([*lines, *failed])


def main() -> None:
    """Run what has no result yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", choices=sorted({row.python for row in ROWS}), help="the rows of this Python alone")
    parser.add_argument("--torch", choices=[row.torch for row in ROWS], help="the row of this torch alone")
    parser.add_argument("--again", action="store_true", help="also where there is a result")
    parser.add_argument("--report", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    rows = [row for row in ROWS if arguments.python in (None, row.python) and arguments.torch in (None, row.torch)]
    for row in rows:
        if not arguments.report and (arguments.again or not (row.folder / "result.json").exists()):
            print("running", row.folder.name, file=sys.stderr)
            run(row)
    print(table(rows))


if __name__ == "__main__":
    main()
