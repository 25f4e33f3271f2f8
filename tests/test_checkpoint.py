"""State dicts and checkpoints: float and quantized into each other, strictly, in any process."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.quantizer.saved import described
from tests.processes import ROOT, run_python
from tests.runs import Net, every_epoch, fit, images, loader, qat, trainer

X = images().tensors[0]


def learned(width: int = 4) -> Net:
    model = Net(width)
    lfq.attach(model, weight=4, activation=4)
    lfq.calibrate(model, [X])
    lfq.set_phase(model, "learn")
    return model


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, Tensor) else found[key] == value, key


@pytest.mark.quick
def test_attach_adds_keys_and_changes_none() -> None:
    model = Net()
    before = list(model.state_dict())
    lfq.attach(model)
    after = list(model.state_dict())
    assert [key for key in after if key in before] == before
    added = {key.rpartition(".")[0].partition(".")[2] for key in after if key not in before}
    assert added <= {"weight_quantizer", "input_quantizer", "weight_quantizer.observer", "input_quantizer.observer"}


@pytest.mark.quick
def test_a_float_state_dict_loads_strictly_into_a_quantized_model_and_back() -> None:
    source, quantized, back = Net(), learned(), Net()
    scales = {name: q.scale.detach().clone() for name, q in lfq.quantizers(quantized).items()}
    lfq.load_state_dict(quantized, source.state_dict())
    assert torch.equal(quantized.second.weight, source.second.weight)
    assert all(torch.equal(q.scale, scales[name]) for name, q in lfq.quantizers(quantized).items())
    lfq.load_state_dict(back, quantized.state_dict())
    assert_same_state(back.state_dict(), source.state_dict())


@pytest.mark.quick
def test_a_quantized_state_dict_loads_into_an_attached_model_with_phase_and_all() -> None:
    source, target = learned(), Net()
    lfq.attach(target, weight=4, activation=4)
    lfq.load_state_dict(target, {"state_dict": source.state_dict()})
    assert_same_state(target.state_dict(), source.state_dict())
    assert torch.equal(target.eval()(X), source.eval()(X))
    assert {q.phase for q in lfq.quantizers(target).values()} == {"learn"}


@pytest.mark.quick
@pytest.mark.parametrize("key", ["second.weight", "second.input_quantizer.scale", "norm.running_mean"])
def test_loading_is_strict_and_a_failure_changes_nothing(key: str) -> None:
    source, target = learned(), learned()
    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in target.state_dict().items()}
    missing = {k: v for k, v in source.state_dict().items() if k != key}
    with pytest.raises(ValueError, match=f"missing {key}"):
        lfq.load_state_dict(target, missing)
    with pytest.raises(ValueError, match="unexpected stranger"):
        lfq.load_state_dict(target, {**source.state_dict(), "stranger": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"has shape \(3,\)"):
        lfq.load_state_dict(target, {**source.state_dict(), key: torch.zeros(3)})
    assert_same_state(target.state_dict(), before)


@pytest.mark.quick
def test_a_state_dict_quantized_differently_is_refused_with_both_shown() -> None:
    other = Net()
    lfq.attach(other, weight=2, activation=4)
    with pytest.raises(ValueError, match=r"second\.weight_quantizer: the checkpoint has QuantSpec\(bits=2.*model has"):
        lfq.load_state_dict(learned(), other.state_dict())


@pytest.mark.quick
@pytest.mark.parametrize("nonsense", [3, {"state_dict": 3}, {1: 2}])
def test_what_is_no_state_dict_is_refused(nonsense: Any) -> None:
    with pytest.raises(ValueError, match="must be a state dict or a Lightning checkpoint"):
        lfq.load_state_dict(Net(), nonsense)


@pytest.mark.quick
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_rebuilds_the_module_without_the_callback(tmp_path: Path, weights_only: bool) -> None:
    model, made, _ = fit(tmp_path, Net(width=5))
    made.save_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)
    again = lfq.load_from_checkpoint(Net, tmp_path / "x.ckpt")
    assert_same_state(again.state_dict(), model.state_dict())
    assert torch.equal(again.eval()(X), model.eval()(X))


class Options:
    """A class of a user's, as hyper-parameters may hold."""


