"""What runtimes compute in integers: tables, read by what places quantizers."""

from lfq_lightning.targets.onnxruntime import ONNXRUNTIME
from lfq_lightning.targets.target import Target

TARGETS: dict[str, Target] = {target.name: target for target in (ONNXRUNTIME,)}

__all__ = ["TARGETS", "Target"]
