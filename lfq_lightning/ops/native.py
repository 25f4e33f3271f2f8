"""The compiled CPU kernels, called through ctypes on data pointers."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lfq_lightning.ops.layout import Layout, plan

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_SATURATIONS = {"lsq": 0, "exclusive": 1, "inclusive": 2}


class _Layout(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("channels", "numel", "segments", "groups", "row", "chunk", "width", "repeat")
    ]


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The extension, bound to the OpenMP runtime that torch has loaded.

    Raises:
        ImportError: if the extension was not built or cannot be loaded, with the remedy.
    """
    spec = importlib.util.find_spec("lfq_lightning.ops._native")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the native extension was not built: install a C++17 compiler with OpenMP (`apt install g++`) and run "
            "`pip install --force-reinstall --no-deps lfq_lightning`"
        )
    # The extension names no OpenMP library of its own: with torch's made global, its symbols resolve there, and the
    # process has one runtime and one pool of threads.
    for path in openmp_runtimes():
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    try:
        loaded = ctypes.CDLL(spec.origin)
    except OSError as error:
        raise ImportError(f"the native extension {spec.origin} does not load: {error}") from error
    p, i, f = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    loaded.lfq_forward.argtypes = [i, p, p, p, p, p, p, f, f, i]
    loaded.lfq_backward.argtypes = [i, p, p, p, p, p, p, p, i, f, i]
    loaded.lfq_forward.restype = loaded.lfq_backward.restype = None
    return loaded


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes that this process has loaded; torch brings one."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "/" in line}
    else:
        loaded = {str(path) for path in (Path(torch.__file__).parent / "lib").iterdir()}
    return sorted(path for path in loaded if re.match(r"lib(gomp|iomp5|omp)\b", Path(path).name))


def serves(x: Tensor) -> bool:
    """Whether the kernels read this tensor: plain, strided, on the CPU, of one of four dtypes."""
    return (
        x.dtype in DTYPES and x.layout is torch.strided and type(x) in (Tensor, torch.nn.Parameter) and not x.is_neg()
    )


def forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    group_size: int | None,
) -> tuple[Tensor, Tensor]:
    """See `reference.forward`; the second result is s, low and high, shape (3, scales)."""
    layout = plan(x.shape, x.stride(), axis, group_size, scale.numel())
    if layout is None:
        y, qparams = forward(_dense(x, group_size), scale, zero_point, quant_min, quant_max, axis, group_size)
        return _like(y, x), qparams
    y = torch.empty_like(x)
    # Made of a tensor, not by torch.empty: the default dtype and device may be others, and the kernels trust pointers.
    qparams = scale.new_empty((3, layout.channels))
    scale, zero_point = scale.contiguous(), zero_point.contiguous()
    library().lfq_forward(
        DTYPES[x.dtype],
        x.data_ptr(),
        y.data_ptr(),
        scale.data_ptr(),
        zero_point.data_ptr(),
        qparams.data_ptr(),
        _pointer(layout),
        quant_min,
        quant_max,
        torch.get_num_threads(),
    )
    return y, qparams


def backward(
    dy: Tensor,
    x: Tensor,
    qparams: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    group_size: int | None,
    grad_factor: float,
    saturation: str,
    need_scale: bool,
    need_zero_point: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `reference.backward`."""
    scales = qparams.shape[1]
    layout = plan(x.shape, x.stride(), axis, group_size, scales)
    if layout is None:
        same = (quant_min, quant_max, axis, group_size, grad_factor, saturation, need_scale, need_zero_point)
        dx, *rest = backward(dy, _dense(x, group_size), qparams, *same)
        return _like(dx, x), *rest
    if dy.stride() != x.stride() or dy.dtype != x.dtype or dy.is_neg():
        dy = torch.empty_like(x).copy_(dy)
    dx = torch.empty_like(x)
    d_scale = qparams.new_empty(scales) if need_scale else None
    d_zero_point = qparams.new_empty(scales) if need_zero_point else None
    library().lfq_backward(
        DTYPES[x.dtype],
        dy.data_ptr(),
        x.data_ptr(),
        dx.data_ptr(),
        qparams.data_ptr(),
        None if d_scale is None else d_scale.data_ptr(),
        None if d_zero_point is None else d_zero_point.data_ptr(),
        _pointer(layout),
        _SATURATIONS[saturation],
        grad_factor,
        torch.get_num_threads(),
    )
    return dx, d_scale, d_zero_point


def _dense(x: Tensor, group_size: int | None) -> Tensor:
    """A copy of x without gaps, in the order of the dimensions that the kernels take."""
    return x.contiguous() if group_size is not None else torch.empty_like(x).copy_(x)


def _like(result: Tensor, x: Tensor) -> Tensor:
    """The result as torch's own elementwise operations on x would lay it out."""
    out = torch.empty_like(x)
    return result if out.stride() == result.stride() else out.copy_(result)


@lru_cache(maxsize=4096)
def _pointer(layout: Layout) -> ctypes.c_void_p:
    structure = _Layout(
        **{name: getattr(layout, name) for name, _ in _Layout._fields_}  # type: ignore[misc]
    )
    pointer = ctypes.cast(ctypes.pointer(structure), ctypes.c_void_p)
    pointer.structure = structure  # type: ignore[attr-defined]  # keeps the memory alive
    return pointer
