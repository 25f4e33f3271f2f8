"""The report is one page that a browser shows without a network, and it says what the model is."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import lfq_lightning as lfq
from lfq_lightning.__main__ import main
from lfq_lightning.records.curves import sheet_of
from lfq_lightning.records.trajectory import read_trajectory
from lfq_lightning.report.findings import bytes_in_float, describe_weights
from lfq_lightning.report.stored import stored_model
from tests.operation_networks import ACTIVATIONS, MADE, WEIGHTS, attached
from tests.processes import run_python
from tests.runs import Net, every_epoch, fit, images, loader

pytest.importorskip("plotly")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FIGURES = ["trajectories-figure", "sizes-figure", "noise-figure", "sensitivity-figure", "weights-figure"]
X, Y = images().tensors


class Data(L.LightningDataModule):
    def val_dataloader(self) -> Any:
        return loader()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a trajectory and a checkpoint of each epoch."""
    directory = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    fit(directory, callbacks=[every_epoch(directory)], max_epochs=4)
    return directory


@pytest.fixture
def checkpoint(run: Path) -> Path:
    return run / "epoch=3.ckpt"


class Page(HTMLParser):
    """The ids, tables and words of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []
        self.words = ""
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        found = dict(attributes)
        self._open = tag
        if found.get("id"):
            self.ids.append(found["id"])
        if tag in ("script", "img", "link", "iframe"):
            self.links += [found[key] for key in ("src", "href") if found.get(key)]

    def handle_data(self, text: str) -> None:
        if self._open in ("td", "th"):
            self.cells.append(text.strip())
        if self._open not in ("script", "style"):
            self.words += text


def in_chromium(page: Path, directory: Path) -> tuple[str, str, Path]:
    """The page after its scripts ran, what they wrote to the console, and a screenshot; nothing can be reached."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: `apt-get install chromium`, or put one on PATH")
    picture = directory / "page.png"
    quiet = ["--disable-background-networking", "--disable-component-update", "--no-first-run", "--hide-scrollbars"]
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", *quiet, "--virtual-time-budget=10000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={directory / 'profile'}"]
    command += ["--window-size=1250,3600", "--enable-logging=stderr", page.absolute().as_uri()]
    for action in (["--dump-dom"], [f"--screenshot={picture}"]):
        done = subprocess.run([*command, *action], capture_output=True, text=True, timeout=200, check=True)
        if "--dump-dom" in action:
            shown, console = done.stdout, "\n".join(re.findall(r".*CONSOLE.*", done.stderr))
    return shown, console, picture


def test_a_checkpoint_alone_gives_all_but_what_takes_data(checkpoint: Path, tmp_path: Path) -> None:
    page = Page(lfq.write_report(checkpoint, tmp_path / "page.html").read_text())
    model = lfq.load_from_checkpoint(Net, checkpoint)
    assert [name for name in lfq.quantizers(model) if name not in page.cells] == []
    assert {f"{row.bits}" for row in lfq.summarize(model).rows} <= set(page.cells)
    assert [f for f in FIGURES if f in page.ids] == [f for f in FIGURES if f != "sensitivity-figure"]
    assert "that takes a model, a dataloader and a metric" in page.words
    assert f"{lfq.summarize(model).weight_bytes:,} bytes" in page.words


def test_the_page_needs_no_other_file_and_no_network(run: Path, tmp_path: Path) -> None:
    text = lfq.write_report(run, tmp_path / "page.html").read_text()
    assert [link for link in Page(text).links if not link.startswith("data:")] == []
    assert "sendChartToCloud" in text.split("modeBarButtonsToRemove")[-1]


def test_a_browser_shows_every_part_without_an_error(run: Path, tmp_path: Path) -> None:
    accuracy = lambda outputs, targets: (outputs.argmax(1) == targets).float().mean()  # noqa: E731
    page = lfq.write_report(
        run, tmp_path / "page.html", model=Net, dataloader=loader(), metric=accuracy, higher_is_better=True
    )
    shown, console, picture = in_chromium(page, tmp_path)
    assert console == ""
    for figure in FIGURES:
        assert re.search(rf'id="{figure}"[^>]*js-plotly-plot', shown), figure
    drawn = re.split(r'id="(\w+)-figure"', shown)
    parts = dict(zip(drawn[1::2], drawn[2::2], strict=True))
    assert parts["trajectories"].count("js-line") >= 6 * 3  # six quantizers; scale, movement and saturation of each
    for part in ("sizes", "noise", "sensitivity", "weights"):
        assert 'class="point"' in parts[part], part
    assert all(f">{layer}<" in parts["sizes"] for layer in ("first", "second", "head"))
    assert picture.stat().st_size > 50_000


