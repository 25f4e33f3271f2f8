"""A model's quantizers and quantized layers, found in one walk for who asks for them again and again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lfq_lightning.placement.host import QuantizedLayer, hosts, quantizers
from lfq_lightning.quantizer import LearnableFakeQuantize


@dataclass(frozen=True)
class Found:
    """What `quantizers` and `hosts` find, by dotted name in order of registration.

    A walk through a model of thousands of layers takes a good part of a step. Nothing is remembered behind anybody's
    back: who keeps this knows when quantizers may come and go, as a run does, which attaches before it begins.
    """

    quantizers: dict[str, LearnableFakeQuantize]
    layers: dict[str, QuantizedLayer]

    @classmethod
    def in_model(cls, model: nn.Module) -> Found:
        """Walk through a model."""
        return cls(quantizers(model), hosts(model))
