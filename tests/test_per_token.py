"""Inputs whose scale each token brings itself: nothing is learned of it, and what runs it does the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers torch's own operators
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lfq_lightning as lfq
from lfq_lightning.quantizer.tokens import token_qparams
from tests.assertions import assert_bit_equal
from tests.runs import every_epoch, fit, qat

pytestmark = pytest.mark.quick

WEIGHT = lfq.QuantSpec(bits=4, granularity="per_group", group_size=16)


def tokens_of(bits: int = 8, symmetric: bool = False) -> lfq.QuantSpec:
    return lfq.QuantSpec(bits=bits, symmetric=symmetric, granularity="per_token")


class Tokens(L.LightningModule):
    """Three layers over sequences of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - 1).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def sequences(count: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    spread = torch.rand(count, 5, 1, generator=generator) * 10  # a scale for all would serve few
    return torch.randn(count, 5, 32, generator=generator) * spread


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(sequences()), batch_size=8)


def quantized(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Tokens()
    lfq.attach(model, **{"weight": WEIGHT, "activation": tokens_of()} | options)
    lfq.calibrate(model, [sequences()])
    lfq.set_phase(model, "freeze")
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_affine_ones_are_those_of_torchs_operator(dtype: torch.dtype) -> None:
    x = torch.cat([sequences().flatten(0, 1), sequences().flatten(0, 1).abs(), torch.zeros(2, 32)]).to(dtype)
    scale, zero_point = token_qparams(x, 0, 255, symmetric=False)
    expected = torch.ops.quantized_decomposed.choose_qparams_per_token_asymmetric(x.float(), torch.int8)
    assert torch.equal(scale.double(), expected[0][:, 0])
    assert torch.equal(zero_point.long() - 128, expected[1][:, 0])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_token_is_quantized_by_its_own_range_and_none_is_clamped(bits: int, symmetric: bool) -> None:
    quantizer = quantized(
        activation=tokens_of(bits, symmetric), rules=[lfq.Rule("*", activation=tokens_of(bits, symmetric))]
    )
    quantizer = quantizer.second.input_quantizer
    x = sequences()[:2].requires_grad_()
    y = quantizer(x)
    levels = 2**bits - 1
    for token, found in zip(x.detach().flatten(0, 1), y.detach().flatten(0, 1), strict=True):
        low, high = token.min().clamp(max=0), token.max().clamp(min=0)
        step = (high - low) / levels if not symmetric else torch.maximum(high / (levels // 2), -low / (levels // 2 + 1))
        assert found.unique().numel() <= 2**bits
        assert (found - token).abs().max() <= step * (0.5 if symmetric else 1.0) + 1e-6
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.mean() > 0.9 and set(x.grad.unique().tolist()) <= {0.0, 1.0}  # straight through


def test_tokens_of_zeros_nothing_or_no_finite_value_give_no_nan_of_their_own() -> None:
    quantizer = quantized().second.input_quantizer
    assert torch.equal(quantizer(torch.zeros(3, 32)), torch.zeros(3, 32))
    assert quantizer(torch.zeros(0, 32)).shape == (0, 32)
    x = torch.ones(2, 32)
    x[0, 0] = torch.inf
    assert quantizer(x)[1].allclose(torch.ones(32), atol=0.01)
    assert quantizer(x).isfinite().all()


def test_symmetric_codes_keep_both_signs_whatever_was_seen_at_first() -> None:
    model = nn.Sequential(nn.Linear(32, 4))
    lfq.attach(model, activation=tokens_of(symmetric=True))
    lfq.calibrate(model, [sequences().abs()])
    x = sequences()
    assert model[0].input_quantizer(x).min() < 0.95 * x.min()


def test_a_fit_learns_weights_and_their_scales_and_resumes_to_the_bit(tmp_path: Path) -> None:
    def run(directory: Path, resume: Path | None = None) -> nn.Module:
        callback = qat(weight=WEIGHT, activation=tokens_of())
        options: dict[str, Any] = {"callbacks": [every_epoch(directory)], "max_epochs": 4, "ckpt_path": resume}
        torch.manual_seed(0)
        return fit(directory, Tokens(), callback=callback, data=data(), **options)[0]

    whole = run(tmp_path / "a")
    resumed = run(tmp_path / "b", tmp_path / "a/epoch=2.ckpt")
    for name, value in whole.state_dict().items():
        assert_bit_equal(resumed.state_dict()[name], value)
    quantizers = lfq.quantizers(whole)
    assert not list(quantizers["first.input_quantizer"].parameters())
    weight = quantizers["second.weight_quantizer"]
    assert not torch.equal(weight.scale, weight.scale_reference)
    loaded = lfq.load_from_checkpoint(Tokens, tmp_path / "a/epoch=3.ckpt").eval()
    assert_bit_equal(loaded(sequences()), whole.eval()(sequences()))


def test_they_lose_less_than_one_scale_for_all_where_tokens_differ_in_size() -> None:
    def noise(**options: Any) -> float:
        model = quantized(**options)
        expected = copy.deepcopy(model)
        lfq.detach(expected)
        return float((model(sequences()) - expected(sequences())).square().mean().detach())

    affine = lfq.QuantSpec(bits=4, symmetric=False)
    all_layers = lambda spec: {"activation": spec, "weight": None, "rules": [lfq.Rule("*", activation=spec)]}  # noqa: E731
    assert noise(**all_layers(tokens_of(4))) < 0.5 * noise(**all_layers(affine))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_frozen_copy_and_a_program_compute_the_same(bits: int, symmetric: bool) -> None:
    spec = tokens_of(bits, symmetric)
    model, x = quantized(activation=spec, rules=[lfq.Rule("*", activation=spec)]), sequences()
    expected = model(x)
    assert_bit_equal(lfq.freeze(model)(x), expected)
    program = lfq.export_pt2(model, x)
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-3, atol=1e-3)
    called = {str(node.target) for node in program.graph.nodes}
    assert "quantized_decomposed.quantize_per_token.default" in called
    chooses = "quantized_decomposed.choose_qparams_per_token_asymmetric.default" in called
    assert chooses == (bits == 8 and not symmetric)


def test_attention_meets_its_inputs_token_by_token_in_every_format(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), nn.Linear(64, 8))
    model.eval()
    x = sequences(4)
    lfq.attach(model, WEIGHT, tokens_of(), example=x)
    lfq.calibrate(model, [x])
    with torch.no_grad():
        expected = model(x)
        assert_bit_equal(lfq.freeze(model)(x), expected)
        torch.testing.assert_close(lfq.export_pt2(model, x).module()(x), expected)
    parity = lfq.export_onnx(model, x, tmp_path / "model.onnx")
    assert len(parity.by_runtime) == 6 and parity.agrees


def test_what_a_frozen_copy_gives_lies_in_memory_as_in_training() -> None:
    model, x = quantized(), sequences().transpose(0, 1)  # its bits may depend on it
    frozen = lfq.freeze(model)
    ((found,), _) = frozen.first.quantize_input(frozen.first, (x,), {})
    expected = model.first.input_quantizer(x)
    assert_bit_equal(found, expected)
    assert found.stride() == expected.stride()


def test_a_record_measures_tokens_by_their_own_scales() -> None:
    quantizer = quantized().first.input_quantizer
    assert quantizer.saturation(100 * sequences()).tolist() == [0.0, 0.0]


def test_an_onnx_file_leaves_them_to_the_runtime_and_multiplies_packed_weights(tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    model, x = quantized(), sequences()
    parity = lfq.export_onnx(model, x, tmp_path / "model.onnx")
    assert parity.by_runtime == ("first.input_quantizer", "second.input_quantizer", "head.input_quantizer")
    assert "left to the runtime   3 inputs, whose scales come with each token" in str(parity)
    assert "QuantizeLinear" not in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    assert "MatMulNBits" in {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    noise = (torch.as_tensor(found) - model(x)).square().mean() / model(x).square().mean()
    assert noise < 1e-3  # blocks of 16 values instead of tokens of 32


def test_what_is_made_again_for_backward_is_what_forward_computed() -> None:
    found = []
    for compress_saved in (False, True):
        model = quantized(compress_saved=compress_saved)
        lfq.set_phase(model, "learn")
        model(sequences()).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == 9
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_it_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    model, x = quantized(), sequences()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: lfq.attach(nn.Conv2d(1, 1, 3), activation=tokens_of()),
            "features in the last .*'per_tensor'",
        ),
        (lambda: lfq.attach(nn.Linear(2, 2), weight=tokens_of()), "A weight is no token.*'per_channel' or 'per_group'"),
        (lambda: tokens_of().replace(observer="minmax"), "nothing is learned. Found observer='minmax'.*leave it out"),
        (lambda: tokens_of(symmetric=True).replace(signed=False), "nothing is learned. Found signed=False"),
        (
            lambda: tokens_of(symmetric=True).replace(quant_min=0, quant_max=127),
            "have both signs.*Found quant_min=0 and quant_max=127.*symmetric=False",
        ),
        (lambda: tokens_of().replace(axis=1), "`axis` goes with granularity 'per_channel'"),
        (
            lambda: lfq.attach(Tokens(), WEIGHT, tokens_of(), example=sequences(), target="onnxruntime"),
            "leave `target` out, and the runtime quantizes inputs itself",
        ),
        (lambda: lfq.export_onnx(quantized(weight=None), sequences(), "/nowhere/model.onnx"), "no quantized weight"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
