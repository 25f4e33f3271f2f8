"""Networks whose weights are read by operations: what these compute is the definition, and everything moves with it."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import lfq_lightning as lfq
from lfq_lightning.checkpoint import attach_as_saved
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.state_dicts import descriptions
from tests import oracle
from tests.assertions import assert_bit_equal
from tests.operation_networks import ACTIVATIONS, MADE, WEIGHTS, Case, Heads, Residual, StandardizedConv2d, attached

pytestmark = [
    pytest.mark.quick,
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning"),
]

ALL = {**WEIGHTS, **MADE, **{f"operands of {name}": case for name, case in ACTIVATIONS.items()}}


def settings_of(kind: str) -> dict[str, Any]:
    # The query is scaled before its product: quantized there too, it would be on the second grid already.
    calls = "*/bmm*" if kind.endswith("with weights") else "*/*"
    rules = [lfq.Rule(calls, activation=8)] if kind.startswith("operands") else []
    return {"weight": 4, "activation": 8, "rules": rules}


def by_oracle(quantizer: LearnableFakeQuantize, x: Tensor) -> Tensor:
    axis = quantizer.axis if quantizer.scale.numel() > 1 else None
    grid = quantizer.scale, quantizer.zero_point, quantizer.quant_min, quantizer.quant_max
    return oracle.forward(x, *grid, axis)


def outputs(model: nn.Module, case: Case) -> Tensor:
    with torch.no_grad():
        return model(*case.inputs)


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_operations_read_are_quantized_as_the_definition_says(kind: str) -> None:
    case = WEIGHTS[kind]
    model = attached(case, weight=4, activation=None)
    floating = copy.deepcopy(model)
    lfq.detach(floating)
    for name, quantizer in lfq.quantizers(model).items():
        holder, _, child = name.rpartition(".")
        weight = getattr(floating.get_submodule(holder), child.removesuffix("_quantizer"))
        with torch.no_grad():
            weight.copy_(by_oracle(quantizer, weight))
    torch.testing.assert_close(outputs(model.eval(), case), outputs(floating.eval(), case), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MADE)
def test_a_weight_that_is_made_in_forward_is_quantized_after_it_was_made(kind: str) -> None:
    case = MADE[kind]
    model = attached(case, weight=4, activation=None).eval()
    (quantizer,) = lfq.quantizers(model).values()
    floating = copy.deepcopy(model)
    lfq.detach(floating)
    layer = floating[0]
    floating(*case.inputs)  # hooks of old make the weight
    weight = layer.weight
    if kind == "standardized":
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
    function = F.conv2d if isinstance(layer, nn.Conv2d) else F.linear
    expected = function(case.inputs[0], by_oracle(quantizer, weight), layer.bias)
    torch.testing.assert_close(outputs(model, case), expected.detach(), rtol=1e-5, atol=1e-6)


def test_what_meets_a_parameter_is_quantized_too() -> None:
    case = WEIGHTS["read by its parent"]
    model = attached(case, weight=4, activation=4, rules=[lfq.Rule("qkv", weight=4, activation=4)])
    layer = model.qkv
    x, weight = by_oracle(layer.input_quantizer, case.inputs[0]), by_oracle(layer.weight_quantizer, layer.weight)
    assert_bit_equal(outputs(model, case), F.linear(x, weight, layer.bias).detach())


def test_operands_of_an_addition_in_place_and_out_of_place_are_quantized_by_a_rule() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z = x.sin() + y
            z += y
            return z.add_(x)

    inputs = torch.randn(2, 3), torch.randn(2, 3)
    model = attached(Case(Adds, inputs), rules=[lfq.Rule("/add*", activation=4)])
    q = {name: lambda v, q=quantizer: by_oracle(q, v) for name, quantizer in lfq.quantizers(model).items()}
    assert set(q) == {f"{call}_{operand}_quantizer" for call in ("add", "add_1", "add_2") for operand in ("input",)} | {
        "add_other_quantizer",
        "add_2_other_quantizer",
    }, "the second addition reads what the first has read as well"
    x, y = inputs
    z = q["add_input_quantizer"](x.sin()) + q["add_other_quantizer"](y)
    z = q["add_1_input_quantizer"](z) + q["add_other_quantizer"](y)
    z = q["add_2_input_quantizer"](z) + q["add_2_other_quantizer"](x)
    assert_bit_equal(model(x.clone(), y.clone()), z)


def test_what_a_module_gives_is_quantized_by_a_rule() -> None:
    case = WEIGHTS["read by its parent"]
    model = attached(
        Case(lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU()), case.inputs),
        weight=None,
        activation=None,
        rules=[lfq.Rule("1", output=3)],
    )
    (name,) = lfq.quantizers(model)
    assert name == "1.output_quantizer"
    expected = by_oracle(lfq.quantizers(model)[name], torch.relu(model[0](case.inputs[0])))
    assert_bit_equal(outputs(model, case), expected.detach())


@pytest.mark.parametrize("kind", ALL)
def test_every_weight_counts_as_quantized(kind: str) -> None:
    case = ALL[kind]
    placement = lfq.attach(case.make(), example=tuple(case.inputs), **settings_of(kind))
    # Attention's biases for key and value are repeated and put behind, which no product reads.
    assert placement.share > (0.94 if kind == "attention with biases" else 0.999), placement.account


@pytest.mark.parametrize("kind", ALL)
def test_every_scale_gets_a_gradient_and_off_is_the_float_network(kind: str) -> None:
    case = ALL[kind]
    torch.manual_seed(0)
    floating = case.make().eval()
    expected = outputs(floating, case)
    model = attached(case, "off", **settings_of(kind)).eval()
    torch.testing.assert_close(outputs(model, case), expected, rtol=1e-5, atol=1e-6)
    lfq.set_phase(model.train(), "learn")
    model(*case.inputs).square().sum().backward()
    quantizers = lfq.quantizers(model)
    assert quantizers
    silent = [name for name, q in quantizers.items() if q.scale.grad is None or not q.scale.grad.abs().sum() > 0]
    assert not silent


@pytest.mark.parametrize("kind", ALL)
def test_detach_copies_and_states_are_exact(kind: str) -> None:
    case = ALL[kind]
    torch.manual_seed(0)
    model = case.make().eval()
    before, keys, types = outputs(model, case), list(model.state_dict()), [type(m).__name__ for m in model.modules()]
    model = attached(case, **settings_of(kind)).eval()
    quantized, state = outputs(model, case), copy.deepcopy(model.state_dict())
    if kind != "weight norm of old":  # torch's own: what is no leaf is not copied
        assert_bit_equal(outputs(copy.deepcopy(model), case), quantized)
    if kind not in ("weight norm of old", "weight norm", "spectral norm"):  # torch pickles no parametrizations
        assert_bit_equal(outputs(pickle.loads(pickle.dumps(model)), case), quantized)
    other = attached(case, "off", seed=1, **settings_of(kind)).eval()
    other.load_state_dict(state)
    assert_bit_equal(outputs(other, case), quantized)
    lfq.detach(model)
    assert list(model.state_dict()) == keys
    assert [type(m).__name__ for m in model.modules()] == types
    assert_bit_equal(outputs(model, case), before)


@pytest.mark.parametrize("kind", ALL)
def test_attaching_again_changes_nothing(kind: str) -> None:
    case = ALL[kind]
    torch.manual_seed(0)
    model = case.make()
    first = lfq.attach(model, example=tuple(case.inputs), **settings_of(kind))
    placed = lfq.quantizers(model)
    assert lfq.attach(model, example=tuple(case.inputs), **settings_of(kind)) == first
    assert lfq.quantizers(model) == placed


class Shares(nn.Module):
    """Weights that are made in forward, and read what others read too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Sequential(StandardizedConv2d(2, 4, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.second(x)


@pytest.mark.parametrize("kind", [*ALL, "shares"])
def test_a_state_dict_alone_says_where_a_network_is_quantized(kind: str) -> None:
    case = {**ALL, "shares": Case(Shares, MADE["standardized"].inputs)}[kind]
    model = attached(case, **settings_of(kind)).eval()
    state = model.state_dict()
    torch.manual_seed(1)
    other = case.make()
    attach_as_saved(other, descriptions(state))
    assert list(other.state_dict()) == list(state)
    other.load_state_dict(state)
    assert_bit_equal(outputs(other.eval(), case), outputs(model, case))


# ---- where it runs --------------------------------------------------------------------------------------------------


def test_activation_checkpointing_changes_no_bit() -> None:
    gradients = []
    for reentrant in (None, False, True):
        model = attached(ACTIVATIONS["attention"], **settings_of("operands"))
        x = ACTIVATIONS["attention"].inputs[0].clone().requires_grad_()
        y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
        y.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
    for other in gradients[1:]:
        for first, second in zip(gradients[0], other, strict=True):
            assert_bit_equal(second, first)


def test_threads_that_run_one_network_do_not_meet() -> None:
    case = ALL["operands of residual"]
    model = attached(case, **settings_of("operands")).eval()
    batches = [torch.randn(2, 2, 6, 6) for _ in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in batches]
    found: dict[int, list[Tensor]] = {}

    def run(number: int) -> None:
        with torch.no_grad():
            found[number] = [model(batches[number]) for _ in range(20)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, outputs_of_one in found.items():
        for output in outputs_of_one:
            assert_bit_equal(output, expected[number])
    assert len(found) == 4


def test_a_layer_that_is_used_twice_has_one_quantizer_for_the_tensor_that_both_read() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.query(x) + self.key(x) + self.value(x.sin())

    model = attached(Case(Twice, [torch.randn(3, 6)]))
    assert model.query.input_quantizer is model.key.input_quantizer
    assert model.query.input_quantizer is not model.value.input_quantizer
    assert len(lfq.quantizers(model)) == 5


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lfq.Rule("*/softmax", activation=8), "'softmax' is no operation that can be quantized. Those are .*adaptive"),
        (lfq.Rule("body/add", activation=8), "no call has that name. Near are /add"),
        (lfq.Rule("/add_9", activation=8), "no call has that name. Near are /add"),
        (lfq.Rule("nothing", output=8), "no module has that name"),
    ],
)
def test_a_rule_that_names_no_call_is_refused_with_what_is_near(rule: lfq.Rule, message: str) -> None:
    model = Residual()
    with pytest.raises(ValueError, match=message):
        lfq.attach(model, rules=[rule], example=torch.randn(2, 2, 6, 6))
    assert not lfq.quantizers(model)


