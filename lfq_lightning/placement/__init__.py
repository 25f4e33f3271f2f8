"""Quantizers on a model's layers: where, and how they are put there and taken off."""

from lfq_lightning.placement.attaching import apply, attach, detach, to_float
from lfq_lightning.placement.placed import PlacedLayer, PlacedOperand, Placement
from lfq_lightning.placement.planning import plan
from lfq_lightning.placement.quantized_layer import quantizers

__all__ = ["PlacedLayer", "PlacedOperand", "Placement", "apply", "attach", "detach", "plan", "quantizers", "to_float"]