def test_the_page_shows_the_panels_that_the_picture_is_drawn_from(run: Path) -> None:
    from lfq_lightning.report import figures

    rows = read_trajectory(run / "trajectory.csv")
    rows = [replace(r, scale_mean=r.scale_mean * (9 if r.phase == "learn" and r.step % 2 else 1)) for r in rows]
    sheet, page = sheet_of(rows), figures.trajectories(rows)
    assert sheet is not None and page is not None
    panels = [panel for line in sheet.panels for panel in line]
    assert {panel.is_logarithmic for panel in panels if panel.quantity == "movement"} == {True}
    for number, panel in enumerate(panels, start=1):
        axis = "y" if number == 1 else f"y{number}"
        drawn = [list(trace.y) for trace in page.data if trace.yaxis == axis and trace.customdata is not None]
        assert drawn == [[value for _, value, _, _ in curve] for curve in panel.curves.values()]
        shown = page.layout[f"yaxis{axis[1:]}"]
        assert (shown.type == "log") == bool(panel.is_logarithmic and panel.curves)
    assert page.layout.xaxis.range == sheet.limits


def test_a_run_directory_takes_its_newest_checkpoint_and_its_trajectory(run: Path, tmp_path: Path) -> None:
    page = lfq.write_report(run)
    assert page == run / "report.html"
    words = Page(page.read_text()).words
    assert "epoch=3.ckpt" in words
    (run / "report.html").unlink()
    # From above, as a Hydra run directory is.
    assert Page(lfq.write_report(run.parent / run.name, tmp_path / "p.html").read_text()).words == words


def test_without_a_checkpoint_there_are_the_trajectories(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "trajectory.csv", tmp_path)
    page = Page(lfq.write_report(tmp_path).read_text())
    assert [f for f in FIGURES if f in page.ids] == ["trajectories-figure"]
    assert "only the trajectories are known" in page.words


def test_a_moved_checkpoint_finds_the_trajectory_that_it_speaks_of(checkpoint: Path, tmp_path: Path) -> None:
    moved = shutil.copy(checkpoint, tmp_path / "moved.ckpt")
    assert "trajectories-figure" in Page(lfq.write_report(moved).read_text()).ids


def test_names_are_escaped(tmp_path: Path) -> None:
    model = nn.ModuleDict({"<script>alert(1)</script>": nn.Linear(4, 2)})
    lfq.attach(model)
    lfq.set_phase(model, "observe")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "odd.ckpt")
    text = lfq.write_report(tmp_path / "odd.ckpt").read_text()
    assert "<script>alert" not in text


