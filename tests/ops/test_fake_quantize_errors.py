"""A wrong argument of `fake_quantize` raises an error that says the rule and what was found."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lfq_lightning as lfq

pytestmark = pytest.mark.quick

ONE, ZERO = torch.ones(1), torch.zeros(1)


def call(**wrong: Any) -> None:
    right: dict[str, Any] = {"x": torch.ones(2, 6), "scale": ONE, "zero_point": ZERO, "quant_min": -8, "quant_max": 7}
    lfq.fake_quantize(**{**right, **wrong})


def per_group(size: Any, count: int = 1) -> dict[str, Any]:
    return {"group_size": size, "scale": torch.ones(count), "zero_point": torch.zeros(count)}


# Each: the wrong arguments, the exception, the rule, and what was found.
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str, str]] = {
    "range reversed": (
        {"quant_min": 7, "quant_max": -8}, ValueError, "`quant_min` must be less than `quant_max`", "7 and -8",
    ),
    "range of one code": (
        {"quant_min": 3, "quant_max": 3}, ValueError, "`quant_min` must be less than `quant_max`", "3 and 3",
    ),
    "range too wide": (
        {"quant_max": 2**16 + 1}, ValueError, "must be between -65536 and 65536", "-8 and 65537",
    ),
    "range too low": (
        {"quant_min": -(2**16) - 1}, ValueError, "must be between -65536 and 65536", "-65537 and 7",
    ),
    "range of floats": ({"quant_min": -8.0}, TypeError, "`quant_min` must be an int", "-8.0 of type float"),
    "range of a bool": ({"quant_max": True}, TypeError, "`quant_max` must be an int", "True of type bool"),
    "range of a tensor": ({"quant_max": ONE}, TypeError, "`quant_max` must be an int", "of type Tensor"),
    "x of integers": (
        {"x": torch.ones(2, 6, dtype=torch.int64)}, TypeError, "`x` must be a floating tensor", "torch.int64",
    ),
    "x of bools": (
        {"x": torch.ones(2, 6, dtype=torch.bool)}, TypeError, "`x` must be a floating tensor", "torch.bool",
    ),
    "x complex": (
        {"x": torch.ones(2, 6, dtype=torch.complex64)}, TypeError, "`x` must be a floating tensor", "torch.complex64",
    ),
    "x a list": ({"x": [1.0]}, TypeError, "`x` must be a tensor", "list"),
    "scale a number": ({"scale": 0.5}, TypeError, "`scale` must be", "float"),
    "zero point a number": ({"zero_point": 0}, TypeError, "`zero_point` must be", "int"),
    "scale float64": ({"scale": ONE.double()}, TypeError, "`scale` must be float32", "torch.float64"),
    "scale bfloat16": ({"scale": ONE.bfloat16()}, TypeError, "`scale` must be float32", "torch.bfloat16"),
    "zero point int32": ({"zero_point": ZERO.int()}, TypeError, "`zero_point` must be float32", "torch.int32"),
    "scale without dimensions": (
        {"scale": torch.tensor(0.5)}, ValueError, "`scale` must have one dimension", r"shape \(\)",
    ),
    "zero point with two dimensions": (
        {"zero_point": torch.zeros(1, 1)}, ValueError, "`zero_point` must have one dimension", r"shape \(1, 1\)",
    ),
    "shapes differ": (
        {"zero_point": torch.zeros(2)}, ValueError, "must have the same shape", r"\(1,\) and \(2,\)",
    ),
    "scales without an axis": (
        {"scale": torch.ones(6), "zero_point": torch.zeros(6)},
        ValueError, r"per tensor must have shape \(1,\)", "6 values",
    ),
    "scales of another axis": (
        {"axis": 1, "scale": torch.ones(2), "zero_point": torch.zeros(2)},
        ValueError, r"per channel on axis 1 must have shape \(6,\)", "2 values",
    ),
    "one scale with an axis": ({"axis": 1}, ValueError, r"per channel on axis 1 must have shape \(6,\)", r"1 value:"),
    "scale on another device": (
        {"scale": ONE.to("meta")}, ValueError, "`scale` must be on the device of x, cpu", "meta",
    ),
    "zero point on another device": (
        {"zero_point": ZERO.to("meta")}, ValueError, "`zero_point` must be on the device of x, cpu", "meta",
    ),
    "x on another device": (
        {"x": torch.ones(2, 6, device="meta")}, ValueError, "`scale` must be on the device of x, meta", "cpu",
    ),
    "axis too large": ({"axis": 2}, ValueError, "`axis` must name a dimension of x", "axis 2 .* 2 dimensions"),
    "axis too small": ({"axis": -3}, ValueError, "`axis` must name a dimension of x", "axis -3 .* 2 dimensions"),
    "axis of a number": (
        {"x": torch.tensor(1.0), "axis": 0}, ValueError, "`axis` must name a dimension of x", "axis 0 .* 0 dimensions",
    ),
    "axis a float": (
        {"axis": 1.0, "scale": torch.ones(6), "zero_point": torch.zeros(6)}, TypeError, "`axis` must be an int", "1.0",
    ),
    "axis a word": ({"axis": "rows"}, TypeError, "`axis` must be an int", "rows"),
    "axis and group": (
        {"axis": 0, "group_size": 2}, ValueError, "`axis` or `group_size`, not both", "axis=0, group_size=2",
    ),
    "empty groups": ({"group_size": 0}, ValueError, "`group_size` must be at least 1", "Found 0"),
    "negative groups": ({"group_size": -4}, ValueError, "`group_size` must be at least 1", "Found -4"),
    "group a float": (per_group(2.5, 6), TypeError, "`group_size` must be an int", "2.5"),
    "groups of a vector": (
        {"x": torch.ones(6), **per_group(2, 3)},
        ValueError, r"`group_size` needs a weight of shape \(output, input", r"shape \(6,\)",
    ),
    "too few groups": (per_group(4, 3), ValueError, r"per group of 4 must have shape \(4,\)", "3 values"),
    "saturation": ({"saturation": "hard"}, ValueError, "must be one of lsq, exclusive, inclusive", "'hard'"),
    "saturation None": ({"saturation": None}, ValueError, "must be one of lsq, exclusive, inclusive", "None"),
    "gradient factor": ({"grad_factor": "lsq"}, TypeError, "`grad_factor` must be a number", "lsq"),
    "unknown keyword": ({"quant_mid": 0}, TypeError, "unexpected keyword argument", "'quant_mid'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_raises_with_the_rule_and_what_was_found(name: str) -> None:
    wrong, kind, rule, found = WRONG[name]
    with pytest.raises(kind, match=f"(?s){rule}.*{found}"):
        call(**wrong)


def test_the_same_arguments_put_right_raise_nothing() -> None:
    call()
    call(axis=1, scale=torch.ones(6), zero_point=torch.zeros(6))
    call(axis=-2, scale=torch.ones(2), zero_point=torch.zeros(2))
    call(**per_group(4, 4))
    call(quant_min=-(2**16), quant_max=2**16)
    call(x=torch.tensor(1.0))


def test_settings_are_given_by_name_alone() -> None:
    with pytest.raises(TypeError, match="positional"):
        lfq.fake_quantize(torch.ones(1), ONE, ZERO, -8, 7)


def test_shapes_are_checked_without_data() -> None:
    x, scale, zero_point = (torch.ones(n, device="meta") for n in (3, 1, 1))
    assert lfq.fake_quantize(x, scale, zero_point, quant_min=-8, quant_max=7).shape == (3,)
    with pytest.raises(ValueError, match="per channel on axis 0"):
        lfq.fake_quantize(x, scale, zero_point, quant_min=-8, quant_max=7, axis=0)
