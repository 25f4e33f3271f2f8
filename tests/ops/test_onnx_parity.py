"""The operation is ONNX's QuantizeLinear followed by DequantizeLinear, as ONNX Runtime computes them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

import lfq_lightning as lfq
from tests.assertions import assert_bit_equal
from tests.samples import BACKENDS, Grid, adversarial, on

RANGES = {np.uint8: (0, 255), np.int8: (-128, 127)}


def by_onnxruntime(x: Tensor, scale: Tensor, zero_point: Tensor, codes: type, axis: int | None) -> Tensor:
    qparams = scale.numpy(), zero_point.numpy().astype(codes)
    if axis is None:
        qparams = tuple(p.reshape(()) for p in qparams)
    attributes = {} if axis is None else {"axis": axis}
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["codes"], **attributes),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero_point"], ["y"], **attributes),
        ],
        "fake_quantize",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        [numpy_helper.from_array(p, name) for p, name in zip(qparams, ("scale", "zero_point"), strict=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("codes", RANGES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("scale", [1e-3, 0.02, 1 / 3, 1.0, 7.7, 1e30])
def test_finite_values_give_what_onnxruntime_gives(backend: str, codes: type, scale: float) -> None:
    quant_min, quant_max = RANGES[codes]
    for zero_point in (quant_min, 0, 100, quant_max):
        x = adversarial(Grid(quant_min, quant_max, scale, zero_point), 5_000 if backend == "triton" else 100_000)
        x = x[x.isfinite()]
        qparams = torch.tensor([scale]), torch.tensor([float(zero_point)])
        with on(backend):
            y = lfq.fake_quantize(x, *qparams, quant_min=quant_min, quant_max=quant_max)
        assert_bit_equal(y, by_onnxruntime(x, *qparams, codes, None))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("codes", RANGES, ids=lambda c: c.__name__)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_channels_give_what_onnxruntime_gives(backend: str, codes: type, axis: int) -> None:
    quant_min, quant_max = RANGES[codes]
    x = torch.randn(5, 7, 40)
    scale = torch.rand(x.shape[axis]) / 50 + 1e-3
    zero_point = torch.randint(quant_min, quant_max + 1, (x.shape[axis],)).float()
    with on(backend):
        y = lfq.fake_quantize(x, scale, zero_point, quant_min=quant_min, quant_max=quant_max, axis=axis)
    assert_bit_equal(y, by_onnxruntime(x, scale, zero_point, codes, axis))
