"""Programs run where PyTorch's own back ends lower them, and frozen models where this package is not installed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import lfq_lightning as lfq
from tests.assertions import assert_bit_equal
from tests.exported_networks import inputs, trained
from tests.processes import run_python

pytestmark = pytest.mark.filterwarnings("ignore")  # the back ends', about themselves

ALONE = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lfq_lightning":
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
import torch

x, expected = torch.load("data.pt")
for path in sys.argv[1:]:
    if path.endswith(".pt2"):
        import torch.ao.quantization.fx._decomposed  # the operators, where they are used
    if path.endswith(".pt"):
        run = torch.load(path, weights_only=False)
    else:
        run = torch.jit.load(path) if path.endswith(".ts") else torch.export.load(path).module()
    assert torch.equal(run(x), expected[path]), path
    print(path, "is equal")
assert "lfq_lightning" not in sys.modules
"""


def assert_same_answers(found: Tensor, model: nn.Module, x: Tensor, noise: float) -> None:
    """The same class for 98 of 100 inputs, and differences of less power than a share `noise` of the output's."""
    with torch.no_grad():
        expected = model(x)
    assert float(found.argmax(1).eq(expected.argmax(1)).float().mean()) >= 0.98
    assert float((found - expected).square().sum() / expected.square().sum()) < noise


@pytest.mark.parametrize(("weight", "activation"), [(4, 4), (8, None)])
def test_files_run_in_a_process_without_this_package(tmp_path: Path, weight: int, activation: int | None) -> None:
    model, x = trained("residual", weight, activation), inputs("residual", 16)
    frozen = lfq.freeze(model)
    torch.jit.save(torch.jit.trace(frozen, x), tmp_path / "traced.ts")
    torch.export.save(torch.export.export(frozen, (x,)), tmp_path / "frozen.pt2")
    program = lfq.export_pt2(model, x, tmp_path / "program.pt2")
    expected = {name: model(x).detach() for name in ("traced.ts", "frozen.pt2")}
    expected["program.pt2"] = program.module()(x).detach()
    torch.save((x, expected), tmp_path / "data.pt")
    done = run_python("-c", ALONE, *expected, cwd=tmp_path, directory=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("is equal") == 3


class Language(nn.Module):
    """An embedding whose weights give the output too, by a tied layer or a function."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding, self.body, self.last = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False) if tied else None
        if self.head is not None:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.last(self.body(input=self.embedding(tokens)))
        return nn.functional.linear(x, self.embedding.weight) if self.head is None else self.head(x)


class Upsampling(nn.Module):
    """A transposed convolution that is told the size of its output."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        self.up, self.named = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1), named

    def forward(self, x: Tensor) -> Tensor:
        return self.up(input=x, output_size=(10, 10)) if self.named else self.up(x, (10, 10))


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    return model


TOKENS, IMAGES = torch.randint(0, 20, (5,)), torch.randn(2, 2, 5, 5)
READERS: dict[str, tuple[nn.Module, Tensor, list[lfq.Rule]]] = {
    "function": (Language(tied=False), TOKENS, []),
    "tied": (Language(tied=True), TOKENS, []),
    "tied and in float": (Language(tied=True), TOKENS, [lfq.Rule("head", weight=None)]),
    "a second argument": (Upsampling(named=False), IMAGES, []),
    "keywords": (Upsampling(named=True), IMAGES, []),
    "pruned": (pruned(), torch.randn(5, 8), []),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_frozen_model_equals_the_model_whoever_reads_a_weight_and_however_layers_are_called(reader: str) -> None:
    model, x, rules = READERS[reader]
    example = x if reader == "function" else None  # which shows that a function reads the weight
    lfq.attach(model, 4, 4, rules=rules, example=example)
    lfq.calibrate(model, [x])
    frozen = lfq.freeze(model)
    assert_bit_equal(frozen(x), model.eval()(x).detach())
    assert_bit_equal(torch.export.export(frozen, (x,)).module()(x), frozen(x))
    if reader == "tied":
        assert frozen.embedding.weight is frozen.head.weight


def test_a_pickled_frozen_model_runs_in_a_process_without_this_package(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.ConvTranspose1d(8, 4, 3)), torch.randn(3, 8, 8)
    lfq.attach(model, 4, 4)
    lfq.calibrate(model, [x])
    torch.save(lfq.freeze(model), tmp_path / "frozen.pt")
    torch.save((x, {"frozen.pt": model.eval()(x).detach()}), tmp_path / "data.pt")
    done = run_python("-c", ALONE, "frozen.pt", cwd=tmp_path, directory=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_frozen_subclass_with_several_inputs_is_refused() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x) * mask

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Masked(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, x > 0)

    model = Outer()
    lfq.attach(model, rules=[lfq.Rule(Masked)])
    lfq.calibrate(model, [torch.randn(3, 4)])
    with pytest.raises(ValueError, match=r"the one input of a layer\. Found x.*, mask.* for 'layer'"):
        lfq.freeze(model)


@pytest.mark.parametrize("network", ["mlp", "residual"])
def test_signed_codes_stand_for_the_same_values(network: str) -> None:
    model, x = trained(network, 4, 8), inputs(network, 16)
    signed = lfq.export_pt2(model, x, signed=True)
    assert_bit_equal(signed.module()(x), lfq.export_pt2(model, x).module()(x))
    kinds = {n.args[-1] for n in signed.graph.nodes if "quantized_decomposed.quantize_per_tensor" in str(n.target)}
    assert kinds == {torch.int8}


@pytest.mark.parametrize("positive", [False, True])
def test_codes_that_are_signed_already_are_not_shifted(positive: bool) -> None:
    x = torch.randn(8, 4).abs() if positive else torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 4))
    lfq.attach(model, weight=8, activation=lfq.QuantSpec(bits=8))
    lfq.calibrate(model, [x])
    lfq.set_phase(model, "freeze")
    assert model[0].input_quantizer.code_range == ((0, 255) if positive else (-128, 127))
    signed = lfq.export_pt2(model, x, signed=True)
    assert_bit_equal(signed.module()(x), lfq.export_pt2(model, x).module()(x))