class Configured(Net):
    def __init__(self, options: Options | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_objects_among_the_hyper_parameters_need_a_trusted_file(tmp_path: Path) -> None:
    model, made, _ = fit(tmp_path, Configured(Options()))
    made.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"Found tests.test_checkpoint.Options .*pass `weights_only=False`"):
        lfq.load_from_checkpoint(Configured, tmp_path / "x.ckpt")
    with (tmp_path / "x.ckpt").open("rb") as file, pytest.raises(ValueError, match=r"checkpoint.Options"):
        lfq.load_from_checkpoint(Configured, file)
    again = lfq.load_from_checkpoint(Configured, tmp_path / "x.ckpt", weights_only=False)
    assert isinstance(again.hparams["options"], Options)
    assert torch.equal(again.eval()(X), model.eval()(X))


class Partly(Net):
    """Does not save its first layer."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if key not in ("first.weight", "first.bias")}


class PartlyAndSaysSo(Partly):
    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False


def test_a_module_that_does_not_load_strictly_is_not_loaded_strictly(tmp_path: Path) -> None:
    model, made, _ = fit(tmp_path, PartlyAndSaysSo())
    made.save_checkpoint(tmp_path / "x.ckpt")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found keys that are in the model state dict")
        loaded = lfq.load_from_checkpoint(PartlyAndSaysSo, tmp_path / "x.ckpt")
        asked = lfq.load_from_checkpoint(Partly, tmp_path / "x.ckpt", strict=False)
    for again in (loaded, asked):
        assert_same_state(again.state_dict(), model.state_dict())


class Renaming(Net):
    """Loads what it saved when its head had another name."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(self.rename)

    @staticmethod
    def rename(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for key in [key for key in state_dict if key.startswith("classifier.")]:
            state_dict["head." + key.removeprefix("classifier.")] = state_dict.pop(key)


def test_keys_that_a_module_renames_are_loaded(tmp_path: Path) -> None:
    model, made, _ = fit(tmp_path, Renaming())
    made.save_checkpoint(tmp_path / "x.ckpt")
    old = torch.load(tmp_path / "x.ckpt", weights_only=True)
    for key in ("weight", "bias"):
        old["state_dict"][f"classifier.{key}"] = old["state_dict"].pop(f"head.{key}")
    torch.save(old, tmp_path / "old.ckpt")
    again = lfq.load_from_checkpoint(Renaming, tmp_path / "old.ckpt")
    assert_same_state(again.state_dict(), model.state_dict())


@pytest.mark.quick
def test_a_float_checkpoint_loads_as_the_float_module(tmp_path: Path) -> None:
    model = Net()
    made = trainer(tmp_path, [], max_epochs=1)
    made.fit(model, loader())
    made.save_checkpoint(tmp_path / "x.ckpt")
    assert not lfq.quantizers(lfq.load_from_checkpoint(Net, tmp_path / "x.ckpt"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a quantized run."""
    directory = tmp_path_factory.mktemp("saved")
    fit(directory)[1].save_checkpoint(directory / "x.ckpt")
    return directory / "x.ckpt"


def written_by_another_version(path: Path) -> dict[str, Any]:
    checkpoint = torch.load(path, weights_only=True)
    state, key = checkpoint["state_dict"], "second.weight_quantizer._extra_state"
    description = described(state[key])
    state[key] = replace(description, spec={**description.spec, "shape": "log"}).to_tensor()
    return checkpoint


FILES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "cut": (lambda path: path.read_bytes()[: path.stat().st_size // 2], "may have been cut short"),
    "empty": (lambda path: b"", r"torch cannot read \(EOFError"),
    "text": (lambda path: b"a,b\n1,2\n", "of another kind"),
}
CONTENTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tensors alone": (lambda path: {"weights": torch.zeros(1)}, "no `state_dict`.*use `load_state_dict`"),
    "a list": (lambda path: [torch.zeros(1)], "no `state_dict`"),
    "no tensors": (lambda path: {"state_dict": [1]}, "no `state_dict`"),
    "another trainer's": (lambda path: {"state_dict": Net().state_dict(), "epoch": 3}, "keys state_dict, epoch: build"),
    "another version's": (written_by_another_version, r"second\.weight_quantizer quantizes.*'shape': 'log'"),
}


@pytest.mark.parametrize("kind", [*FILES, *CONTENTS])
def test_a_truncated_or_foreign_file_is_refused_with_the_reason(saved: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "odd.ckpt"
    if kind in FILES:
        made, message = FILES[kind]
        path.write_bytes(made(saved))
    else:
        contents, message = CONTENTS[kind]
        torch.save(contents(saved), path)
    with pytest.raises(ValueError, match=message):
        lfq.load_from_checkpoint(Net, path)


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lfq.load_from_checkpoint(Net, tmp_path / "absent.ckpt")


@pytest.mark.quick
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        ("x.ckpt", "Found str: pass what `torch.load`"),
        ({1: torch.zeros(1)}, "must be a state dict"),
        ({}, "missing first.weight"),
        ({**Net().state_dict(), "head.bias": "zero"}, "head.bias is no tensor but str"),
    ],
)
def test_a_foreign_state_dict_is_refused_and_changes_nothing(foreign: Any, message: str, quantized: bool) -> None:
    model = Net()
    if quantized:
        lfq.attach(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        lfq.load_state_dict(model, foreign)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) if isinstance(v, Tensor) else after[k] == v for k, v in before.items())


def test_the_best_checkpoint_is_tested_in_the_same_process(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    model, made, _ = fit(tmp_path, callbacks=[best])
    [metrics] = made.test(model, loader(), ckpt_path="best", verbose=False)
    expected = lfq.load_from_checkpoint(Net, best.best_model_path).eval()
    losses = [torch.nn.functional.cross_entropy(expected(x), y).detach() for x, y in loader()]
    assert metrics["test_loss"] == pytest.approx(float(sum(losses) / len(losses)), rel=1e-6)


def test_a_checkpoint_is_tested_validated_and_predicted_in_a_fresh_process(tmp_path: Path) -> None:
    model, made, _ = fit(tmp_path, callbacks=[every_epoch(tmp_path)])
    torch.save(torch.cat(made.predict(model, loader(), return_predictions=True)), tmp_path / "expected.pt")
    code = f"""
import torch
from tests.runs import Net, loader, qat, trainer
made, model = trainer({str(tmp_path)!r}, [qat()]), Net()
found = torch.cat(made.predict(model, loader(), ckpt_path={str(tmp_path / "epoch=2.ckpt")!r}))
assert torch.equal(found, torch.load({str(tmp_path / "expected.pt")!r}))
made.test(model, loader(), ckpt_path={str(tmp_path / "epoch=2.ckpt")!r})
made.validate(model, loader(), ckpt_path={str(tmp_path / "epoch=2.ckpt")!r})
"""
    done = run_python("-c", code, cwd=ROOT, directory=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_checkpoint_that_disagrees_with_the_callback_is_refused_with_both_shown(tmp_path: Path) -> None:
    fit(tmp_path, callbacks=[every_epoch(tmp_path)])
    with pytest.raises(ValueError, match=r"the checkpoint has QuantSpec.bits=4.*the model has QuantSpec.bits=3"):
        trainer(tmp_path, [qat(weight=3)]).test(
            Net(), loader(), ckpt_path=tmp_path / "epoch=2.ckpt", weights_only=True, verbose=False
        )


def test_a_quantized_fit_starts_from_a_float_checkpoint(tmp_path: Path) -> None:
    floating = Net()
    made = trainer(tmp_path, [every_epoch(tmp_path)], max_epochs=1)
    made.fit(floating, loader())
    more = {"callbacks": [every_epoch(tmp_path)], "max_epochs": 4}
    model, made, _ = fit(tmp_path / "qat", ckpt_path=tmp_path / "epoch=0.ckpt", **more)
    assert made.current_epoch == 4
    assert {q.phase for q in lfq.quantizers(model).values()} == {"learn"}


def test_a_checkpoint_of_other_steps_is_tested_where_no_batch_shows_what_is_quantized(tmp_path: Path) -> None:
    class Read(Net):
        """Its head is read by a function, which types do not show."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
            return nn.functional.linear(x.flatten(1), self.head.weight, self.head.bias)

    earlier = lfq.QuantSpec(bits=4, granularity="per_channel", lr_factor="bits")  # the default then
    fit(tmp_path, Read(), callback=qat(weight=earlier), callbacks=[every_epoch(tmp_path)])
    made = trainer(tmp_path, [qat(weight=earlier.with_usual_steps()), every_epoch(tmp_path)])
    [found] = made.test(Read(), loader(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False, weights_only=True)
    again = trainer(tmp_path, [qat(weight=earlier), every_epoch(tmp_path)])
    [expected] = again.test(Read(), loader(), ckpt_path=tmp_path / "epoch=2.ckpt", verbose=False, weights_only=True)
    assert found == expected
