"""A float teacher for a quantized module, and how both are listened to."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
from torch import nn

from lfq_lightning.placement import to_float
from lfq_lightning.private import trainer_of


class Calls:
    """A forward hook that keeps what a module was called with and gave, while it is open."""

    def __init__(self) -> None:
        self.open = False
        self.kept: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.open:
            self.kept.append((args, kwargs, output))


def float_copy(module: L.LightningModule) -> L.LightningModule:
    """A copy of a module without quantizers, gradients and Trainer, in eval mode."""
    trainer = trainer_of(module)
    made = copy.deepcopy(module, {id(trainer): None})
    to_float(made)
    return made.requires_grad_(False).eval()
