"""Models with several inputs and outputs, shared layers and weights, odd layers and ranges: exported, or named."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import lightning as L
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lfq_lightning as lfq
from lfq_lightning.export.parity import Parity
from tests.runs import Net, every_epoch, fit, loader, qat

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporter, about itself


class Module(nn.Module):
    """Layers by name, and what forward does with them."""

    def __init__(self, use: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.use = use
        for name, layer in layers.items():
            self.add_module(name, layer)


class Pair(Module):
    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Any:
        return self.use(self, x, y, scale)


class One(Module):
    def forward(self, x: Any) -> Any:
        return self.use(self, x)


def calibrated(model: nn.Module, inputs: Any, weight: Any = 8, activation: Any = 8, **options: Any) -> nn.Module:
    def run(module: nn.Module, batch: Any) -> Any:
        return (
            module(**batch)
            if isinstance(batch, dict)
            else module(*batch)
            if isinstance(batch, tuple)
            else module(batch)
        )

    lfq.attach(model, weight, activation, **options)
    lfq.calibrate(model, [inputs], forward=run)
    return model.eval()


def assert_exact(parity: Parity, model: nn.Module) -> None:
    """Every quantizer was compared, and every code and output is the same."""
    assert {row.quantizer for row in parity.quantizers} == set(lfq.quantizers(model))
    assert all(row.equal == 1 for row in parity.quantizers)
    assert parity.plain.noise < 1e-9
    assert parity.agrees


def sums(model: Any, x: Tensor, y: Tensor, scale: float) -> Any:
    z = model.first(x) + model.second(y)
    return z, {"scaled": z * scale, "mean": z.mean(1)}


def pair() -> nn.Module:
    return Pair(sums, first=nn.Linear(6, 5), second=nn.Linear(4, 5))


def test_several_inputs_and_outputs_of_any_batch_size(tmp_path: Path) -> None:
    model = calibrated(pair(), (torch.randn(8, 6), torch.randn(8, 4)))
    batch = torch.randn(9, 6), torch.randn(9, 4), torch.zeros(9)  # as a loader gives it, with labels
    example = torch.randn(1, 6), torch.randn(1, 4)
    parity = lfq.export_onnx(model, example, tmp_path / "m.onnx", batches=[batch])
    assert parity.inputs == 10
    assert_exact(parity, model)


def test_one_tensor_given_twice_is_two_inputs(tmp_path: Path) -> None:
    x = torch.randn(8, 6)
    model = calibrated(Pair(sums, first=nn.Linear(6, 5), second=nn.Linear(6, 5)), (x, x))
    parity = lfq.export_onnx(model, (x, x), tmp_path / "m.onnx", batches=[(torch.randn(9, 6), torch.randn(9, 6))])
    assert_exact(parity, model)
    y = torch.randn(8, 6)
    torch.testing.assert_close(lfq.export_pt2(model, (x, x)).module()(x, y)[0], model(x, y)[0])


def test_inputs_by_name(tmp_path: Path) -> None:
    example = {"y": torch.randn(8, 4), "x": torch.randn(8, 6)}
    model = calibrated(pair(), example)
    batch = {"x": torch.randn(9, 6), "labels": torch.zeros(9), "y": torch.randn(9, 4)}
    assert_exact(lfq.export_onnx(model, example, tmp_path / "m.onnx", batches=[batch]), model)
    with pytest.raises(ValueError, match=r"`batches` must hold mappings.* with y, x\. Found \['x'\]"):
        lfq.export_onnx(model, example, tmp_path / "m.onnx", batches=[{"x": batch["x"]}])


def test_a_dictionary_as_one_input(tmp_path: Path) -> None:
    example = ({"a": torch.randn(4, 6)},)
    model = calibrated(One(lambda m, x: m.layer(x["a"]), layer=nn.Linear(6, 3)), example)
    assert_exact(lfq.export_onnx(model, example, tmp_path / "m.onnx"), model)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    made = One(lambda m, x: m.head(m.tokens(x)), tokens=nn.Embedding(500, 16), head=nn.Linear(16, 500, bias=False))
    made.head.weight = made.tokens.weight
    x = torch.randint(500, (4, 5))
    model = calibrated(made, x)
    parity = lfq.export_onnx(model, x, tmp_path / "m.onnx")
    assert_exact(parity, model)
    assert 8000 < parity.file_bytes < 16000


def test_a_layer_that_is_used_twice_is_compared_at_both_uses(tmp_path: Path) -> None:
    x = torch.randn(8, 6)
    model = calibrated(One(lambda m, x: m.layer(torch.relu(m.layer(x))), layer=nn.Linear(6, 6)), x)
    parity = lfq.export_onnx(model, x, tmp_path / "m.onnx")
    assert_exact(parity, model)
    assert {row.quantizer: row.codes for row in parity.quantizers}["layer.input_quantizer"] == 2 * 8 * 6


def test_a_subclass_that_a_rule_asks_for(tmp_path: Path) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2 + self.weight.sum()

    x = torch.randn(8, 6)
    model = calibrated(nn.Sequential(Doubled(6, 6), nn.Linear(6, 2)), x, rules=[lfq.Rule(Doubled, weight=8)])
    assert_exact(lfq.export_onnx(model, x, tmp_path / "m.onnx"), model)


def per_channel(**options: Any) -> lfq.QuantSpec:
    return lfq.QuantSpec(granularity="per_channel", **options)


LAYERS: dict[str, Any] = {
    "dilated, reflecting": (lambda: nn.Conv1d(3, 4, 3, padding=2, dilation=2, padding_mode="reflect"), (3, 16), 8, 8),
    "circular, in groups": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular", groups=2), (4, 6, 6), 4, 4),
    "volume": (lambda: nn.Conv3d(2, 3, 2), (2, 4, 4, 4), 8, 8),
    "transposed, in groups": (lambda: nn.ConvTranspose2d(4, 4, 3, 2, groups=2, output_padding=1), (4, 6, 6), 4, 8),
    "input per channel": (lambda: nn.Conv2d(4, 8, 3), (4, 6, 6), 4, per_channel(bits=4)),
    "input per last channel": (lambda: nn.Linear(4, 8), (5, 4), 8, per_channel(bits=8, axis=-1)),
    "groups of a convolution": (
        lambda: nn.Conv2d(6, 8, 3),
        (6, 6, 6),
        lfq.QuantSpec(bits=4, granularity="per_group", group_size=4),
        None,
    ),
    "16 codes that 4 bits do not hold": (
        lambda: nn.Linear(8, 6),
        (8,),
        per_channel(bits=4, quant_min=3, quant_max=18),
        lfq.QuantSpec(quant_min=3, quant_max=10),
    ),
    "negative codes": (
        lambda: nn.Linear(8, 6),
        (8,),
        per_channel(bits=4, quant_min=-12, quant_max=3),
        lfq.QuantSpec(quant_min=-100, quant_max=-3),
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_odd_layers_and_ranges_are_exact(tmp_path: Path, case: str) -> None:
    make, shape, weight, activation = LAYERS[case]
    x = torch.randn(8, *shape)
    model = calibrated(nn.Sequential(make()), x, weight, activation)
    parity = lfq.export_onnx(model, x, tmp_path / "m.onnx", batches=[torch.randn(5, *shape)])
    assert_exact(parity, model)


def test_groups_need_an_opset_that_has_them() -> None:
    x = torch.randn(4, 8)
    groups = lfq.QuantSpec(bits=4, granularity="per_group", group_size=4)
    model = calibrated(nn.Sequential(nn.Linear(8, 4)), x, groups, None)
    with pytest.raises(ValueError, match=r"need opset 21 of ONNX\. Found opset 18 and groups in 0\.weight_quantizer"):
        lfq.export_onnx(model, x, "unused.onnx", opset=18)


def test_a_model_that_cannot_be_traced_is_named() -> None:
    x = torch.randn(4, 6)
    model = calibrated(One(lambda m, x: m.layer(x) if x.sum() > 0 else m.layer(-x), layer=nn.Linear(6, 6)), x)
    with pytest.raises(ValueError, match=r"One cannot be traced: .*[dD]ata-dependent"):
        lfq.export_onnx(model, x, "unused.onnx")


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.mean() > 0 else super().forward(-x)


class Headless(Net):
    forward = L.LightningModule.forward

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(Net.forward(self, batch[0]), batch[1])


class Keyed(Net):
    """A batch is a mapping, whose entries are the keywords of forward."""

    def forward(self, image: Tensor, weight: Tensor) -> Tensor:
        return super().forward(image) * weight[:, None]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(**batch).square().mean()


def test_a_module_without_forward_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`export` writes what `forward` computes\. Headless has none"):
        fit(tmp_path, Headless(), callback=qat(export="m.onnx"))


def test_a_module_that_cannot_be_traced_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model = Branching()
    before = {name: value.clone() for name, value in model.named_parameters()}
    with pytest.raises(ValueError, match="Branching cannot be traced"):
        fit(tmp_path, model, callback=qat(export="m.onnx"), num_sanity_val_steps=0)
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in before.items())


def test_a_fit_on_mappings_is_exported_by_keyword(tmp_path: Path) -> None:
    batches = DataLoader([{"image": x, "weight": torch.rand(len(x))} for x, _ in loader()], batch_size=None)
    callback = qat(export="m.onnx")
    fit(tmp_path, Keyed(), callback=callback, data=batches, limit_val_batches=0)
    assert callback.parity is not None
    assert callback.parity.agrees
    [path] = tmp_path.rglob("m.onnx")
    assert [given.name for given in onnx.load(path).graph.input] == ["image", "weight"]


class Keeping(Net):
    """Keeps its loss with the graph, and in its hyper-parameters and itself what only it knows how to handle."""

    def __init__(self, options: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.kept: list[Any] = [threading.Lock()]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.kept.append(super().training_step(batch, batch_idx))
        return self.kept[-1]


class Options:
    """A user's class of settings."""

    def __init__(self, rate: float) -> None:
        self.rates, self.shape = {"first": rate}, PurePosixPath("a/b")


