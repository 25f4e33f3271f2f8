"""What a layer loses alone is measured, and the model is left as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import lfq_lightning as lfq
from tests.operation_networks import MADE, WEIGHTS, Residual
from tests.runs import Net, images, loader

X, Y = images().tensors
LOSS = nn.functional.cross_entropy


@pytest.fixture
def model() -> Net:
    net = Net()
    lfq.attach(net, weight=3, activation=3)
    lfq.calibrate(net, [X])
    return net


def state_of(model: nn.Module) -> Any:
    """All that a measurement could change."""
    return (
        {key: str(value) for key, value in model.state_dict().items()},
        {name: (type(m), m.training, id(m)) for name, m in model.named_modules()},
        {name: q.switches for name, q in lfq.quantizers(model).items()},
        torch.get_rng_state().tolist(),
        model._trainer,
    )


def loss_with(model: Net, quantized: set[str]) -> float:
    twin = copy.deepcopy(model).eval()
    for name, quantizer in lfq.quantizers(twin).items():
        quantizer.phase = "freeze" if name.rpartition(".")[0] in quantized else "off"
    with torch.no_grad():
        return float(LOSS(twin(X), Y))


def test_each_layer_alone_is_quantized_and_compared_with_float(model: Net) -> None:
    found = lfq.sensitivity(model, [(X, Y)], LOSS, higher_is_better=False)
    assert found.float_metric == loss_with(model, set())
    assert [row.layers for row in found.rows] == [("first",), ("second",), ("head",)]
    for row in found.rows:
        assert row.metric == pytest.approx(loss_with(model, set(row.layers)), rel=1e-6)
        assert row.drop == row.metric - found.float_metric  # a higher loss is a loss
    assert [row.bits for row in found.rows] == [8, 3, 8]
    assert found.to_dicts()[1]["layers"] == ("second",)
    assert str(found).splitlines()[0].split() == ["layer", "bits", "bytes", "metric", "drop"]


def test_widths_are_tried_on_the_weights_alone(model: Net) -> None:
    found = lfq.sensitivity(model, loader(), LOSS, bits=(2, 8), higher_is_better=False)
    assert [(row.layers[0], row.bits) for row in found.rows] == [
        (layer, bits) for layer in ("first", "second", "head") for bits in (8, 2)
    ]
    twin = copy.deepcopy(model)
    lfq.detach(twin)
    lfq.attach(twin, weight=None, activation=None, rules=[lfq.Rule("second", weight=2)])
    lfq.set_phase(twin.eval(), "freeze")
    with torch.no_grad():
        expected = float(LOSS(twin(X), Y))
    row = next(r for r in found.rows if r.layers == ("second",) and r.bits == 2)
    assert row.metric == pytest.approx(expected, rel=1e-6)
    assert row.weight_bytes == lfq.summarize(twin).weight_bytes


def test_batches_count_by_their_samples(model: Net) -> None:
    whole = lfq.sensitivity(model, [(X, Y)], LOSS, higher_is_better=False)
    parts = lfq.sensitivity(model, [(X[:5], Y[:5]), (X[5:], Y[5:])], LOSS, higher_is_better=False)
    assert parts.float_metric == pytest.approx(whole.float_metric, rel=1e-5)


def test_a_metric_says_which_direction_is_better_and_is_not_touched(model: Net) -> None:
    metric = MulticlassAccuracy(10, average="micro")
    metric.update(torch.tensor([1]), torch.tensor([1]))
    found = lfq.sensitivity(model, loader(), metric)
    assert found.higher_is_better
    assert all(row.drop == pytest.approx(found.float_metric - row.metric) for row in found.rows)
    assert float(metric.compute()) == 1.0


def test_a_name_takes_what_the_module_logs_in_validation(model: Net) -> None:
    by_name = lfq.sensitivity(model, loader(), "val_loss", higher_is_better=False)
    by_hand = lfq.sensitivity(model, loader(), LOSS, higher_is_better=False)
    assert [r.metric for r in by_name.rows] == pytest.approx([r.metric for r in by_hand.rows], rel=1e-5)


@pytest.mark.parametrize("bits", [None, (2, 4)])
@pytest.mark.parametrize("metric", [LOSS, "val_loss"], ids=["function", "name"])
def test_everything_is_as_it_was(model: Net, bits: Any, metric: Any) -> None:
    lfq.set_phase(model, "learn")
    model.norm.eval()
    model.second.weight_quantizer.learning_enabled = False
    before = state_of(model)
    batches = DataLoader(images(), batch_size=8, shuffle=metric is LOSS)
    lfq.sensitivity(model, batches, metric, bits, higher_is_better=False)
    assert state_of(model) == before


@pytest.mark.parametrize("bits", [None, (2, 4)])
@pytest.mark.parametrize("quantized", [True, False])
def test_everything_is_as_it_was_after_an_error(model: Net, bits: Any, quantized: bool) -> None:
    if not quantized:
        lfq.detach(model)
        bits = (2, 4)
    before, calls = state_of(model), 0

    def fails_later(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 3 * 8:
            raise RuntimeError("out of luck")
        return LOSS(outputs, targets)

    with pytest.raises(RuntimeError, match="out of luck"):
        lfq.sensitivity(model, loader(), fails_later, bits, higher_is_better=False)
    assert state_of(model) == before


def test_a_float_model_is_measured_and_stays_a_float_model() -> None:
    model = Net()
    before = state_of(model)
    found = lfq.sensitivity(model, loader(), LOSS, bits=(2, 8), higher_is_better=False)
    assert len(found.rows) == 6
    assert state_of(model) == before


def test_tied_weights_are_one_row() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    x = torch.randn(8, 4)
    target = model(x).detach()
    found = lfq.sensitivity(model, [(x, target)], nn.functional.mse_loss, bits=(2,), higher_is_better=False)
    assert [row.layers for row in found.rows] == [("0", "2")]
    lfq.attach(model, weight=2, activation=None, rules=[lfq.Rule("*", weight=2)])
    lfq.calibrate(model, [x])
    lfq.set_phase(model, "freeze")
    assert found.rows[0].metric == nn.functional.mse_loss(model(x), target).item() > 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": LOSS}, ValueError, "Found no word of it for cross_entropy"),
        ({"metric": 3, "higher_is_better": True}, TypeError, "Found 3"),
        ({"metric": "loss_of_hope", "higher_is_better": True}, ValueError, "Found val_loss"),
        ({"dataloader": iter([])}, ValueError, "Found an iterator"),
        ({"dataloader": []}, ValueError, "at least one batch"),
        ({"dataloader": [X]}, TypeError, "a pair of inputs and targets"),
        ({"bits": ()}, ValueError, "at least one width"),
        ({"bits": (1, 4)}, ValueError, "between 2 and 16"),
        ({"metric": lambda o, t: o}, TypeError, "must give one number"),
    ],
)
def test_mistakes_are_named(model: Net, options: dict[str, Any], error: type[Exception], message: str) -> None:
    settings = {"dataloader": loader(), "metric": LOSS, "higher_is_better": False, **options}
    if options.get("metric") is LOSS:
        settings["higher_is_better"] = None
    before = state_of(model)
    with pytest.raises(error, match=message):
        lfq.sensitivity(model, **settings)
    assert state_of(model) == before


def test_ranges_must_be_known() -> None:
    model = Net()
    with pytest.raises(ValueError, match="Found none"):
        lfq.sensitivity(model, loader(), LOSS, higher_is_better=False)
    lfq.attach(model)
    with pytest.raises(ValueError, match="must know their ranges"):
        lfq.sensitivity(model, loader(), LOSS, higher_is_better=False)


# ---- operations -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@pytest.mark.parametrize("kind", [*WEIGHTS, *MADE])
def test_every_weight_that_an_operation_reads_is_a_unit_with_a_rule_of_its_own(kind: str) -> None:
    case = {**WEIGHTS, **MADE}[kind]
    torch.manual_seed(0)
    model, inputs = case.make(), tuple(case.inputs)
    keys = list(model.state_dict())

    def forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
        return model(*batch), model(*batch)

    def size(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs * torch.linspace(0, 1, outputs.numel()).view_as(outputs)).sum()

    lfq.attach(model, weight=8, activation=None, example=inputs)
    found = lfq.sensitivity(model, [inputs], size, bits=(2, 8), higher_is_better=False, forward=forward)
    weights = {q for q in lfq.quantizers(model).values() if q.role == "weight"}
    assert len(found.rows) == 2 * len(weights) > 0
    assert all(row.weight_bytes > 0 for row in found.rows)
    assert all(row.metric != found.float_metric for row in found.rows if row.bits == 2)
    rules = lfq.propose_bits(found, sum(row.weight_bytes for row in found.rows if row.bits == 2))
    lfq.detach(model)
    assert list(model.state_dict()) == keys
    placement = lfq.attach(model, weight=8, activation=None, rules=rules, example=inputs)
    assert placement.share > 0.9
    assert {q.bitwidth for q in lfq.quantizers(model).values() if q.role == "weight"} == {2}


def test_a_call_is_a_unit_with_all_its_operands_and_an_output_is_one() -> None:
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(4, 6)
    residual = Residual()
    rules = [lfq.Rule("/add", activation=4), lfq.Rule("head", output=4)]
    image = torch.randn(2, 2, 6, 6)
    lfq.attach(residual, rules=rules, example=image)
    lfq.calibrate(residual, [image])
    found = lfq.sensitivity(residual, [(image, image)], lambda y, _: y.square().mean(), higher_is_better=False)
    rows = {row.layers: row for row in found.rows}
    assert set(rows) == {("stem",), ("body",), ("head",), ("/add",), ("head output",)}
    assert rows["/add",].bits is None
    assert rows["/add",].drop != 0
    assert rows["head output",].drop != 0
    lost = lfq.sensitivity(model, [(x, x)], F.mse_loss, bits=(4,), higher_is_better=False)
    assert [row.layers for row in lost.rows] == [("0",), ("1",)]
