"""A trained model as integers: in plain torch, ONNX and `.pt2`."""

from lfq_lightning.export.bench import bench
from lfq_lightning.export.freeze import freeze
from lfq_lightning.export.to_onnx import export_onnx, float_file
from lfq_lightning.export.to_pt2 import export_pt2

__all__ = ["bench", "export_onnx", "export_pt2", "float_file", "freeze"]
