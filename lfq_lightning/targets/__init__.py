"""What runtimes compute in integers: tables, read by what places quantizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lfq_lightning.checking import check_choice
from lfq_lightning.targets.executorch import EXECUTORCH
from lfq_lightning.targets.litert import LITERT
from lfq_lightning.targets.onnxruntime import ONNXRUNTIME
from lfq_lightning.targets.openvino import OPENVINO
from lfq_lightning.targets.target import Target
from lfq_lightning.targets.tensorrt import TENSORRT
from lfq_lightning.targets.x86 import X86

TARGETS: dict[str, Target] = {
    target.name: target for target in (ONNXRUNTIME, OPENVINO, TENSORRT, EXECUTORCH, X86, LITERT)
}


def target_of(given: str | Sequence[str] | None) -> Target | None:
    """What holds for all runtimes that are named; None for none.

    Raises:
        ValueError: for a name that is none of `TARGETS`, or for runtimes that no one network serves.
    """
    if given is None:
        return None
    names: list[Any] = [given] if isinstance(given, str) or not isinstance(given, Sequence) else list(given)
    for name in names or [given]:
        check_choice("target", name, tuple(TARGETS))
    first, *others = (TARGETS[name] for name in names)
    for other in others:
        first = first.together_with(other)
    return first


__all__ = ["TARGETS", "Target", "target_of"]
