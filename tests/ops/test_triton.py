"""The Triton kernels, interpreted on the CPU: their cuts, their sums, and what torch.compile makes of them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lfq_lightning as lfq
from tests import oracle
from tests.assertions import assert_bit_equal, assert_sums
from tests.samples import INTERPRETED, LAYOUTS, SATURATIONS, Case, cases, on, scales_needed

if not INTERPRETED:
    pytest.skip("needs Triton and TRITON_INTERPRET=1", allow_module_level=True)

from lfq_lightning.ops import native, triton, triton_launch, triton_tiles

# Every way to find the scales, and both ways to cut: runs, short runs, groups with and without a rest, columns.
GRANULARITIES = [
    ((9000,), {}),
    ((3, 3, 1100), {"axis": 1}),
    ((4, 6, 150), {"axis": 1}),
    ((3, 100, 3), {"group_size": 32}),
    ((3, 96, 3), {"group_size": 32}),
    ((900, 10), {"axis": 1}),
    ((40, 5, 7), {"axis": 1}),
    ((50, 200), {"axis": 1}),
]
each_granularity = pytest.mark.parametrize(("shape", "granularity"), GRANULARITIES, ids=str)


def arguments(shape: tuple[int, ...], granularity: dict[str, int], dtype: torch.dtype = torch.float32) -> list[Any]:
    count = scales_needed(shape, **granularity)
    scale, zero_point = torch.rand(count) / 4 + 0.05, torch.randint(-3, 4, (count,)).float()
    x = torch.randn(shape).to(dtype)
    return [x, scale, zero_point, -8, 7, granularity.get("axis"), granularity.get("group_size")]


def gradients(module: Any, x: Tensor, dy: Tensor, qparams: Tensor, *settings: Any) -> list[Tensor]:
    return list(module.backward(dy, x, qparams, *settings, 0.5, "inclusive", True, True))


def assert_agrees_with_native(arguments: list[Any]) -> None:
    x, *_ = arguments
    dy = torch.randn(x.shape).to(x.dtype)
    (y, qparams), (expected, known) = (module.forward(*arguments) for module in (triton, native))
    assert_bit_equal(y, expected)
    assert_bit_equal(qparams, known)
    found, expected_gradients = (gradients(m, x, dy, qparams, *arguments[3:]) for m in (triton, native))
    magnitudes = gradients(native, x.abs() * 0 + 7.5, dy.abs(), qparams, *arguments[3:])
    assert_bit_equal(found[0], expected_gradients[0])
    for sums, expected_sums, magnitude in zip(found[1:], expected_gradients[1:], magnitudes[1:], strict=True):
        torch.testing.assert_close(sums, expected_sums, rtol=0.0, atol=1e-5 * float(magnitude.abs().max()) + 1e-4)


@settings(max_examples=40)
@given(case=cases(), saturation=st.sampled_from(SATURATIONS), layout=st.sampled_from(sorted(LAYOUTS)))
def test_every_shape_stride_dtype_and_granularity_gives_the_definition(
    case: Case, saturation: str, layout: str
) -> None:
    dy = LAYOUTS[layout](torch.randn(case.x.shape).to(case.x.dtype))
    inputs = [t.detach().requires_grad_() for t in case[:3]]
    with on("triton"):
        y = lfq.fake_quantize(*inputs, saturation=saturation, **case.settings)
        x, scale, zero_point = torch.autograd.grad(y, inputs, dy)
    assert_bit_equal(y, oracle.forward(*case[:3], **case.settings))
    expected = oracle.backward(dy, *case[:3], saturation=saturation, **case.settings)
    assert_bit_equal(x, expected.x)
    assert_sums(scale, expected.scale, expected.scale_magnitude)
    assert_sums(zero_point, expected.zero_point, expected.zero_point_magnitude)


@each_granularity
@pytest.mark.parametrize("turns", [1, 2, 16])
def test_programs_that_take_several_tiles_agree_with_native(
    turns: int, shape: tuple[int, ...], granularity: dict[str, int]
) -> None:
    triton._plan.cache_clear()
    with mock.patch.object(triton_tiles, "_turns", return_value=turns):
        assert_agrees_with_native(arguments(shape, granularity))
    triton._plan.cache_clear()


@each_granularity
def test_offsets_of_64_bits_agree_with_native(shape: tuple[int, ...], granularity: dict[str, int]) -> None:
    triton._plan.cache_clear()
    with mock.patch.object(triton_tiles, "NARROW", triton_tiles.WIDE):
        assert_agrees_with_native(arguments(shape, granularity))
    triton._plan.cache_clear()


def test_large_tensors_take_more_tiles_a_program_by_their_size_alone() -> None:
    turns = [triton_tiles._turns(2**k, 1024, 16) for k in range(16, 34)]
    assert turns[0] == 1
    assert turns[-1] == 16
    assert turns == sorted(turns)
    assert set(turns) == {1, 2, 4, 8, 16}


@pytest.mark.parametrize(
    ("chunk", "block"), [(1, 1), (3, 4), (49, 64), (300, 512), (784, 1024), (3136, 512), (9000, 1024), (2**20, 2048)]
)
def test_runs_are_cut_with_few_idle_lanes(chunk: int, block: int) -> None:
    assert triton_tiles._fitting_block(chunk, 2048) == block


@each_granularity
def test_the_same_input_gives_the_same_bits(shape: tuple[int, ...], granularity: dict[str, int]) -> None:
    given = arguments(shape, granularity)
    _, qparams = triton.forward(*given)
    first, second = (gradients(triton, given[0], given[0].cos(), qparams, *given[3:]) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_bit_equal(one, other)


@pytest.mark.parametrize(
    ("layout", "granularity"),
    [
        *[(layout, of) for layout in ("contiguous", "channels_last") for of in ({}, {"axis": 0}, {"axis": 1})],
        ("contiguous", {"group_size": 4}),  # with channels_last, a group's channels are not neighbours
    ],
    ids=str,
)
def test_dense_tensors_are_not_copied(layout: str, granularity: dict[str, int]) -> None:
    given = arguments((2, 8, 5, 4), granularity)
    given[0] = LAYOUTS[layout](given[0])
    no_copy = mock.Mock(side_effect=AssertionError("copied"))
    with mock.patch.object(Tensor, "copy_", no_copy):
        _, qparams = triton.forward(*given)
        gradients(triton, given[0], torch.empty_like(given[0]).fill_(1.0), qparams, *given[3:])


def test_a_kept_launch_is_taken_for_aligned_tensors_unless_launches_are_hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"NEED_SCALE": True, "NEED_ZERO_POINT": False, "CHANNELS": 1, "BLOCK": 16}
    launch = triton.Launch(triton.kernels.add_up_kernel, 1, (1, 10, 1), options, device=-1)
    kept: list[tuple[Any, ...]] = []
    launch._launch = lambda *arguments: kept.append(arguments)
    sums, total = torch.arange(14.0), torch.zeros(1)

    launch((sums[1:], sums, sums, total, total), 0.5)
    assert total.item() == 0.5 * sum(range(1, 11))
    assert not kept
    launch((sums[4:], sums, sums, total, total), 0.5)
    addresses = [each.data_ptr() for each in (sums[4:], sums, sums, total, total)]
    assert kept == [(*addresses, 0.5, 1, 10, 1, True, False, 1, 16)]  # in the order of the kernel's arguments
    monkeypatch.setattr(triton_launch, "launches_are_hooked", lambda: True)
    launch((sums[4:], sums, sums, total, total), 0.5)
    assert total.item() == 0.5 * sum(range(4, 14))
    assert len(kept) == 1


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [{}, {"axis": 1}], ids=str)
def test_the_operators_are_what_torch_asks_of_operators(granularity: dict[str, int]) -> None:
    x, scale, zero_point, *settings = arguments((6, 5, 3), granularity, torch.float16)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(triton._forward_op, (x, scale, zero_point, *settings), test_utils=tests)
    _, qparams = triton.forward(x, scale, zero_point, *settings)
    for needs in ((True, True), (True, False), (False, False)):
        given = (x, x, qparams, *settings[2:], 0.5, "lsq", *needs)
        torch.library.opcheck(triton._backward_op, given, test_utils=tests)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", False), ("inductor", True)])
def test_compiled_code_calls_the_kernels_and_gives_the_bits_of_eager(backend: str, dynamic: bool) -> None:
    torch.compiler.reset()

    def network(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return lfq.fake_quantize(x, scale, zero_point, quant_min=-8, quant_max=7, axis=1, grad_factor=0.5)

    with on("triton"):
        compiled = torch.compile(network, fullgraph=True, backend=backend, dynamic=dynamic)
        for rows in (20, 33):
            inputs = [torch.randn(rows, 10), torch.rand(10) / 4 + 0.1, torch.randn(10)]
            inputs[0][0, 0] = torch.nan
            inputs = [t.requires_grad_() for t in inputs]
            launch = triton.Launch.__call__
            with mock.patch.object(triton.Launch, "__call__", autospec=True, side_effect=launch) as launched:
                y = compiled(*inputs)
            assert launched.call_count == 1
            expected = network(*inputs)
            assert_bit_equal(y, expected)
            found, known = (torch.autograd.grad(t.nansum(), inputs) for t in (y, expected))
            for one, other in zip(found, known, strict=True):
                assert_bit_equal(one, other)
    torch.compiler.reset()
