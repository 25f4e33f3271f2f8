"""Assertions with names, shared by every test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def case(**named: Any) -> Iterator[None]:
    """Within a loop over cases: a failure says which one it was."""
    try:
        yield
    except Exception as error:
        error.add_note("in the case " + ", ".join(f"{name}={value}" for name, value in named.items()))
        raise


def assert_bit_equal(found: Tensor, expected: Tensor) -> None:
    """The same dtype, shape and bits, so that 0.0 differs from -0.0; any NaN equals any other."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    found, expected = found.detach().contiguous(), expected.detach().contiguous()
    integer = _INTEGERS[found.dtype.itemsize]
    different = (found.view(integer) != expected.view(integer)) & ~(found.isnan() & expected.isnan())
    if different.any():
        at = different.flatten().nonzero()[:5, 0]
        raise AssertionError(
            f"{int(different.sum())} of {different.numel()} elements differ, first at {at.tolist()}: found "
            f"{found.flatten()[at].tolist()}, expected {expected.flatten()[at].tolist()}"
        )


def assert_no_negative_zero(y: Tensor) -> None:
    assert not (torch.signbit(y) & (y == 0)).any()


def assert_on_grid(y: Tensor, scale: float, zero_point: float, quant_min: int, quant_max: int) -> None:
    """Every element is (q - zero_point) * scale for an integer q of the range."""
    codes = (y.double() / scale).round()
    torch.testing.assert_close(codes * scale, y.double(), rtol=1e-6, atol=0.0)
    assert codes.min() + zero_point >= quant_min
    assert codes.max() + zero_point <= quant_max


def assert_strides_kept(y: Tensor, x: Tensor) -> None:
    """y lies in memory as x does; x is dense, and the stride of a dimension of length 1 has no meaning."""
    longer = [d for d in range(x.ndim) if x.shape[d] != 1]
    assert [y.stride(d) for d in longer] == [x.stride(d) for d in longer]


def assert_sums(found: Tensor, terms: Tensor, magnitudes: Tensor, factor: float = 1.0) -> None:
    """`found` is `factor` times sums of terms, with an error of at most 1e-5 of the sums of their magnitudes."""
    assert found.dtype is torch.float32
    assert found.shape == terms.shape
    error = (found.double() - factor * terms).abs()
    allowed = 1e-5 * abs(factor) * magnitudes
    assert (error <= allowed).all(), f"found {found}, expected {factor * terms}, error {error}, allowed {allowed}"
