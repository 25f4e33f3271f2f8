"""Which implementation serves a tensor is said, can be forced, and never fails in silence."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch

import lfq_lightning as lfq
from tests.processes import run_python
from tests.samples import BACKENDS, INTERPRETED, on

PACKAGE = Path(lfq.__file__).parent

USE = """
import warnings
import torch
import lfq_lightning as lfq

def use():
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    scale = torch.tensor([0.3], requires_grad=True)
    y = lfq.fake_quantize(x, scale, torch.tensor([1.0]), quant_min=-4, quant_max=3)
    y.sum().backward()
    return [y.tolist(), x.grad.tolist(), scale.grad.tolist()]
"""


def python(
    code: str, output: Path, directory: Path = PACKAGE.parent, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own that finds the package in this directory."""
    variables = {k: v for k, v in os.environ.items() if k != "LFQ_BACKEND"} | environment
    return run_python("-c", USE + code, cwd=directory, directory=output, environment=variables)


def result() -> list[list[float]]:
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    scale = torch.tensor([0.3], requires_grad=True)
    y = lfq.fake_quantize(x, scale, torch.tensor([1.0]), quant_min=-4, quant_max=3)
    y.sum().backward()
    return [t.tolist() for t in (y, x.grad, scale.grad) if t is not None]


@pytest.mark.quick
def test_native_serves_the_cpu_and_the_reasons_are_printed() -> None:
    backends = lfq.backends()
    assert backends["cpu"] == "native"
    assert set(backends) == set(backends.reasons) == {"cpu", "cuda"}
    lines = str(backends).splitlines()
    assert lines[0] == f"cpu: native ({backends.reasons['cpu']})"
    assert lines[1].startswith(f"cuda: {backends['cuda']} (")
    assert all(backends.reasons.values())


@pytest.mark.quick
@pytest.mark.parametrize("name", BACKENDS)
def test_the_variable_forces_a_backend_which_is_the_one_that_computes(name: str) -> None:
    expected = result()
    module = importlib.import_module(f"lfq_lightning.ops.{name}")
    with (
        on(name),
        mock.patch.object(module, "forward", side_effect=module.forward) as forward,
        mock.patch.object(module, "backward", side_effect=module.backward) as backward,
    ):
        for found, known in zip(result(), expected, strict=True):
            assert found == pytest.approx(known)
        assert lfq.backends()["cpu"] == name
        assert "LFQ_BACKEND" in lfq.backends().reasons["cpu"]
    forward.assert_called_once()
    backward.assert_called_once()


@pytest.mark.quick
def test_a_backend_that_does_not_exist_is_refused() -> None:
    with on("nonsense"):
        for call in (lfq.backends, result):
            with pytest.raises(RuntimeError, match=r"must be one of reference, native, triton\. Found 'nonsense'"):
                call()


REFUSED = """
__import__("os").environ["LFQ_BACKEND"] = "triton"
for call in (use, lfq.backends):
    try:
        call()
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton")
def test_triton_serves_cuda_is_loaded_for_it_alone_and_refuses_the_cpu_when_it_is_forced(tmp_path: Path) -> None:
    found = python(
        """
use()
print("lfq_lightning.ops.triton" in __import__("sys").modules)
print(lfq.backends()["cuda"])
"""
        + REFUSED,
        tmp_path,
        TRITON_INTERPRET="0",
    )
    loaded, name, *refusals = found.stdout.splitlines()
    assert (loaded, name) == ("False", "triton"), found.stderr
    assert len(refusals) == 2
    assert all(refusal.startswith("LFQ_BACKEND=triton cannot run on cpu: its kernels are") for refusal in refusals)


def test_without_triton_cuda_runs_in_plain_torch_and_warns_once_with_the_remedy(tmp_path: Path) -> None:
    found = python(
        """
import sys; sys.modules["triton"] = None
from lfq_lightning.ops.backends import select

class OnCuda:
    is_cpu, is_cuda = False, True

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(select(OnCuda()).__name__, select(OnCuda()).__name__)
print(lfq.backends())
print(len(caught), caught[0].message)
"""
        + REFUSED,
        tmp_path,
    )
    assert found.returncode == 0, found.stderr
    chosen, _, cuda, warning, *refusals = found.stdout.splitlines()
    assert chosen == "lfq_lightning.ops.reference lfq_lightning.ops.reference"
    assert cuda.startswith("cuda: reference (the Triton kernels cannot be loaded")
    assert warning.startswith("1 fake quantization on cuda runs in plain torch, which is slow: the Triton kernels")
    assert warning.endswith("`pip install triton`")
    assert len(refusals) == 2
    assert all(r.startswith("LFQ_BACKEND=triton cannot run on cpu: the Triton kernels cannot be") for r in refusals)


@pytest.mark.parametrize("name", BACKENDS[1:])
def test_kernels_refuse_a_tensor_that_they_cannot_serve_when_they_are_forced(name: str) -> None:
    x = torch.ones(3).to(torch.float8_e4m3fn)
    with on(name), pytest.raises(RuntimeError, match=rf"LFQ_BACKEND={name}.*float8_e4m3fn"):
        lfq.fake_quantize(x, torch.ones(1), torch.zeros(1), quant_min=-8, quant_max=7)


def test_a_tensor_that_native_does_not_serve_runs_in_plain_torch() -> None:
    x = torch.tensor([0.4, 2.75, 96.0]).to(torch.float8_e4m3fn)
    y = lfq.fake_quantize(x, torch.ones(1), torch.zeros(1), quant_min=-8, quant_max=7)
    assert y.dtype is torch.float8_e4m3fn
    assert y.float().tolist() == [0.0, 3.0, 7.0]


def test_the_variable_is_read_in_a_fresh_process_and_the_extension_adds_no_openmp_runtime(tmp_path: Path) -> None:
    found = python(
        """
from lfq_lightning.ops.native import openmp_runtimes
print(use(), lfq.backends()["cpu"], len(openmp_runtimes()))
torch.set_num_threads(2)
y = lfq.fake_quantize(torch.randn(10**6), torch.ones(1), torch.zeros(1), quant_min=-4, quant_max=3)
print(len(openmp_runtimes()))
""",
        tmp_path,
        LFQ_BACKEND="native",
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [f"{result()} native 1", "1"]


def test_without_the_extension_it_warns_once_with_the_remedy_and_computes_the_same(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    found = python(
        """
assert lfq.__file__.startswith(__import__("os").getcwd()), lfq.__file__
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first, second = use(), use()
assert first == second
print(first)
print(lfq.backends())
print(len(caught), caught[0].category.__name__, caught[0].message)
import os
os.environ["LFQ_BACKEND"] = "native"
try:
    use()
except RuntimeError as error:
    print(error)
""",
        tmp_path,
        tmp_path,
    )
    assert found.returncode == 0, found.stderr
    values, cpu, _, warning, refusal = found.stdout.splitlines()
    assert values == str(result())
    assert cpu.startswith("cpu: reference (the native extension was not built")
    assert warning.startswith("1 UserWarning")
    assert "pip install" in warning
    assert refusal.startswith("LFQ_BACKEND=native cannot run: the native extension was not built")
