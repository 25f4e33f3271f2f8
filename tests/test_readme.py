"""Every Python block of the README runs, top to bottom, as a newcomer would paste it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lfq_lightning as lfq
from tests.runs import Net, images

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


class MyModule(Net):
    """Has the layers that the README's rules speak of."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 3, padding=1)})])
        self.tokens = nn.Embedding(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)) + self.tokens.weight.sum()
        return self.head(torch.relu(self.second(self.blocks[0]["conv1"](x))).flatten(1))


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(images(16), batch_size=8)

    val_dataloader = test_dataloader = train_dataloader


def test_the_readme_has_no_open_ends() -> None:
    text = README.read_text()
    assert "TODO" not in text
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (README.parent / link).exists(), link


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
    names: dict[str, Any] = {"MyModule": MyModule, "data": data, "batches": batches, "batch": batches[0]}
    for block in BLOCKS:
        # These look at the model of the task before.
        if not any(word in block for word in ("summarize", "export_onnx")):
            names["model"] = MyModule()
        exec(compile(block, "README.md", "exec"), names)
    assert BLOCKS
