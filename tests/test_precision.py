"""Numbers of other kinds: gradient scaling, half precision, and layers that run twice."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, TransformerEnginePrecision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lfq_lightning as lfq
from tests.runs import BATCHES, Net, every_epoch, fit, qat, trainer


def scaled() -> dict[str, Any]:
    """Float16 with a GradScaler, on the CPU."""
    return {"plugins": MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))}


def moves(model: nn.Module) -> dict[str, Tensor]:
    """How far each scale went from its estimate, relative to it."""
    return {n: (q.scale / q.scale_reference - 1).detach() for n, q in lfq.quantizers(model).items()}


def seeded(kind: type[Net]) -> Net:
    torch.manual_seed(3)
    return kind()


class Plain(Net):
    """The net under plain SGD: unlike Adam's, its steps show a wrong factor in the gradient."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=30.0), "user"])
def test_qparams_learn_from_unscaled_gradients_under_a_gradient_scaler(tmp_path: Path, optimizer: Any) -> None:
    exact, _, _ = fit(tmp_path / "a", seeded(Plain), callback=qat(optimizer=optimizer), limit_val_batches=0)
    half, made, _ = fit(
        tmp_path / "b", seeded(Plain), callback=qat(optimizer=optimizer), limit_val_batches=0, **scaled()
    )
    assert made.precision_plugin.scaler.get_scale() == 1024.0
    expected, found = (torch.cat([moved.flatten() for moved in moves(m).values()]) for m in (exact, half))
    assert expected.abs().max() > 1e-3
    assert (found - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("optimizer", [None, "user"])
def test_a_step_that_the_scaler_skips_moves_no_qparam(tmp_path: Path, optimizer: Any) -> None:
    scales: list[Tensor] = []

    class Overflows(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * torch.inf if batch_idx == 5 else loss

        def on_train_batch_end(self, *_: Any) -> None:
            scales.append(torch.cat([q.scale.detach() for q in lfq.quantizers(self).values()]))

    fit(tmp_path, seeded(Overflows), callback=qat(optimizer=optimizer), limit_val_batches=0, **scaled())
    learning = scales[2 * BATCHES :]
    same = [torch.equal(a, b) for a, b in pairwise(learning)]
    assert same == [False] * 4 + [True] + [False] * 2
    assert all(scale.isfinite().all() for scale in learning)


def test_a_scaled_run_resumes_bit_equal(tmp_path: Path) -> None:
    def options() -> dict[str, Any]:
        return {"callbacks": [every_epoch(tmp_path)], "max_epochs": 4, "callback": qat(), **scaled()}

    whole, _, _ = fit(tmp_path / "whole", **options())
    part, _, _ = fit(tmp_path / "part", ckpt_path=tmp_path / "epoch=2.ckpt", **options())
    for name, quantizer in lfq.quantizers(whole).items():
        assert torch.equal(quantizer.scale, lfq.quantizers(part)[name].scale), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_observes_each_batch_once(tmp_path: Path, reentrant: bool) -> None:
    class Recomputed(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x)).requires_grad_(self.training)
            x = checkpoint(self.second, x, use_reentrant=reentrant) if self.training else self.second(x)
            return self.head(torch.relu(x).flatten(1))

    class Once(Recomputed):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.second(torch.relu(self.first(x)))).flatten(1))

    again, once = (fit(tmp_path / kind.__name__, seeded(kind))[0] for kind in (Recomputed, Once))
    for name, quantizer in lfq.quantizers(once).items():
        other = lfq.quantizers(again)[name]
        assert torch.equal(quantizer.observer.maximum, other.observer.maximum), name
        assert torch.equal(quantizer.scale_reference, other.scale_reference), name
        torch.testing.assert_close(quantizer.scale, other.scale, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("plugin", [BitsandbytesPrecision, TransformerEnginePrecision])
def test_precisions_that_replace_layers_are_refused(tmp_path: Path, plugin: type) -> None:
    made, model = trainer(tmp_path, [qat()]), Net()
    made.strategy._precision_plugin = object.__new__(plugin)  # the packages that they need are not installed
    with pytest.raises(ValueError, match=f"{plugin.__name__} replaces Linear layers"):
        made.fit(model)
    assert not lfq.quantizers(model)