def test_a_rule_for_a_call_without_an_example_asks_for_one() -> None:
    with pytest.raises(ValueError, match=r"no batch was run to see the model's calls. Give `example`"):
        lfq.attach(Residual(), rules=[lfq.Rule("/add", activation=8)])


def test_an_example_that_does_not_fit_forward_says_so_and_changes_nothing() -> None:
    model = Heads()
    with pytest.raises(RuntimeError) as caught:
        lfq.attach(model, example=torch.randn(2, 5, 7))
    assert any("Heads must take the example. Found" in note for note in caught.value.__notes__)
    assert type(model) is Heads
    assert not lfq.quantizers(model)


class Swallow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, None


class Swallows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return Swallow.apply(self.first(x), self.weight)


def test_a_weight_that_a_custom_function_takes_is_named_as_left_in_float() -> None:
    placement = lfq.attach(Swallows(), example=torch.randn(3, 6))
    assert placement.share == 0.5
    ((name, reason),) = placement.left_in_float
    assert (name, reason) == ("", "the autograd Function `Swallow` takes it, and computes by itself")
    assert f"In float (50.0%), as {reason}: (model)." in placement.account


class Bias(nn.Module):
    """A table of coordinates, the same for every batch, goes through a layer: what it gives is added."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table = nn.Linear(6, 6), nn.Linear(2, 6)
        self.register_buffer("coordinates", torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.table(self.coordinates)


def test_what_is_computed_from_constants_alone_is_named_and_left() -> None:
    placement = lfq.attach(Bias(), example=torch.randn(3, 6))
    assert placement.left_in_float == (("table", "what it computes is the same for every batch"),)


class Places(nn.Module):
    """The rows of a table that no index chooses are added to what a layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.places = nn.Linear(6, 6), nn.Embedding(3, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.places.weight[: len(x)]


def test_a_table_that_is_added_without_a_call_of_its_layer_is_named_by_what_reads_it() -> None:
    placement = lfq.attach(Places(), example=torch.randn(3, 6))
    assert placement.left_in_float == (("places", "`add` reads it, and no sum of products"),)


def test_looking_at_a_weight_that_is_computed_changes_nothing() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 4))).train()
    before = copy.deepcopy(model.state_dict())
    lfq.attach(model, example=torch.randn(3, 6))
    lfq.set_phase(model, "observe")
    lfq.set_phase(model, "estimate")
    lfq.summarize(model)
    after = model.state_dict()
    for name, value in before.items():
        assert_bit_equal(after[name], value)
    assert all(module.training for module in model.modules())


