"""The Triton kernels, compiled as they are launched for GPUs that are not here; nothing runs.

Triton settles as it is imported whether kernels are interpreted: this is for processes with TRITON_INTERPRET=0.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from lfq_lightning.ops import triton as ops
from tests.gpu_code import Access, Instruction, accesses, instructions
from tests.samples import scales_needed

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class AbsentGPU:
    """What Triton asks of the driver before it compiles for a GPU of a compute capability, such as 90."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Resources:
    """What each thread (registers, bytes of spilled ones) and each program (bytes of shared memory) holds."""

    registers: int
    spilled: int
    shared: int


@dataclass(frozen=True)
class Launch:
    """A kernel as it would have been launched; tensors are on the meta device or hold nothing."""

    name: str
    arguments: dict[str, Any]
    programs: int
    compiled: Any

    @property
    def warps(self) -> int:
        return self.compiled.metadata.num_warps

    @property
    def ptx(self) -> str:
        return self.compiled.asm["ptx"]

    @property
    def in_memory(self) -> list[str]:
        """The arguments that the compiled kernel has, in their order: what it knows at compile time is none."""
        return [name for name, kind in self.compiled.src.signature.items() if kind != "constexpr"]

    @property
    def accesses(self) -> list[Access]:
        return accesses(self.ptx, self.in_memory)

    def as_large_as(self, x: Tensor) -> set[str]:
        """The arguments that are tensors with as many elements as x."""
        tensors = {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}
        return {name for name, value in tensors.items() if value.numel() == x.numel()}

    @cached_property
    def resources(self) -> Resources:
        found = dict(re.findall(r"\b(REG|STACK|SHARED):(\d+)", self._dumped("-res-usage")))
        return Resources(int(found["REG"]), int(found["STACK"]), int(found["SHARED"]))

    @cached_property
    def instructions(self) -> list[Instruction]:
        return instructions(self._dumped("-sass"))

    def _dumped(self, what: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.compiled.asm["cubin"])
            file.flush()
            command = [_CUOBJDUMP, what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@contextmanager
def launches(capability: int, smallest: int = 0, compiling: bool = True) -> Iterator[list[Launch]]:
    """Note what is launched within, compiled for a GPU of this compute capability, instead of running it.

    Args:
        capability: 80, 90 or 100.
        smallest: kernels of which no tensor has this many elements are passed over.
        compiling: without it, launches are counted and nothing is compiled.
    """
    found: list[Launch] = []
    run = JITFunction.run

    def note(self: JITFunction, *given: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        arguments = dict(zip(self.arg_names, given, strict=False)) | options
        if not any(isinstance(value, Tensor) and value.numel() >= smallest for value in given):
            return None
        compiled = run(self, *given, grid=grid, warmup=True, **options) if compiling else None
        found.append(Launch(self.__name__, arguments, grid[0], compiled))
        return compiled

    driver.set_active(AbsentGPU(capability))  # for good: without a GPU there is none to go back to
    with mock.patch.object(JITFunction, "run", note):
        yield found


def both_passes(
    shape: tuple[int, ...], axis: int | None, group_size: int | None, dtype: torch.dtype, saturation: str = "lsq"
) -> Tensor:
    """Launch forward and backward on tensors that hold nothing; x."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    scale = torch.empty(scales_needed(shape, axis, group_size), device="meta")
    settings = (-8, 7, axis, group_size)
    _, qparams = ops.forward(x, scale, scale, *settings)
    ops.backward(torch.empty_like(x), x, qparams, *settings, 1.0, saturation, True, True)
    return x
