"""Small convolutional networks, and the LightningModule that trains any network as a classifier."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, cast

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the image's size at stride 1, and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = convolution(inputs, outputs, 3, stride)
        self.second = convolution(outputs, outputs, 3)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x))


class SeparableBlock(nn.Module):
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution across channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = convolution(inputs, inputs, 3, stride, groups=inputs)
        self.pointwise = convolution(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.pointwise(torch.relu(self.depthwise(x))))


class ConvolutionalNetwork(nn.Module):
    """A 3x3 stem, `depth` blocks of each width, the image halved where the width changes, and a classifier.

    Residual blocks, widths 64, 128, 256, 512 and depth 2 make ResNet-18 as it is used on CIFAR-10.
    """

    def __init__(
        self,
        block: Literal["residual", "separable"],
        channels: int,
        classes: int,
        widths: Sequence[int],
        depth: int,
    ) -> None:
        super().__init__()
        make = {"residual": ResidualBlock, "separable": SeparableBlock}[block]
        self.stem = convolution(channels, widths[0], 3)
        self.blocks = nn.Sequential()
        inputs = widths[0]
        for width in widths:
            for _ in range(depth):
                self.blocks.append(make(inputs, width, stride=1 if inputs == width else 2))
                inputs = width
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.blocks(torch.relu(self.stem(images))).mean(dim=(2, 3)))


class Classifier(L.LightningModule):
    """Any network from images to class scores, trained with cross-entropy and a cosine learning rate.

    `network` and `optimizer` are Hydra nodes and stay among the hyperparameters, so that a checkpoint rebuilds
    the whole module: `Classifier.load_from_checkpoint(path)`. What a node names is called, so load only checkpoints
    that you trust.
    """

    def __init__(
        self,
        network: dict[str, Any],
        optimizer: dict[str, Any],
        classes: int,
        learning_rate: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network: nn.Module = instantiate(network)
        self.accuracy = nn.ModuleDict(
            {stage: MulticlassAccuracy(classes, average="micro") for stage in ("fit", "val", "test")}
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss("fit", batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.loss("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.loss("test", batch)

    def loss(self, stage: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of one batch; it is logged, and so is the accuracy."""
        images, labels = batch
        scores = self(images)
        loss = nn.functional.cross_entropy(scores, labels)
        accuracy = cast(Metric, self.accuracy[stage])
        accuracy(scores, labels)
        self.log(f"{stage}/loss", loss, sync_dist=stage != "fit")
        self.log(f"{stage}/accuracy", accuracy, on_epoch=True, on_step=False, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        options = {"lr": self.hparams["learning_rate"], "weight_decay": self.hparams["weight_decay"]}
        optimizer = instantiate(self.hparams["optimizer"], self.parameters(), **options)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
