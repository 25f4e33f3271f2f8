"""Benchmarks run alone in one process, print their tables at the end, and leave them as JSON in `.benchmarks/`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.benchmarks.measuring import Table, machine

TABLES = pytest.StashKey[list[Table]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmarks", type=Path, help="folder for the JSON files; `.benchmarks` beside pyproject.toml")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    config.option.numprocesses = 0  # measurements beside one another would measure one another


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """An empty table with the test's name, printed and written when the test is over."""
    made = Table(request.node.name.removeprefix("test_"))
    yield made
    folder = request.config.getoption("benchmarks") or request.config.rootpath / ".benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "notes": made.notes, "columns": made.columns, "rows": made.rows}
    (folder / f"{made.name}.json").write_text(json.dumps(content, indent=1) + "\n")
    request.config.stash[TABLES].append(made)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[TABLES]:
        terminalreporter.section("benchmarks")
        terminalreporter.line("  ".join(f"{name} {value}" for name, value in machine().items()))
    for table in config.stash[TABLES]:
        terminalreporter.line("")
        terminalreporter.line(str(table))
