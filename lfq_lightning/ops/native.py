"""The compiled CPU kernels, called through ctypes on data pointers."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import struct
from dataclasses import astuple
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lfq_lightning.ops.layout import Layout, lay_out, view

DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_SATURATIONS = {"lsq": 0, "exclusive": 1, "inclusive": 2}


# Elements below which threads cost more than they bring, and asking how many there are costs more than it tells.
_SERIAL = 32768

# The arguments of one call as the kernels' structs, native.cpp's Forward and Backward: packed, they cost ctypes one
# conversion instead of eleven.
_pack_forward = struct.Struct("@6P2fi").pack
_pack_backward = struct.Struct("@8Pf2i").pack


class _Layout(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("dtype", *Layout.__dataclass_fields__)] + [
        ("view", ctypes.c_void_p)
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
    for function in (loaded.lfq_forward, loaded.lfq_backward):
        function.restype = None  # and no argtypes: bytes pass as their address without being asked for
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
    return type(x) in _PLAIN and x.dtype in DTYPES and x.layout is torch.strided and not x.is_neg()


class Prepared:
    """All about tensors of one shape, strides, dtype and granularity that no call needs to find out again."""

    def __init__(
        self,
        shape: torch.Size,
        stride: tuple[int, ...],
        dtype: torch.dtype,
        axis: int | None,
        group_size: int | None,
        scales: int,
    ) -> None:
        # What torch's own elementwise operations on such a tensor would give.
        self.stride = torch.empty_like(torch.empty_strided(shape, stride, device="meta")).stride()
        dense, layout = self.stride, lay_out(shape, self.stride, axis, group_size, scales)
        if layout is None:
            dense = torch.empty(shape, device="meta").stride()
            layout = lay_out(shape, dense, axis, group_size, scales)
            assert layout is not None
        self.dense, self.in_place = dense, dense == self.stride
        self.large, self.many = layout.numel >= _SERIAL, scales > 1
        self._view = _view(shape, stride, dense)
        self._structure = _Layout(DTYPES[dtype], *astuple(layout), _address(self._view))
        self.layout = ctypes.addressof(self._structure)
        # torch.empty_like of these is what costs least, and the default dtype and device have no say in it.
        self.scales = torch.empty(scales, dtype=torch.float32, device="cpu")
        self.qparams = torch.empty((3, scales), dtype=torch.float32, device="cpu")
        self.forward, self.backward = library().lfq_forward, library().lfq_backward

    @staticmethod
    def contiguous(x: Tensor) -> Tensor:
        """What the kernels write where groups are not runs of x's memory."""
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    def laid_out(self, result: Tensor) -> Tensor:
        """The result with the strides that torch would give it."""
        return result.new_empty_strided(result.shape, self.stride).copy_(result)


_prepared = lru_cache(maxsize=4096)(Prepared)


@lru_cache(maxsize=4096)
def _view(shape: torch.Size, stride: tuple[int, ...], dense: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64] | None:
    found = view(shape, stride, dense)
    return None if found is None else (ctypes.c_int64 * len(found))(*found)


def _address(array: ctypes.Array[ctypes.c_int64] | None) -> int:
    return 0 if array is None else ctypes.addressof(array)


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
    ready = _prepared(x.shape, x.stride(), x.dtype, axis, group_size, scale.numel())
    y = torch.empty_like(x) if ready.in_place else ready.contiguous(x)
    qparams = torch.empty_like(ready.qparams)
    if ready.many:
        scale, zero_point = scale.contiguous(), zero_point.contiguous()
    if scale.is_neg() or zero_point.is_neg():
        scale, zero_point = scale.resolve_neg(), zero_point.resolve_neg()
    ready.forward(
        _pack_forward(
            ready.layout,
            x.data_ptr(),
            y.data_ptr(),
            scale.data_ptr(),
            zero_point.data_ptr(),
            qparams.data_ptr(),
            quant_min,
            quant_max,
            torch.get_num_threads() if ready.large else 1,
        )
    )
    return (y if ready.in_place else ready.laid_out(y)), qparams


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
    ready = _prepared(x.shape, x.stride(), x.dtype, axis, group_size, qparams.shape[1])
    if dy.dtype is not x.dtype or dy.is_neg():
        dy = dy.to(x.dtype).resolve_neg()
    stride = dy.stride()
    dy_view = None if stride == ready.dense else _view(x.shape, stride, ready.dense)
    dx = torch.empty_like(x) if ready.in_place else ready.contiguous(x)
    d_scale = torch.empty_like(ready.scales) if need_scale else None
    d_zero_point = torch.empty_like(ready.scales) if need_zero_point else None
    ready.backward(
        _pack_backward(
            ready.layout,
            dy.data_ptr(),
            _address(dy_view),
            x.data_ptr(),
            dx.data_ptr(),
            qparams.data_ptr(),
            0 if d_scale is None else d_scale.data_ptr(),
            0 if d_zero_point is None else d_zero_point.data_ptr(),
            grad_factor,
            _SATURATIONS[saturation],
            torch.get_num_threads() if ready.large else 1,
        )
    )
    return (dx if ready.in_place else ready.laid_out(dx)), d_scale, d_zero_point
