"""A trained model as integers: in plain torch, ONNX and `.pt2`."""

from lfq_lightning.export.freeze import freeze
from lfq_lightning.export.to_onnx import export_onnx
from lfq_lightning.export.to_pt2 import export_pt2

__all__ = ["export_onnx", "export_pt2", "freeze"]
