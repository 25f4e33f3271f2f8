"""Quantizers on a model's layers: where, and how they are put there and taken off."""

from lfq_lightning.placement.attaching import PlacedLayer, Placement, apply, attach, detach, plan
from lfq_lightning.placement.host import quantizers

__all__ = ["PlacedLayer", "Placement", "apply", "attach", "detach", "plan", "quantizers"]
