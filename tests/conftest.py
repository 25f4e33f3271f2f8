"""What every test starts from: one thread, a fixed seed, quiet logs."""

from __future__ import annotations

import logging
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores; processes that tests start inherit it

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
