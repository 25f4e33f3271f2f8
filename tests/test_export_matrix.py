"""ONNX Runtime gives the answers of trained networks of five kinds, at five widths, symmetric and affine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import lfq_lightning as lfq
from tests.exported_networks import NETWORKS, SETTINGS, accuracy, inputs, trained

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporter, about itself

OFTEN = {
    ("residual", "w8a8 affine"),
    ("residual", "w4a4 symmetric"),
    ("separable", "w2a4 affine"),
    ("lenet", "w4a8 symmetric"),
    ("mlp", "w4a4 affine"),
    ("encoder", "w8a8 symmetric"),
    ("encoder", "w4 groups affine"),
}
CASES = [
    pytest.param(n, s, marks=() if (n, s) in OFTEN else pytest.mark.slow, id=f"{n}-{s}")
    for n in NETWORKS
    for s in SETTINGS
]


@pytest.mark.parametrize(("network", "setting"), CASES)
def test_onnx_runtime_gives_the_answers_of_a_trained_network(tmp_path: Path, network: str, setting: str) -> None:
    model = trained(network, *SETTINGS[setting], epochs=3 if setting.startswith("w2") else 1)
    assert accuracy(model, network) > (0.6 if setting.startswith("w2") else 0.85)
    if network in ("residual", "separable"):
        norms = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all((gamma < 0).any() and (gamma == 0).any() for gamma in norms)
    x = inputs(network, 1000)
    parity = lfq.export_onnx(model, x[:4], tmp_path / "m.onnx", batches=[x])
    assert parity.inputs == 1004
    assert len(parity.quantizers) == len(lfq.quantizers(model))
    assert parity.plain.relative < 1e-4
    # How far a code is off says nothing: one that falls to the other side of a tie changes all that follows from it.
    # Whether a quantizer itself is exact, the last line asks.
    assert all(row.equal > 0.9995 for row in parity.quantizers)
    assert all(row.equal == 1 for row in parity.quantizers if row.quantizer.endswith("weight_quantizer"))
    assert len(parity.folded) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert parity.optimized.noise < 0.01
    assert_quantizers_are_exact(model, tmp_path / "m.onnx", x)


def assert_quantizers_are_exact(model: nn.Module, path: Path, x: torch.Tensor) -> None:
    """Given what ONNX Runtime itself gives to each QuantizeLinear, the model's quantizers give the very same codes.

    What differs between the two then comes from the order of float sums in the layers before.
    """
    proto = onnx.load(path)
    nodes = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    known = {output.name for output in proto.graph.output}
    names = list(dict.fromkeys([n for node in nodes for n in (node.input[0], node.output[0])]))
    given = {i.name for i in proto.graph.input}
    for name in names:
        if name not in known | given:
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    fed = {session.get_inputs()[0].name: x.numpy()}
    values = fed | dict(zip([o.name for o in session.get_outputs()], session.run(None, fed), strict=True))
    initializers = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    quantizers = [q for q in lfq.quantizers(model).values() if q.role != "weight"]
    for node in nodes:
        scale, zero_point = (initializers[name] for name in node.input[1:])
        [quantizer, *_] = [q for q in quantizers if float(q.used_qparams()[0]) == float(scale)]
        y = quantizer.quantized(torch.from_numpy(values[node.input[0]])).detach()
        mine = (y / quantizer.used_qparams()[0]).round().numpy() + int(zero_point)
        assert np.array_equal(mine.astype(int), values[node.output[0]].astype(int)), node.name
