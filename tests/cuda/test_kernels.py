"""The compiled Triton kernels equal the native ones bit for bit, wherever and however large the tensors are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lfq_lightning as lfq
from tests.assertions import assert_bit_equal, assert_strides_kept
from tests.samples import (
    DENSE,
    DTYPES,
    GRIDS,
    LAYOUTS,
    SATURATIONS,
    Case,
    Grid,
    adversarial,
    cases,
    every_half,
    scales_needed,
)

SHAPES = [
    ((100_003,), {}),
    ((4096, 768), {"axis": 0}),
    ((64, 64, 7, 7), {"axis": 1}),
    ((8, 64, 56, 56), {"axis": 1}),
    ((512, 300), {"axis": 1}),
    ((1000, 3), {"axis": 1}),
    ((256, 200), {"group_size": 64}),
    ((256, 256, 3, 3), {"group_size": 32}),
]


def forward_and_backward(
    x: Tensor, dy: Tensor, scale: Tensor, zero_point: Tensor, device: str, **arguments: Any
) -> list[Tensor]:
    inputs = [t.detach().to(device).requires_grad_() for t in (x, scale, zero_point)]
    y = lfq.fake_quantize(*inputs, **arguments)
    return [t.detach().cpu() for t in (y, *torch.autograd.grad(y, inputs, dy.to(device)))]


def assert_devices_agree(x: Tensor, dy: Tensor, scale: Tensor, zero_point: Tensor, **arguments: Any) -> None:
    """y and dL/dx to the bit; sums of gradients to 1e-5 of an upper limit of the sum of their terms' magnitudes."""
    found, expected = (
        forward_and_backward(x, dy, scale, zero_point, device, **arguments) for device in ("cuda", "cpu")
    )
    assert_bit_equal(found[0], expected[0])
    assert_bit_equal(found[1], expected[1])
    span = arguments["quant_max"] - arguments["quant_min"]
    terms = dy.float().abs().sum() / len(scale) * 4
    assert ((found[2] - expected[2]).abs() <= 1e-5 * terms * span).all()
    assert ((found[3] - expected[3]).abs() <= 1e-5 * terms * scale).all()


def test_the_kernels_are_the_compiled_ones() -> None:
    from lfq_lightning.ops import triton

    assert lfq.backends()["cuda"] == "triton"
    assert not triton.INTERPRETED, "TRITON_INTERPRET must not be set"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_forward_equals_the_cpu_on_every_half_and_on_adversarial_values(grid: Grid, dtype: torch.dtype) -> None:
    x = every_half(dtype) if dtype.itemsize == 2 else adversarial(grid, 1_000_000).to(dtype)
    arguments = {"quant_min": grid.quant_min, "quant_max": grid.quant_max}
    qparams = torch.tensor([grid.scale]), torch.tensor([grid.zero_point])
    found = lfq.fake_quantize(x.cuda(), *(p.cuda() for p in qparams), **arguments)
    assert_bit_equal(found.cpu(), lfq.fake_quantize(x, *qparams, **arguments))