class Statements(nn.Module):
    """Changes tensors in place by statements, also one that was read before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        z, y = self.layer(x), x.cos()
        z.add_(y)  # the result is not used, z is
        z -= 1.5
        return z * y


@pytest.mark.parametrize("phase", ["observe", "learn"])
def test_tensors_that_statements_change_in_place_have_the_quantized_result(phase: Any) -> None:
    case = Case(Statements, WEIGHTS["slices"].inputs)
    rules = [lfq.Rule("/add*", activation=8), lfq.Rule("/sub*", activation=8)]
    model = attached(case, phase, rules=rules)
    for quantizer in lfq.quantizers(model).values():
        quantizer.gathering = False  # as in a run, where all qparams are in the graph in every phase
    model(*case.inputs).sum().backward()
    wanted = model.parameters() if phase == "learn" else model.layer.parameters(recurse=False)
    assert all(p.grad is not None for p in wanted)
    floating = copy.deepcopy(model)
    lfq.detach(floating)
    found, expected = outputs(model, case), outputs(floating, case)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)
    assert torch.equal(found, expected) is (phase == "observe")


def test_layers_that_activation_checkpointing_runs_are_quantized() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(self.second, self.first(x), use_reentrant=True))

    placement = lfq.attach(Checkpointed(), weight=4, activation=4, example=torch.randn(3, 6))
    assert [(layer.name, layer.weight.bits) for layer in placement.layers if layer.weight] == [
        ("first", 8),
        ("second", 4),
        ("last", 8),
    ]
