"""Whole runs on a GPU: nothing waits for the device in a step; precisions, compilation and graphs work."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.placement.quantized_layer import qparams
from lfq_lightning.training.hiding import hidden_qparams
from lfq_lightning.training.stepping.qparams import QParamOptimizer
from tests.runs import Net, images, loader, qat, trainer


class Watched(L.Callback):
    """Lets no operation wait for the device in training batches, from a step on; `stands` "first" or "last" of all."""

    def __init__(self, stands: str, after: int) -> None:
        self.stands, self.after = stands, after

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.stands == "first" and trainer.global_step >= self.after:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, *_: Any) -> None:
        if self.stands == "last":
            torch.cuda.set_sync_debug_mode("default")


def cuda_fit(directory: Path, model: L.LightningModule, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    L.seed_everything(3, verbose=False)
    made = trainer(directory, callbacks, **{"accelerator": "gpu", **options})
    made.fit(model, loader())
    return made


@pytest.mark.parametrize("optimizer", [None, "user"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_no_step_of_any_phase_waits_for_the_device(tmp_path: Path, precision: Any, optimizer: Any) -> None:
    callback = qat(record_every_n_steps=1000, optimizer=optimizer)
    watched = [Watched("first", 2), callback, Watched("last", 0)]
    model = Net()
    cuda_fit(tmp_path, model, watched, precision=precision)
    assert all((q.scale != q.scale_reference).any() for q in lfq.quantizers(model).values())


def test_a_record_waits_for_the_device_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lfq_lightning.placement.points import points
    from lfq_lightning.records.measuring import measure_weights, snapshot

    model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)]).cuda()
    lfq.attach(model, weight=4, activation=4)
    lfq.calibrate(model, [torch.randn(8, 32, device="cuda")])
    copies = 0
    to_host = Tensor.cpu

    def counted(tensor: Tensor) -> Tensor:
        nonlocal copies
        copies += 1
        torch.cuda.set_sync_debug_mode("default")
        try:
            return to_host(tensor)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(Tensor, "cpu", counted)
    torch.cuda.set_sync_debug_mode("error")
    snapshot(points(model), measure_weights(points(model))).rows(1, 0)
    assert copies == 1


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_every_precision_learns(tmp_path: Path, precision: Any) -> None:
    model = Net()
    made = cuda_fit(tmp_path, model, [qat()], precision=precision)
    for name, quantizer in lfq.quantizers(model).items():
        assert quantizer.scale.dtype is torch.float32
        assert quantizer.scale.isfinite().all(), name
        assert (quantizer.scale != quantizer.scale_reference).any(), name
    assert (made.precision_plugin.scaler is not None) if precision == "16-mixed" else True


def test_a_run_on_the_gpu_stays_near_the_run_on_the_cpu(tmp_path: Path) -> None:
    runs = []
    for accelerator in ("cpu", "gpu"):
        L.seed_everything(3, verbose=False)
        model = Net()
        cuda_fit(tmp_path / accelerator, model, [qat()], accelerator=accelerator)
        runs.append(torch.cat([p.detach().cpu().flatten() for p in qparams(model)]))
    torch.testing.assert_close(*runs, rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_model_learns_as_the_eager_one() -> None:
    torch.compiler.reset()
    torch.backends.cudnn.deterministic = True
    model = Net().cuda()
    x = images().tensors[0].cuda()
    lfq.attach(model, weight=4, activation=4)
    lfq.calibrate(model, [x])
    lfq.set_phase(model, "learn")
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True)
    for net in (model, compiled):
        net(x).square().mean().backward()
    for one, two in zip(qparams(other), qparams(model), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, two.grad, rtol=0.1, atol=1e-2 * float(two.grad.abs().max()) + 1e-6)
    torch.compiler.reset()


def test_a_cuda_graph_captures_a_training_step_up_to_the_gradients() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).cuda()
    x = torch.randn(16, 64, device="cuda")
    lfq.attach(model, weight=4, activation=4)
    lfq.calibrate(model, [x])
    lfq.set_phase(model, "learn")
    with hidden_qparams(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    owned = QParamOptimizer(model, [optimizer])
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
    torch.cuda.current_stream().wait_stream(aside)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x).square().mean().backward()
    graph.replay()
    found = [p.grad.clone() for p in qparams(model) if p.grad is not None]
    optimizer.zero_grad()
    model(x).square().mean().backward()
    expected = [p.grad for p in qparams(model) if p.grad is not None]
    assert found
    torch.testing.assert_close(found, expected)
    owned.remove()


@pytest.mark.filterwarnings("ignore")  # torch's exporter, about itself
def test_a_model_on_the_gpu_is_exported_and_stays_there(tmp_path: Path) -> None:
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    model = nn.Sequential(*layers).cuda()
    x = images().tensors[0].cuda()
    lfq.attach(model, weight=4, activation=8)
    lfq.calibrate(model, [x])
    parity = lfq.export_onnx(model, x[:8], tmp_path / "m.onnx", batches=[x])
    assert parity.agrees
    assert parity.folded == ("1",)
    assert all(p.is_cuda for p in model.parameters())
    program = lfq.export_pt2(model, x, fold=True)
    torch.testing.assert_close(program.module()(x), model.eval()(x), atol=1e-2, rtol=0)
