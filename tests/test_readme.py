"""The README, the guide and the tables: blocks run as a newcomer would paste them, links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.utils.data import DataLoader

import lfq_lightning as lfq
from tests.runs import Net, images

ROOT = Path(__file__).parents[1]
README, GUIDE, MEASURED = ROOT / "README.md", ROOT / "examples/README.md", ROOT / "tests/benchmarks/README.md"
PAGES = [README, *sorted(ROOT.glob("examples/**/README.md")), *sorted(ROOT.glob("tests/**/README.md"))]
RESULTS = ROOT / "tests/benchmarks/results"


class MyModule(Net):
    """Has the layers that the rules speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 3, padding=1)})])
        self.tokens = nn.Embedding(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)) + self.tokens.weight.sum()
        return self.head(torch.relu(self.second(self.blocks[0]["conv1"](x))).flatten(1))


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(images(8), batch_size=8)

    val_dataloader = test_dataloader = train_dataloader


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The code of every such block, and the line before it."""
    text = page.read_text()
    for found in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield text[: found.start(1)].count("\n"), found[1]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What a link to a heading is called on GitHub."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_has_no_open_ends(page: Path) -> None:
    assert "TODO" not in page.read_text()
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not link.startswith("https://"):
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_name_what_exists(page: Path) -> None:
    words = [shlex.split(line, comments=True) for _, block in blocks(page, "sh") for line in block.splitlines()]
    for command in words:
        for word in command:
            assert not re.match(r"(examples|tests)/", word) or (ROOT / word.split("::")[0]).exists(), word
        if command[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(command[2]), command
        if command[:2] == ["python", "examples/train.py"]:
            # Of what a sweep varies, the first.
            overrides = [word.split(",")[0] for word in command[2:] if not word.startswith("-")]
            with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
                compose("config", overrides=overrides)


def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = {"logger": True, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    plain = L.Trainer

    def trainer(**options: Any) -> L.Trainer:
        return plain(default_root_dir=tmp_path, **{**options, **quiet})

    monkeypatch.setattr(L, "Trainer", trainer)
    model, data = MyModule(), Data()
    interrupted = trainer(max_epochs=12, callbacks=[lfq.QuantizationAwareTraining(weight=4, activation=4)])
    interrupted.fit(model, data)
    for name in ("interrupted.ckpt", "quantized.ckpt"):
        interrupted.save_checkpoint(name)
    batches = list(data.train_dataloader())
    given = {"MyModule": MyModule, "data": data, "batches": batches, "batch": batches[0]}
    made: dict[str, dict[str, Any]] = {}  # by a block that stands on several pages and runs once
    for page in (README, GUIDE, MEASURED):
        names: dict[str, Any] = dict(given)
        for line, block in blocks(page, "python"):
            if block in made:
                names |= made[block]
                continue
            # These look at the model of the task before.
            if not any(word in block for word in ("summarize", "export_onnx")):
                names["model"] = MyModule()
            before = dict(names)
            exec(compile("\n" * line + block, page, "exec"), names)
            new = {name: value for name, value in names.items() if before.get(name) is not value}
            made[block] = {"model": names["model"]} | new
    assert len(made) > 20


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("overview", "accuracy.jsonl"),
        ("differences", "digits_by_default/accuracy.jsonl"),
        ("differences", "other_data/accuracy.jsonl"),
    ],
)
def test_the_accuracy_of_the_tables_is_that_of_the_results(kind: str, file: str) -> None:
    from tests.benchmarks import accuracy  # it loads libraries that nothing else here needs

    # The columns are of the libraries that are installed.
    columns, _, *found = cells(getattr(accuracy, kind)(accuracy.Results(RESULTS / file)))
    every = cells(MEASURED.read_text().replace("Brevitas |", "brevitas |"))
    [header] = {tuple(row) for row in every if set(columns) <= set(row)}
    table = [row for row in every if len(row) == len(header)]
    places = [header.index(column) for column in columns]
    for row in found:
        assert row in [[cell[place] for place in places] for cell in table if len(cell) == len(header)]


def cells(tables: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in tables.splitlines() if line[:1] == "|"]


def test_what_became_of_a_pretrained_network_is_what_the_results_say() -> None:
    table = MEASURED.read_text()
    lines = (RESULTS / "pretrained/distilling.jsonl").read_text().splitlines()
    lines += (RESULTS / "pretrained/rates/distilling.jsonl").read_text().splitlines()
    for row in (row for row in map(json.loads, lines) if "cell" in row):
        assert f"{row['divergence']:.4f}, {100 * row['agreement']:.1f} %" in table, row
    for row in json.loads((RESULTS / "pretrained/mixed_bits.json").read_text())["rows"]:
        assert f"| {row['weights']} | {row['bytes']} | {row['KL']} | {row['agreement']} |" in table, row


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((folder / f"{name}.json").read_text())["rows"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scales", ["one scale", "per row", "per column", "groups of 128"])
def test_the_bandwidth_of_the_tables_is_that_of_the_results(scales: str, dtype: str) -> None:
    for gpu in (["h100"], ["h200/first", "h200"]):
        shares: dict[str, list[str]] = {}
        for folder in gpu:
            for row in rows(RESULTS / "cuda" / folder, f"cuda_bandwidth_{scales.replace(' ', '_')}_{dtype}"):
                both = f"{row['forward_share']:.2f} / {row['backward_share']:.2f}"
                shares.setdefault(row["elements"], []).append(both)
        cells = [" → ".join(shares[elements]) for elements in ("2^18", "2^22", "2^26")]
        assert f"| {scales} | {dtype} | {' | '.join(cells)} |" in MEASURED.read_text()


STEPS = sorted((RESULTS / "cuda").glob("*/cuda_step_*.json"))


@pytest.mark.parametrize("path", STEPS, ids=lambda path: f"{path.parent.name} {path.stem}")
def test_the_steps_of_the_tables_are_those_of_the_results(path: Path) -> None:
    found = rows(path.parent, path.stem)
    taken = [f"{row['ms']:.1f} ms" + (f" ({row['ratio']:.2f})" if row["ratio"] != 1 else "") for row in found]
    memory = ", ".join(f"{row['peak_MB']:.0f}" for row in found)
    lines = [line.split(" | ") for line in MEASURED.read_text().splitlines() if line.endswith(f"| {memory} |")]
    [line] = [line for line in lines if line[1] == path.parent.name.upper()]
    assert line[2 : 2 + len(taken)] == taken


TARGETS = sorted((RESULTS / "target").glob("target_o*.json"))
PROGRAMS = sorted(path for name in ("executorch", "x86") for path in (RESULTS / "target").glob(f"target_{name}_*.json"))


@pytest.mark.parametrize("path", TARGETS, ids=lambda path: path.stem)
def test_the_runtimes_of_the_tables_are_those_of_the_results(path: Path) -> None:
    found = {row["file"]: row for row in rows(path.parent, path.stem)}
    files = ("its own W8A8", "ours, W8A8", "ours, for both", "ours, W4A8", "ours, W4A4", "ours, no target")
    figures = " | ".join(found[name]["of_float"] for name in files)
    counted = [found[name]["products_in_integers"].split(" of ") for name in (files[0], files[1], files[5])]
    shares = f"{', '.join(integer for integer, _ in counted)} of {counted[1][1]}"
    assert f" | {figures} | {shares} |" in MEASURED.read_text()


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_the_programs_of_the_tables_are_those_of_the_results(path: Path) -> None:
    found = {row["file"]: row for row in rows(path.parent, path.stem)}
    files = [found[name] for name in ("its own W8A8", "ours, W8A8", "ours, no target")]
    counted = [row["products_in_integers"].split(" of ") for row in files]
    shares = f"{', '.join(integer for integer, _ in counted)} of {counted[1][1]}"
    assert f" | {' | '.join(row['of_float'] for row in files)} | {shares} |" in MEASURED.read_text()


def test_the_accuracy_in_runtimes_is_that_of_the_results() -> None:
    scores: dict[tuple[str, str], list[float]] = {}
    for line in (RESULTS / "in_runtimes/accuracy.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "task" in row:
            scores.setdefault((row["task"], row["method"]), []).append(row["score"])
    lines = MEASURED.read_text().splitlines()
    for task in {task for task, _ in scores}:
        data, kind = ("MNIST-5k" if task.startswith("mnist") else "digits"), task.rpartition("_")[2]
        [line] = [line for line in lines if line.startswith(f"| {data}, {kind} |")]
        shown = [float(cell.split()[0]) for cell in line.strip("| ").split(" | ")[1:]]
        methods = ("float", "its own W8A8", "W8A8", "W8A8 within 63", "W4A8", "W4A4")
        assert shown == [round(mean(scores[task, method]), 2) for method in methods]
