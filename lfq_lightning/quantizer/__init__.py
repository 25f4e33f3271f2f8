"""The learnable fake quantizer."""

from lfq_lightning.quantizer.learnable import LearnableFakeQuantize

__all__ = ["LearnableFakeQuantize"]
