"""The Triton kernels compiled for GPUs that are not here, with the options of their launches: PTX and its accesses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from lfq_lightning.ops import triton_kernels as kernels
from lfq_lightning.ops.triton_launch import Launch
from tests.compiled_kernels import both_passes, launches
from tests.gpu_code import Access

# A name, the shape, the axis, the group size, and how many neighbours lie together for certain.
GRANULARITIES = {
    "one scale": ((4096, 1024), None, None, 16),
    "per row": ((4096, 1024), 0, None, 16),
    "groups of 128": ((4096, 1024), None, 128, 16),
    "768 columns": ((4096, 768), 1, None, 16),
    "1000 columns": ((4096, 1000), 1, None, 8),
    "3x3 kernels of 64 channels": ((64, 64, 3, 3), 0, None, 16),
    "runs of 3136": ((16, 64, 56, 56), 1, None, 16),
    "runs of 196": ((16, 256, 14, 14), 1, None, 4),
}
PROCESSORS = {80: "float32", 90: "bfloat16", 100: "bfloat16"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# Which elements lie together does not hang on the processor: two granularities are compiled for each of them, and the
# others for the one in between.
CASES = [(90, name, PROCESSORS[90], "lsq") for name in GRANULARITIES]
CASES += [(other, name, PROCESSORS[other], "lsq") for other in (80, 100) for name in ("one scale", "1000 columns")]
CASES += [(90, "per row", "float16", "exclusive"), (90, "per row", "float64", "inclusive")]
WORDS = ("div.rn.f32", "div.full", "fma.rn.f32", "ftz")


def report() -> None:
    """Print as JSON which launches share a kernel, and then what each launch of each case has become."""
    print(json.dumps(shared_kernels()))
    for capability, name, dtype, saturation in CASES:
        *granularity, _ = GRANULARITIES[name]
        sums_too = (capability, name) == (90, "768 columns")  # the second stage is the same for all
        with launches(capability, smallest=0 if sums_too else prod(granularity[0])) as found:
            x = both_passes(*granularity, DTYPES[dtype], saturation)
        for launch in found:
            of = launch.as_large_as(x)
            met = [access for access in launch.accesses if access.argument in {*of, "unknown"}]
            count = {word: len(re.findall(re.escape(word), launch.ptx)) for word in WORDS}
            case = {"capability": capability, "granularity": name, "dtype": dtype}
            print(json.dumps({**case, "kernel": launch.name, "large": sorted(of), "met": met, **count}))


def shared_kernels() -> list[bool]:
    """Whether a compiled kernel can be launched anew, and which of several launches share the first one's."""
    x = torch.empty(64)
    settings = {"CHANNELS": 1, "BLOCK": 16, "NEED_SCALE": True, "NEED_ZERO_POINT": True, "num_warps": 4}
    launch = Launch(kernels.add_up_kernel, 1, (1, 16, 1), settings, device=-1)
    with launches(90) as found:
        for tensor, number in ((x, 0.5), (x[4:], 1.0), (x[1:], 0.5), (x[2:], 0.5)):
            launch((tensor, *[x] * 4), number)
    first, *others = (each.compiled for each in found)
    lasting = first.metadata.target.backend == "cuda" and first.packed_metadata is not None
    return [lasting, *(other is first for other in others)]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    cache = tmp_path_factory.mktemp("triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    found = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import report; report()"],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert found.returncode == 0, found.stderr
    return [json.loads(line) for line in found.stdout.splitlines()]


@pytest.fixture
def compiled(printed: list[Any]) -> list[dict[str, Any]]:
    return printed[1:]


def test_float32_is_divided_as_ieee_and_nothing_is_contracted_or_flushed(compiled: list[dict[str, Any]]) -> None:
    for kernel in compiled:
        assert (kernel["div.full"], kernel["fma.rn.f32"], kernel["ftz"]) == (0, 0, 0), kernel
        assert not kernel["large"] or kernel["div.rn.f32"] > 0, kernel


def test_as_many_bytes_move_at_once_as_the_granularity_allows(compiled: list[dict[str, Any]]) -> None:
    passes = [kernel for kernel in compiled if kernel["large"]]
    assert len(passes) == 2 * len(CASES)
    narrow = []
    for kernel in passes:
        *_, neighbours = GRANULARITIES[kernel["granularity"]]
        met = [Access(*access) for access in kernel["met"]]
        assert {access.argument for access in met} == set(kernel["large"]), kernel
        assert len({access.argument for access in met if access.stores}) == 1, kernel  # y or dx
        if min(access.bits for access in met) < min(128, neighbours * DTYPES[kernel["dtype"]].itemsize * 8):
            narrow.append(kernel)
    assert not narrow


def test_triton_compiles_another_kernel_for_other_alignments_alone(printed: list[Any]) -> None:
    lasting, numbers_and_aligned, unaligned, unaligned_otherwise = printed[0]
    assert lasting
    assert numbers_and_aligned
    assert not unaligned
    assert not unaligned_otherwise
