"""The bandwidth that the kernels reach, as a share of a copy within the device."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.measuring import Table
from tests.benchmarks.on_cuda import device_note, medians, needs_cuda, replayed

triton = pytest.importorskip("lfq_lightning.ops.triton")
pytestmark = needs_cuda

# Rows and columns of 2^n elements, and who shares a scale.
GRANULARITIES = {
    "one scale": (None, None),
    "per row": (0, None),
    "per column": (1, None),
    "groups of 128": (None, 128),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_bandwidth(table: Table, granularity: str, dtype: torch.dtype) -> None:
    table.name = f"cuda_bandwidth_{granularity.replace(' ', '_')}_{str(dtype).removeprefix('torch.')}"
    table.notes += [device_note(), "forward reads and writes one tensor; backward reads two and writes one"]
    axis, group_size = GRANULARITIES[granularity]
    for exponent in range(16, 29, 2):
        columns = 2 ** min(12, exponent // 2)
        rows = 2**exponent // columns
        x = torch.randn(rows, columns, device="cuda", dtype=dtype)
        dy, out = torch.randn_like(x), torch.empty_like(x)
        count = {"per row": rows, "per column": columns, "groups of 128": rows * (columns // 128)}.get(granularity, 1)
        scale, zero_point = torch.full((count,), 0.3, device="cuda"), torch.zeros(count, device="cuda")
        settings = (-8, 7, axis, group_size)
        _, qparams = triton.forward(x, scale, zero_point, *settings)

        def forward() -> object:
            return triton.forward(x, scale, zero_point, *settings)  # noqa: B023

        def backward() -> object:
            return triton.backward(dy, x, qparams, *settings, 1.0, "lsq", True, True)  # noqa: B023

        calls = {"copy": lambda: out.copy_(x), "forward": forward, "backward": backward}  # noqa: B023
        times = max(1, 2 ** (24 - exponent))
        found = {name: ms / times for name, ms in medians(_graphs(calls, times), repetitions=30).items()}
        size = x.nbytes * 1e-6  # MB a millisecond are GB a second
        rates = {"copy": 2 * size / found["copy"], "forward": 2 * size / found["forward"]}
        rates["backward"] = 3 * size / found["backward"]
        table.add(
            elements=f"2^{exponent}",
            copy_GBps=rates["copy"],
            forward_GBps=rates["forward"],
            backward_GBps=rates["backward"],
            forward_share=rates["forward"] / rates["copy"],
            backward_share=rates["backward"] / rates["copy"],
        )


def _graphs(calls, times):
    return {name: replayed(call, times) for name, call in calls.items()}
