"""The operation alone, forward and forward + backward, in multiples of a memcpy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lfq_lightning.ops import quantize
from tests.benchmarks.formula import PythonFormula
from tests.benchmarks.measuring import Call, Table, keep_freed_memory, ratios

SHAPES = [(64, 16), (3, 3, 256, 256), (16, 3, 256, 256), (64, 64, 32, 32), (512, 512, 3, 3)]
LARGE = (64, 64, 32, 32)


class Operands:
    """x, dL/dy and qparams of `bits` bits, per tensor or per channel on axis 1."""

    def __init__(self, x: Tensor, bits: int = 4, axis: int | None = None) -> None:
        self.x = x.requires_grad_()
        # Upstream gradients lie as the results do.
        self.dy = torch.empty_like(x).copy_(torch.randn(x.shape))
        self.axis = axis
        scales = 1 if axis is None else x.shape[axis]
        self.range = (0, 2**bits - 1)
        self.scale = torch.full((scales,), 6.0 / 2**bits).requires_grad_()
        self.zero_point = torch.full((scales,), float(2 ** (bits - 1))).requires_grad_()
        self.copy = torch.empty_like(x)

    def memcpy(self) -> None:
        with torch.no_grad():
            self.copy.copy_(self.x)

    def ours(self) -> Tensor:
        settings = (*self.range, self.axis, None, 1.0, "lsq")
        return quantize(self.x, self.scale, self.zero_point, settings)

    def aten(self) -> Tensor:
        if self.axis is None:
            operation = torch._fake_quantize_learnable_per_tensor_affine
            return operation(self.x, self.scale, self.zero_point, *self.range, 1.0)
        channels = torch._fake_quantize_learnable_per_channel_affine
        return channels(self.x, self.scale, self.zero_point, self.axis, *self.range, 1.0)

    def python(self) -> Tensor:
        return PythonFormula.apply(self.x, self.scale, self.zero_point, *self.range, self.axis)

    def both_ways(self, forward: Callable[[], Tensor]) -> Call:
        leaves = (self.x, self.scale, self.zero_point)
        return lambda: torch.autograd.grad(forward(), leaves, self.dy)


def measured(operands: Operands, forward: Callable[[], Tensor]) -> tuple[float, float]:
    calls = {"forward": forward, "both": operands.both_ways(forward)}
    found = ratios(calls, operands.memcpy, seconds=0.4)
    return found["forward"], found["both"]


@pytest.mark.parametrize("bits", [4, 8])
def test_operation(table: Table, bits: int) -> None:
    table.name = f"operation_{bits}_bits"
    table.notes.append("multiples of a memcpy of x: forward / forward + backward; float32, one thread")
    table.notes.append(keep_freed_memory())
    for shape in SHAPES:
        for axis in (None, 1):
            torch.compiler.reset()
            operands = Operands(torch.randn(shape), bits, axis)
            row: dict[str, str | float | None] = {
                "shape": "x".join(map(str, shape)),
                "scales": "one" if axis is None else "per channel",
            }
            compiled = torch.compile(operands.ours, fullgraph=True, dynamic=False)
            peers = {"ours": operands.ours, "aten": operands.aten, "python": operands.python, "compiled": compiled}
            for name, forward in peers.items():
                row[f"{name}_forward"], row[f"{name}_both"] = measured(operands, forward)
            pair = {"ours": operands.both_ways(operands.ours)}
            row["ours/aten_both"] = ratios(pair, operands.both_ways(operands.aten))["ours"]
            table.add(**row)


def test_operation_on_other_tensors(table: Table) -> None:
    table.name = "operation_on_other_tensors"
    table.notes.append("multiples of a memcpy of the same 16 MB, (batch, 64, 32, 32), 4 bits, one thread")
    table.notes.append(keep_freed_memory())
    tensors: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
        "contiguous": torch.randn,
        "channels_last": lambda shape: torch.randn(shape).to(memory_format=torch.channels_last),
        "transposed": lambda shape: torch.randn(shape[::-1]).permute(3, 2, 1, 0),
        "half of the channels": lambda shape: torch.randn(shape[0], 2 * shape[1], *shape[2:])[:, : shape[1]],
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        shape = (LARGE[0] * 4 // dtype.itemsize, *LARGE[1:])
        for name, make in tensors.items():
            for axis in (None, 1):
                with torch.no_grad():
                    x = make(shape).to(dtype)
                operands = Operands(x, axis=axis)
                forward, both = measured(operands, operands.ours)
                table.add(
                    dtype=str(dtype).removeprefix("torch."),
                    layout=name,
                    scales="one" if axis is None else "per channel",
                    forward=forward,
                    both=both,
                )