@pytest.mark.parametrize("network", ["mlp", "residual", "separable", "lenet"])
def test_torchao_lowers_a_program_to_integer_kernels_of_x86(tmp_path: Path, network: str) -> None:
    pytest.importorskip("torchao")
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401
    from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

    model, x = trained(network, 8, 8), inputs(network, 100)
    lfq.export_pt2(model, x, tmp_path / "m.pt2", target="x86")
    program = torch.export.load(tmp_path / "m.pt2")
    with torch.no_grad():
        lowered = lower_pt2e_quantized_to_x86(program.module(), (x,))
        kernels = Counter(str(n.target) for n in lowered.graph.nodes if "onednn.q" in str(n.target))
        layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in model.modules())
        assert sum(kernels.values()) >= layers, kernels
        assert_same_answers(lowered(x), model, x, noise=1e-2)


def by_executorch(program: Any, path: Path, x: Tensor) -> tuple[Tensor, Counter[str]]:
    """The output, and the operations that were left to ExecuTorch's portable kernels."""
    import executorch.kernels.quantized  # noqa: F401
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    nodes = edge.exported_program().graph.nodes
    left = Counter(n.target.__name__ for n in nodes if n.op == "call_function")
    path.write_bytes(edge.to_executorch().buffer)
    [output] = Runtime.get().load_program(path).load_method("forward").execute([x])
    return output, left


@pytest.mark.parametrize("network", ["mlp", "lenet", "residual", "separable", "encoder"])
def test_executorch_runs_a_program_in_xnnpack(tmp_path: Path, network: str) -> None:
    pytest.importorskip("executorch.exir")
    model, x = trained(network, 8, 8), inputs(network, 100)
    program = lfq.export_pt2(model, x, target="executorch")  # not trained for it
    output, left = by_executorch(program, tmp_path / "m.pte", x)
    assert left["executorch_call_delegate"] >= 1
    assert_same_answers(output, model, x, noise=1e-3)


@pytest.mark.parametrize(
    ("network", "kernels"), [("residual", {"QLinearConv": 2, "QGemm": 1}), ("lenet", {"QLinearConv": 2, "QGemm": 3})]
)
def test_onnx_runtime_computes_in_integers(tmp_path: Path, network: str, kernels: dict[str, int]) -> None:
    """Matrix products, and convolutions whose output goes to the next quantizer, not those that end in an addition."""
    model, x = trained(network, 8, 8), inputs(network, 100)
    parity = lfq.export_onnx(model, x, tmp_path / "m.onnx")
    assert parity.optimized.noise < 0.01
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "m.onnx", options, providers=["CPUExecutionProvider"])
    found = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert {kind: found[kind] for kind in kernels} == kernels, found
