"""Which implementation of the operations serves a tensor, and why."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from lfq_lightning.ops import native, reference

_NAMES = ("reference", "native", "triton")


class Backends(dict[str, str]):
    """Device type to implementation; `reasons` says why, and printing shows both."""

    def __init__(self, chosen: dict[str, str], reasons: dict[str, str]) -> None:
        super().__init__(chosen)
        self.reasons = reasons

    def __str__(self) -> str:
        return "\n".join(f"{device}: {name} ({self.reasons[device]})" for device, name in self.items())


def backends() -> Backends:
    """Say which implementation serves each device, and why.

    Returns:
        A dictionary such as `{"cpu": "native", "cuda": "reference"}` with a `reasons` attribute.

    Raises:
        RuntimeError: if the environment variable `LFQ_BACKEND` forces an implementation that cannot run here.

    Example:
        >>> import lfq_lightning as lfq
        >>> lfq.backends()["cpu"]
        'native'
    """
    chosen, reasons = {}, {}
    for device in ("cpu", "cuda"):
        chosen[device], reasons[device] = _choose(device, os.environ.get("LFQ_BACKEND"))
    return Backends(chosen, reasons)


def select(x: Tensor) -> ModuleType:
    """The module whose `forward` and `backward` serve this tensor.

    Raises:
        RuntimeError: if `LFQ_BACKEND` forces one that cannot.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        forced = os.environ.get("LFQ_BACKEND")
        name, _ = _choose_and_warn("cpu", forced)
        if name == "native":
            if native.serves(x):
                return native
            if forced == "native":
                raise RuntimeError(
                    f"LFQ_BACKEND=native serves plain strided tensors of {', '.join(map(str, native.DTYPES))}. Found "
                    f"{type(x).__name__} of {x.dtype}: unset it to let plain torch serve this tensor."
                )
    return reference


@lru_cache
def _choose_and_warn(device: str, forced: str | None) -> tuple[str, str]:
    name, reason = _choose(device, forced)
    if forced is None and name == "reference":
        warnings.warn(f"fake quantization on {device} runs in plain torch, which is slow: {reason}", stacklevel=2)
    return name, reason


@lru_cache
def _choose(device: str, forced: str | None) -> tuple[str, str]:
    if forced is not None and forced not in _NAMES:
        raise RuntimeError(f"LFQ_BACKEND must be one of {', '.join(_NAMES)}. Found {forced!r}: unset it or correct it.")
    if forced == "triton":
        raise RuntimeError("LFQ_BACKEND=triton cannot run: this version has no Triton kernels. Unset it.")
    if forced == "reference":
        return "reference", "forced by LFQ_BACKEND"
    if device == "cuda":
        return "reference", "no kernels for this device yet; plain torch operations are used"
    try:
        native.library()
    except ImportError as error:
        if forced == "native":
            raise RuntimeError(f"LFQ_BACKEND=native cannot run: {error}") from error
        return "reference", str(error)
    return "native", "forced by LFQ_BACKEND" if forced else "the compiled extension is loaded"