class Kind(Enum):
    """A user's enumeration."""

    WIDE = 1


class Table(dict[str, int]):
    """A user's mapping."""


def test_what_a_module_keeps_beside_its_weights_does_not_stand_in_the_way(tmp_path: Path) -> None:
    options = {Kind.WIDE: [Options(1.0), partial(Options, rate=0.2)]}
    callback, model = qat(export="m.onnx"), Keeping(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, model, callback=callback, callbacks=[every_epoch(tmp_path)], limit_val_batches=0)
    assert callback.parity is not None
    assert callback.parity.agrees
    assert model.kept[-1].grad_fn is not None
    [path] = tmp_path.rglob("m.onnx")
    assert path.exists()


def test_hyper_parameters_that_no_checkpoint_gives_back_safely_are_refused_before_training(tmp_path: Path) -> None:
    model = Keeping(Table(a=1))
    with pytest.raises(ValueError, match=r"Found the hyper-parameters options, .*ignore=\[\.\.\.\]"):
        fit(tmp_path, model, callback=qat(export="m.onnx"), callbacks=[every_epoch(tmp_path)])
    assert len(model.kept) == 1


class Unwilling(Net):
    """Cannot be copied at all."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise TypeError("not this one")


def test_a_module_that_cannot_be_copied_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Found a Unwilling that cannot be copied \(not this one\)"):
        fit(tmp_path, Unwilling(), callback=qat(export="m.onnx"))


# ---- other people's exporters ---------------------------------------------------------------------------------------


def test_torchs_own_exporter_names_the_way_to_a_file_of_integers(tmp_path: Path) -> None:
    model, x = calibrated(nn.Sequential(nn.Linear(4, 2)), torch.randn(4, 4)).eval(), torch.randn(4, 4)
    with pytest.warns(UserWarning, match=r"no integers\. Use `lfq_lightning\.export_onnx`"):
        torch.onnx.export(model, (x,), tmp_path / "float.onnx", dynamo=True, verbose=False)
    with pytest.raises(RuntimeError, match=r"cannot see into fake quantization.*use `lfq_lightning\.export_onnx`"):
        torch.onnx.export(model, (x,), str(tmp_path / "constant.onnx"), dynamo=False)
    program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), model(x))


def test_a_fit_hands_arguments_of_the_export_on(tmp_path: Path) -> None:
    export = {"path": "m.onnx", "dynamic_axes": False, "opset": 22, "tolerance": 0.001}
    _, _, callback = fit(tmp_path, callback=qat(export=export))
    assert callback.parity is not None
    assert callback.parity.tolerance == 0.001
    proto = onnx.load(tmp_path / "m.onnx")
    assert [opset.version for opset in proto.opset_import if opset.domain == ""] == [22]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value > 0


@pytest.mark.parametrize("export", [{"opset": 21}, {"path": "m.onnx", "batches": []}, {}])
def test_what_is_no_argument_of_the_export_is_refused(export: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`export` must hold `path`, and may hold dynamic_axes, opset"):
        qat(export=export)


@pytest.mark.parametrize("mismatch", ["warn", "raise"])
def test_an_export_that_fails_after_a_fit_costs_nobody_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mismatch: str
) -> None:
    def full(proto: onnx.ModelProto, path: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(onnx, "save", full)
    callback = qat(export={"path": "m.onnx", "on_mismatch": mismatch})
    ends = (
        pytest.warns(UserWarning, match="The fit has ended, and its export failed: OSError: no space left")
        if mismatch == "warn"
        else pytest.raises(OSError, match="no space left")
    )
    with ends:
        fit(tmp_path, callback=callback)
    assert callback.parity is None
    assert not (tmp_path / "m.onnx").exists()


# ---- the file -------------------------------------------------------------------------------------------------------


def test_a_file_says_what_wrote_it_and_how_many_bits_it_has(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(4, 4)
    lfq.attach(model, 4, 8)
    lfq.calibrate(model, [x])
    lfq.export_onnx(model, x, tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    assert proto.producer_name == "lfq_lightning"
    found = {prop.key: prop.value for prop in proto.metadata_props}
    assert found == {"lfq_lightning.weight_bits": "4, 8", "lfq_lightning.activation_bits": "8"}


def test_tensors_are_kept_beside_a_file_where_that_is_asked_for(tmp_path: Path) -> None:
    model, x = calibrated(nn.Sequential(nn.Linear(64, 64)), torch.randn(4, 64)).eval(), torch.randn(4, 64)
    apart = lfq.export_onnx(model, x, tmp_path / "m.onnx", external_data=True)
    assert apart.agrees
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert (tmp_path / "m.onnx.data").stat().st_size >= 64 * 64
    assert apart.file_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    whole = lfq.export_onnx(model, x, tmp_path / "m.onnx")
    assert whole.agrees
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]  # the tensors of the file before are gone
