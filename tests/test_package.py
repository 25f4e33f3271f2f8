"""The other package that Lightning is published as is refused before it can pass a check by."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning as L
import pytest

import lfq_lightning as lfq
from tests.runs import Net, qat, trainer

pytestmark = pytest.mark.quick

LINE = "write `import lightning.pytorch as pl` in place of `import pytorch_lightning as pl`"


@pytest.fixture
def pl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package of that name, which need not be installed."""
    package = tmp_path / "pytorch_lightning"
    package.mkdir()
    classes = "class Trainer:\n    callbacks, max_epochs, fast_dev_run = [], 3, False\nclass ModelCheckpoint: ...\n"
    (package / "__init__.py").write_text(classes)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k.split(".")[0] != package.name})
    return importlib.import_module("pytorch_lightning")


@pytest.mark.parametrize(
    "callback",
    [
        lfq.QuantizationAwareTraining(),
        lfq.OscillationControl(),
        lfq.BatchNormStatistics(freeze=1),
        lfq.BitAnnealing({0: 8}),
        lfq.Distillation(),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_a_trainer_of_the_other_package_is_refused_before_anything_is_changed(pl: Any, callback: Any) -> None:
    model = Net()
    theirs = pl.Trainer()
    theirs.callbacks = [callback]
    with pytest.raises(TypeError, match=rf"of the package `lightning`, .* Found pytorch_lightning\.Trainer: {LINE}"):
        callback.setup(theirs, model, "fit")
    assert not lfq.quantizers(model)


def test_a_callback_of_the_other_package_is_refused_beside_ours(pl: Any, tmp_path: Path) -> None:
    class Mine(pl.ModelCheckpoint, L.Callback): ...

    callback = qat()
    made = trainer(tmp_path, [Mine(), callback])
    with pytest.raises(TypeError, match=f"Mine: {LINE}"):
        callback.setup(made, Net(), "fit")


def test_a_callback_of_the_other_package_is_not_taken_for_one(pl: Any) -> None:
    with pytest.raises(TypeError, match=LINE):
        lfq.while_learning(pl.ModelCheckpoint())