class Many(L.LightningModule):
    """A square transposed convolution, whose channels are the second dimension; groups; tied weights; an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.tokens = nn.Embedding(8, 6)
        self.middle = nn.Linear(6, 6)
        self.out = nn.Linear(6, 8, bias=False)
        self.out.weight = self.tokens.weight
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.middle(self.tokens(x)))


def test_layers_stored_in_a_checkpoint_are_described_as_those_of_the_model() -> None:
    model = Many()
    groups = lfq.Rule("middle", weight=lfq.QuantSpec(bits=4, granularity="per_group", group_size=4))
    lfq.attach(model, weight=8, activation=8, rules=[groups])
    lfq.set_phase(model, "observe")
    model.up.weight_quantizer.estimate_from(model.up.weight)
    model.middle.weight_quantizer.estimate_from(model.middle.weight)
    stored = stored_model(model.state_dict())
    assert list(lfq.quantizers(stored)) == list(lfq.quantizers(model))
    ours, theirs = lfq.summarize(stored), lfq.summarize(model)
    assert repr(ours.rows) == repr(theirs.rows)
    assert (ours.weight_bytes, ours.float_weight_bytes) == (theirs.weight_bytes, theirs.float_weight_bytes)
    assert describe_weights(stored) == describe_weights(model)
    assert bytes_in_float(stored) == bytes_in_float(model) == 4 * (4 + 6 + 3)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) * self.right(x)


@pytest.mark.parametrize("kind", ["two of one tensor", "standardized", "shared table", "attention in one layer"])
def test_what_operations_read_is_described_from_a_checkpoint_as_from_the_model(kind: str) -> None:
    if kind == "two of one tensor":
        model: nn.Module = Branches()
        lfq.attach(model, example=torch.randn(3, 4))
        lfq.calibrate(model, [torch.randn(3, 4)])
        assert model.left.input_quantizer is model.right.input_quantizer
    else:
        model = attached({**WEIGHTS, **MADE, **ACTIVATIONS}[kind], weight=4, activation=8)
    stored = stored_model(model.state_dict())
    assert list(lfq.quantizers(stored)) == list(lfq.quantizers(model))
    assert describe_weights(stored) == describe_weights(model)
    assert bytes_in_float(stored) == bytes_in_float(model)
    ours, theirs = lfq.summarize(stored), lfq.summarize(model)
    assert repr(ours.rows) == repr(theirs.rows)
    assert (ours.weight_bytes, ours.float_weight_bytes) == (theirs.weight_bytes, theirs.float_weight_bytes)


def test_a_tied_weight_is_described_once_and_a_pruned_one_as_it_is_used() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[1].weight
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    lfq.attach(model, weight=4, activation=None, rules=[lfq.Rule("*", weight=4)])
    lfq.set_phase(model, "estimate")
    for found in (describe_weights(model), describe_weights(stored_model(model.state_dict()))):
        assert [one.layer for one in found] == ["0", "1"]
        assert found[0].used[found[0].codes.index(0)] >= 32


def test_histograms_count_every_weight_before_and_after_and_every_code() -> None:
    model = nn.Sequential(nn.Linear(50, 40))
    lfq.attach(model, weight=lfq.QuantSpec(bits=3), activation=None, rules=[lfq.Rule("0", weight=3)])
    lfq.set_phase(model, "estimate")
    (found,) = describe_weights(model)
    assert sum(found.before) == sum(found.after) == sum(found.used) == 2000
    assert found.codes == list(range(-4, 4))
    quantized = model[0].weight_quantizer.quantized(model[0].weight.detach())
    codes = (quantized / model[0].weight_quantizer.scale.detach()[:, None]).round()
    assert found.used == [int((codes == code).sum()) for code in found.codes]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataloader": loader()}, "needs the `model`"),
        ({"model": Net, "metric": "val_loss"}, "A metric needs a `dataloader`"),
        ({"model": Net()}, "must be quantized"),
    ],
)
def test_what_lacks_something_is_refused(checkpoint: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lfq.write_report(checkpoint, **options)
    assert not (checkpoint.parent / "report.html").exists()


def test_sources_that_are_none_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Found nothing"):
        lfq.write_report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="Found neither"):
        lfq.write_report(tmp_path)
    torch.save({"state_dict": Net().state_dict()}, tmp_path / "float.ckpt")
    with pytest.raises(ValueError, match="without quantizers"):
        lfq.write_report(tmp_path / "float.ckpt")
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.copy(run / "trajectory.csv", tmp_path / "runs" / name)
    with pytest.raises(ValueError, match="Found 2 in"):
        lfq.write_report(tmp_path / "runs")


# ---- command line -------------------------------------------------------------------------------------------------


def test_the_command_measures_sensitivity_by_a_model_and_its_data(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = "tests.test_report"
    options = ["--model", f"{here}:Net", "--data", f"{here}:Data", "--metric", "val_loss", "--mode", "min"]
    assert main(["report", str(run), "-o", str(tmp_path / "page.html"), *options]) == 0
    assert str(tmp_path / "page.html") in capsys.readouterr().out
    assert set(FIGURES) <= set(Page((tmp_path / "page.html").read_text()).ids)


def test_the_commands_run_as_a_program(run: Path, tmp_path: Path) -> None:
    for command, made in (("report", "page.html"), ("plot", "picture.svg")):
        arguments = ["-m", "lfq_lightning", command, run, "-o", tmp_path / made]
        done = run_python(*arguments, cwd=tmp_path, directory=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").stat().st_size > 1_000_000  # plotly is inside
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plot", "nowhere"], "Found no file"),
        (["report", "nowhere"], "Found nothing"),
        (["report", "RUN", "--model", "networks"], "must be MODULE:NAME"),
        (["report", "RUN", "--model", "json:Nothing"], "json:Nothing"),
        (["report", "RUN", "--data", "json:loads"], "must name a LightningDataModule"),
    ],
)
def test_a_mistake_is_said_in_a_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(run) if word == "RUN" else word for word in arguments]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