@pytest.mark.parametrize("saturation", SATURATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gaps", "transposed"])
@pytest.mark.parametrize(("shape", "granularity"), SHAPES, ids=str)
def test_forward_and_backward_equal_the_cpu(
    shape: tuple[int, ...], granularity: dict[str, int], layout: str, dtype: torch.dtype, saturation: str
) -> None:
    values = torch.randn(shape)
    values.view(-1)[::97] = torch.inf
    x = LAYOUTS[layout](values.to(dtype))
    count = scales_needed(shape, **granularity)
    scale, zero_point = torch.rand(count) / 4 + 0.05, torch.randint(-3, 4, (count,)).float()
    dy = torch.randn(shape).to(dtype)
    arguments = {"quant_min": -8, "quant_max": 7, "saturation": saturation, **granularity}
    assert_devices_agree(x, dy, scale, zero_point, **arguments)


@settings(max_examples=200)
@given(case=cases(), saturation=st.sampled_from(SATURATIONS))
def test_every_shape_stride_dtype_and_granularity_equals_the_cpu(case: Case, saturation: str) -> None:
    dy = torch.randn(case.x.shape).to(case.x.dtype)
    found, expected = (
        forward_and_backward(case.x, dy, case.scale, case.zero_point, device, saturation=saturation, **case.settings)
        for device in ("cuda", "cpu")
    )
    assert_bit_equal(found[0], expected[0])
    assert_bit_equal(found[1], expected[1])


@pytest.mark.parametrize("layout", DENSE)
def test_the_result_lies_in_memory_as_x_does(layout: str) -> None:
    x = DENSE[layout](torch.randn(2, 6, 5, 4, device="cuda"))
    y = lfq.fake_quantize(x, torch.ones(6).cuda(), torch.zeros(6).cuda(), quant_min=-8, quant_max=7, axis=1)
    assert_strides_kept(y, x)


@pytest.mark.parametrize(("shape", "granularity"), SHAPES, ids=str)
def test_the_same_input_gives_the_same_bits(shape: tuple[int, ...], granularity: dict[str, int]) -> None:
    count = scales_needed(shape, **granularity)
    x, dy, scale, zero_point = torch.randn(shape), torch.randn(shape), torch.rand(count) / 4 + 0.1, torch.zeros(count)
    arguments = {"quant_min": -8, "quant_max": 7, **granularity}
    first, second = (forward_and_backward(x, dy, scale, zero_point, "cuda", **arguments) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_bit_equal(one, other)


@pytest.mark.parametrize("granularity", [{}, {"axis": 0}, {"axis": 1}, {"group_size": 2**16}], ids=str)
def test_more_elements_than_32_bits_can_count(granularity: dict[str, int]) -> None:
    rows = 2**15 + 3
    if torch.cuda.mem_get_info()[0] < 5 * rows * 2**16 * 2:
        pytest.skip("needs 24 GB of free memory")
    x = torch.randn(rows, 2**16, device="cuda", dtype=torch.bfloat16)  # 2^31 + 3 * 2^16 elements
    assert x.numel() > 2**31
    count = scales_needed(tuple(x.shape), **granularity)
    scale, zero_point = (torch.rand(count, device="cuda") / 4 + 0.1), torch.zeros(count, device="cuda")
    inputs = [t.requires_grad_() for t in (x, scale, zero_point)]
    arguments = {"quant_min": -8, "quant_max": 7, **granularity}
    y = lfq.fake_quantize(*inputs, **arguments)
    dy = torch.ones_like(y)
    dx, d_scale, d_zero_point = torch.autograd.grad(y, inputs, dy)
    assert d_scale.isfinite().all()
    assert d_zero_point.isfinite().all()
    tail = slice(rows - 8, None)  # beyond 2^31
    own = slice(rows - 8, None) if granularity.get("axis") == 0 or "group_size" in granularity else slice(None)
    qparams = [p[own].detach().cpu() for p in (scale, zero_point)]
    known, known_dx, *_ = forward_and_backward(x[tail].cpu(), dy[tail].cpu(), *qparams, "cpu", **arguments)
    assert_bit_equal(y[tail].detach().cpu(), known)
    assert_bit_equal(dx[tail].cpu(), known_dx)


def test_a_cuda_graph_captures_forward_and_backward() -> None:
    x = torch.randn(64, 128, 7, 7, device="cuda", requires_grad=True)
    scale = torch.full((128,), 0.1, device="cuda", requires_grad=True)
    zero_point = torch.zeros(128, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)

    def step() -> list[Tensor]:
        y = lfq.fake_quantize(x, scale, zero_point, quant_min=-8, quant_max=7, axis=1)
        return [y.detach(), *torch.autograd.grad(y, (x, scale, zero_point), dy)]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.normal_()
        scale.mul_(1.7)
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert_bit_equal(found, expected)


@pytest.mark.parametrize("granularity", [{}, {"axis": 0}, {"axis": 1}, {"group_size": 64}], ids=str)
def test_nothing_waits_for_the_device(granularity: dict[str, int]) -> None:
    shape = (512, 256)
    count = scales_needed(shape, **granularity)
    inputs = [t.cuda().requires_grad_() for t in (torch.randn(shape), torch.rand(count) + 0.1, torch.zeros(count))]
    torch.cuda.set_sync_debug_mode("error")
    lfq.fake_quantize(*inputs, quant_min=-8, quant_max=7, **granularity).sum().backward()


def test_a_kept_launch_serves_other_tensors_that_are_aligned() -> None:
    from lfq_lightning.ops import triton

    many, scale, zero_point = torch.randn(40_000), torch.full((1,), 0.1), torch.zeros(1)
    for start in (0, 4, 1, 8, 2):  # 4 bytes each: every fourth is aligned
        x = many[start : start + 30_000]
        on_gpu = many.cuda()[start : start + 30_000]
        found = lfq.fake_quantize(on_gpu, scale.cuda(), zero_point.cuda(), quant_min=-8, quant_max=7)
        assert_bit_equal(found.cpu(), lfq.fake_quantize(x, scale, zero_point, quant_min=-8, quant_max=7))
    plan = triton._plan(on_gpu.shape, on_gpu.stride(), on_gpu.dtype, on_gpu.get_device(), None, None, 1)
    assert plan.forward._launch is not None, "this Triton launches kernels in another way: see private_triton"


def test_whoever_hooks_launches_is_told_of_a_kept_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    x, scale, zero_point = torch.randn(1000).cuda(), torch.full((1,), 0.1).cuda(), torch.zeros(1).cuda()
    told: list[object] = []
    for _ in range(2):
        lfq.fake_quantize(x, scale, zero_point, quant_min=-8, quant_max=7)
    chain = knobs.runtime.launch_enter_hook
    if chain is None:  # Triton before 3.6 has one hook, or none
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", told.append)
    else:
        monkeypatch.setattr(chain, "calls", [told.append])
    lfq.fake_quantize(x, scale, zero_point, quant_min=-8, quant_max=7)
    assert len(told) == 1


def test_a_stream_that_is_not_the_default_sees_what_was_queued_on_it() -> None:
    scale, zero_point = torch.ones(1, device="cuda"), torch.zeros(1, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x = torch.full((10**6,), 3.4, device="cuda")
        y = lfq.fake_quantize(x, scale, zero_point, quant_min=-8, quant_max=7)
    stream.synchronize()
    assert (y == 3.0).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one_computes() -> None:
    x, scale, zero_point = torch.randn(10_000), torch.full((1,), 0.1), torch.zeros(1)
    with torch.cuda.device(0):
        found = forward_and_backward(x, x, scale, zero_point, "cuda:1", quant_min=-8, quant_max=7)
        assert torch.cuda.current_device() == 0
    expected = forward_and_backward(x, x, scale, zero_point, "cpu", quant_min=-8, quant_max=7)
    assert_bit_equal(found[0], expected[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("granularity", [{}, {"axis": 0}, {"group_size": 64}], ids=str)
def test_compiled_code_gives_the_bits_of_eager(granularity: dict[str, int], mode: str | None) -> None:
    torch.compiler.reset()
    shape = (256, 512)
    count = scales_needed(shape, **granularity)
    inputs = [t.cuda().requires_grad_() for t in (torch.randn(shape), torch.rand(count) / 4 + 0.1, torch.zeros(count))]

    def network(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return lfq.fake_quantize(x * 2.0, scale, zero_point, quant_min=-8, quant_max=7, **granularity) * 4.0

    compiled = torch.compile(network, fullgraph=True, mode=mode)
    expected = network(*inputs)
    known = torch.autograd.grad(expected.sum(), inputs)
    for _ in range(3):
        y = compiled(*inputs)
        found = torch.autograd.grad(y.sum(), inputs)
        assert_bit_equal(y, expected)
        for one, other in zip(found, known, strict=True):
            assert_bit_equal(one, other)
    torch.compiler.reset()
