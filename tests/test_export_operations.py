"""Files and frozen copies of networks whose operations are quantized: at every point the codes of training."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import lfq_lightning as lfq
from tests.assertions import assert_bit_equal
from tests.operation_networks import ACTIVATIONS, MADE, WEIGHTS, Case, attached

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]

ALL = {**WEIGHTS, **MADE, **{f"operands of {name}": case for name, case in ACTIVATIONS.items()}}


def trained(kind: str) -> tuple[nn.Module, Case]:
    case = ALL[kind]
    rules = [lfq.Rule("*/*", activation=8)] if kind.startswith("operands") else []
    return attached(case, weight=4, activation=8, rules=rules).eval(), case


@pytest.mark.parametrize("kind", ALL)
def test_a_frozen_copy_computes_what_the_trained_network_does_without_any_of_this(kind: str) -> None:
    model, case = trained(kind)
    with torch.no_grad():
        frozen = lfq.freeze(model)
        torch.testing.assert_close(frozen(*case.inputs), model(*case.inputs), rtol=1e-5, atol=1e-6)
    assert not lfq.quantizers(frozen)


# Each exporter's work takes a second: those that differ in what the file must hold.
FILES = (
    "read by its parent",
    "bias apart",
    "norm after two",
    "tied with a transpose",
    "slices",
    "experts",
    "einsum",
    "own convolution",
)
FILES += ("cross-attention", "transformer", "lstm", "standardized", "weight norm of old", "spectral norm of old")
FILES += ("operands of residual", "operands of attention")


@pytest.mark.parametrize("kind", FILES)
def test_an_onnx_file_has_the_codes_of_training_at_every_point(kind: str, tmp_path: Path) -> None:
    model, case = trained(kind)
    parity = lfq.export_onnx(model, tuple(case.inputs), tmp_path / "model.onnx")
    assert parity.agrees
    assert {row.quantizer for row in parity.quantizers} == set(lfq.quantizers(model))
    assert all(row.equal == 1.0 for row in parity.quantizers)
    assert parity.plain.difference < 1e-5


@pytest.mark.parametrize("kind", FILES)
def test_a_program_of_torch_export_computes_what_the_trained_network_does(kind: str, tmp_path: Path) -> None:
    model, case = trained(kind)
    program = lfq.export_pt2(model, tuple(case.inputs), tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(*case.inputs)
    torch.testing.assert_close(found, model(*case.inputs), rtol=1e-5, atol=1e-6)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    integers = [point for point in called if "quantize_per_" in point and "dequantize" not in point]
    weights = sum(quantizer.role == "weight" for quantizer in lfq.quantizers(model).values())
    assert len(integers) >= len(lfq.quantizers(model)) - weights


def test_bags_of_embeddings_are_refused_by_name(tmp_path: Path) -> None:
    model, case = trained("embedding bag")
    with pytest.raises(ValueError, match=r"ONNX has no operation for bags of embeddings.* Found 0: use `export_pt2`"):
        lfq.export_onnx(model, tuple(case.inputs), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_tied_and_shared_weights_are_stored_once(tmp_path: Path) -> None:
    model, case = trained("tied with a transpose")
    parity = lfq.export_onnx(model, tuple(case.inputs), tmp_path / "model.onnx")
    assert sum(row.quantizer.endswith("weight_quantizer") for row in parity.quantizers) == 1


def test_a_frozen_transformer_runs_in_its_fused_path_with_what_was_trained() -> None:
    """Weights alone: nothing keeps torch's own fused layer from running."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True), torch.randn(3, 5, 8)
    lfq.attach(model, weight=4, activation=None, example=x)
    lfq.set_phase(model, "learn")
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    with torch.no_grad():
        expected, frozen = model.eval()(x, src_key_padding_mask=mask), lfq.freeze(model)
        kept = ~mask
        torch.testing.assert_close(frozen(x, src_key_padding_mask=mask)[kept], expected[kept], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(frozen(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_frozen_copy_is_saved_under_the_keys_of_the_float_network_and_keeps_integers_when_asked() -> None:
    model, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), torch.randn(3, 6)
    lfq.attach(model, weight=4, activation=None, example=x)
    lfq.set_phase(model, "learn")
    frozen, kept = lfq.freeze(model), lfq.freeze(model, integers=True)
    plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    plain.load_state_dict(frozen.state_dict())  # strict, as `save_pretrained` and `from_pretrained` do
    assert_bit_equal(plain(x).detach(), model(x).detach())
    layer = kept[0]
    assert layer.weight_codes.dtype is torch.int8
    centred = layer.weight_codes.float() - layer.weight_zero_point[:, None]
    assert_bit_equal(centred * layer.weight_scale[:, None], layer.weight.detach())


def test_freezing_in_one_thread_leaves_others_that_run_networks_alone() -> None:
    model, case = trained("operands of attention")
    with torch.no_grad():
        expected = model(*case.inputs)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad():
                for _ in range(200):
                    assert_bit_equal(model(*case.inputs), expected)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while thread.is_alive():
        lfq.freeze(model)
    thread.join()
    assert not failed
