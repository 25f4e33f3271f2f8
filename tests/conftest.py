"""What every test starts from: one thread, a fixed seed, quiet logs."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import os
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores; processes that tests start inherit it
# Inductor would start processes that compile, and try with the compiler what the processor says that it has.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # the Triton kernels then run on the CPU; this counts before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

hypothesis.settings.register_profile("no_timing", deadline=None)  # machines differ, and other tests run beside
hypothesis.settings.load_profile("no_timing")


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what the imports made stays: no later collection looks through it


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or libraries that look for leaks at the exit find all of it


@pytest.fixture(autouse=True, scope="session")
def _what_onnx_has_is_read_once() -> None:
    """Of a small export, reading the sources of onnxscript's functions takes two thirds, and again each time."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(*arguments: Any, **keywords: Any) -> ONNXRegistry:
        known = copy.copy(read(*arguments, **keywords))
        known.functions = {target: list(functions) for target, functions in known.functions.items()}
        return known

    ONNXRegistry.from_torchlib = staticmethod(from_torchlib)
