"""Which implementation of the operations serves a tensor, and why."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from lfq_lightning.ops import native, reference
from lfq_lightning.private import ENVIRONMENT, environment_key

_NAMES = ("reference", "native", "triton")

_VARIABLE = environment_key("LFQ_BACKEND")


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
        A dictionary such as `{"cpu": "native", "cuda": "triton"}` with a `reasons` attribute.

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
    if torch.compiler.is_compiling():
        # Inductor fuses plain torch on the CPU; on CUDA its division is approximate.
        name, forced = _constant(x.device.type)
        if name != "triton":
            return reference
        module = _module(name)
    elif x.is_cpu or x.is_cuda:
        forced = os.environ["LFQ_BACKEND"] if _VARIABLE in ENVIRONMENT else None
        module = _serving("cpu" if x.is_cpu else "cuda", forced)
    else:
        return reference
    if module is reference or module.serves(x):
        return module
    if forced is not None and module is _module(forced):
        raise RuntimeError(
            f"LFQ_BACKEND={forced} serves plain strided tensors of {', '.join(map(str, native.DTYPES))}. Found "
            f"{type(x).__name__} of {x.dtype}: unset it to let plain torch serve this tensor."
        )
    return reference


@lru_cache
def _serving(device: str, forced: str | None) -> ModuleType:
    return _module(_choose_and_warn(device, forced)[0])


def _module(name: str) -> ModuleType:
    if name == "triton":
        from lfq_lightning.ops import triton

        return triton
    return native if name == "native" else reference


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant(device: str) -> tuple[str, str | None]:
    """What serves a device, which compiled code looks up once, and what is forced."""
    if torch.onnx.is_in_onnx_export():
        warnings.warn(
            "torch.onnx.export writes quantizers as operations in float: runtimes see nothing quantized in that file, "
            "and no integers. Use `lfq_lightning.export_onnx`, which writes QuantizeLinear and integer weights.",
            stacklevel=2,
        )
    forced = os.environ.get("LFQ_BACKEND")
    return (_choose_and_warn(device, forced)[0] if device in ("cpu", "cuda") else "reference"), forced


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
    if forced == "reference":
        return "reference", "forced by LFQ_BACKEND"
    if device == "cuda" or forced == "triton":
        return _choose_triton(device, forced)
    try:
        native.library()
    except ImportError as error:
        if forced == "native":
            raise RuntimeError(f"LFQ_BACKEND=native cannot run: {error}") from error
        return "reference", str(error)
    return "native", "forced by LFQ_BACKEND" if forced else "the compiled extension is loaded"


def _choose_triton(device: str, forced: str | None) -> tuple[str, str]:
    # Imported where it is wanted: Triton is slow to import, and not everywhere.
    try:
        from lfq_lightning.ops import triton
    except ImportError as error:
        reason = f"the Triton kernels cannot be loaded ({error}): `pip install triton`"
    else:
        if device == "cuda" or triton.INTERPRETED:
            return "triton", "forced by LFQ_BACKEND" if forced == "triton" else "Triton is installed"
        reason = "its kernels are for CUDA; unset it, or set TRITON_INTERPRET=1 before Python starts to test them here"
    if forced == "triton":
        raise RuntimeError(f"LFQ_BACKEND=triton cannot run on {device}: {reason}")
    return "reference", reason
