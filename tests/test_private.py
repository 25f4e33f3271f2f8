"""Private places of torch, Lightning, onnxruntime, Triton and Python are still where they were, and mean the same."""

from __future__ import annotations

import ast
import io
import os
import re
from pathlib import Path

import fsspec
import lightning as L
import onnx
import onnxruntime
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from lfq_lightning import private
from tests.runs import Net, loader, trainer

pytestmark = pytest.mark.quick

PACKAGE = Path(private.__file__).parent


def test_a_transform_of_torch_func_is_seen_and_so_are_its_tensors() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append((private.transforms_active(), private.is_wrapped(x)))
        return x.sum()

    look(torch.ones(2))
    torch.func.grad(look)(torch.ones(2))
    assert seen == [(False, False), (True, True)]


def test_a_tensor_batched_in_the_old_way_is_seen() -> None:
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            seen.append(private.is_legacy_batched(gradient))
            return gradient

    x = torch.ones(3, requires_grad=True)
    torch.autograd.grad(Look.apply(x), x, torch.eye(3), is_grads_batched=True)
    torch.autograd.grad(Look.apply(x), x, torch.ones(3))
    assert seen == [True, False]


def test_lists_of_tensors_are_computed_in_one_call() -> None:
    lows, highs = [torch.ones(2), torch.ones(3)], [torch.zeros(2), torch.zeros(3)]
    private.zero_each_(lows)
    private.add_each_(lows, 5)
    private.subtract_each_(lows, 2)
    private.minimum_each_(lows, [torch.ones(2), torch.full((3,), 9.0)])
    private.maximum_each_(highs, lows)
    private.copy_each_(lows, [torch.full((2,), 7.0), torch.full((3,), 8.0)])
    assert [x.tolist() for x in (*lows, *highs)] == [[7, 7], [8, 8, 8], [1, 1], [3, 3, 3]]


def test_products_of_groups_of_rows_are_computed() -> None:
    if private.GROUPED_PRODUCT is None:
        pytest.skip("this torch has none")
    x, weights, ends = torch.ones(4, 16), torch.ones(2, 16, 8), torch.tensor([3, 4], dtype=torch.int32)
    assert torch.equal(private.GROUPED_PRODUCT(x, weights, offs=ends), torch.full((4, 8), 16.0))


def test_a_change_in_place_makes_a_new_version() -> None:
    x = torch.ones(2)
    before = private.version_of(x)
    x.add_(1)
    assert private.version_of(x) == before + 1


def test_a_tensor_without_values_is_computed_with() -> None:
    with private.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made = mode.from_tensor(torch.zeros(2)) + 1
    assert isinstance(made, private.FakeTensor)
    assert made.shape == (2,)


def test_a_tensor_that_only_its_graph_holds_is_referred_to() -> None:
    x = torch.ones(2, requires_grad=True)
    square = x * 1
    z, known = (square * square).sum(), private.TensorWeakRef(square)
    del square
    assert torch.equal(known(), torch.ones(2))
    z.backward()
    assert known() is None


def test_whoever_looks_after_saved_tensors_is_seen() -> None:
    assert not private.saved_tensors_are_hooked()
    with torch.autograd.graph.save_on_cpu():
        assert private.saved_tensors_are_hooked()


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_every_batch_norm_is_one(kind: type[nn.Module]) -> None:
    assert issubclass(kind, private.BatchNorm)


def test_a_compiled_module_knows_the_one_it_was_made_of() -> None:
    module = nn.Linear(2, 2)
    compiled = torch.compile(module)
    assert private.uncompiled(compiled) is module is private.uncompiled(module)
    assert private.is_compiled(compiled)
    assert not private.is_compiled(module)
    assert list(compiled.state_dict()) == [f"{private.COMPILED}.weight", f"{private.COMPILED}.bias"]


def test_a_module_that_converts_state_dicts_is_seen() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert not private.converts_when_loading(model)
    model[0].register_load_state_dict_pre_hook(lambda *_: None)
    assert private.converts_when_loading(model)


def test_optimizers_take_hooks_and_are_seen_as_they_are_made() -> None:
    seen: list[torch.optim.Optimizer] = []
    parameter = nn.Parameter(torch.ones(1))
    with private.each_optimizer_made(seen.append):
        made = [torch.optim.SGD([parameter], 0.1), torch.optim.AdamW([parameter])]
    assert seen == made
    torch.optim.SGD([parameter], 0.1)
    assert len(seen) == 2
    assert private.takes_step_hooks(made[0])
    assert not private.takes_step_hooks(object())


def test_nested_inputs_are_taken_apart() -> None:
    nested = {"a": (torch.ones(1), 2), "b": [torch.zeros(1)]}
    assert [x for x in private.tree_leaves(nested) if not isinstance(x, Tensor)] == [2]
    assert private.tree_map_only(Tensor, float, nested) == {"a": (1.0, 2), "b": [0.0]}
    assert private.tree_map(float, nested) == {"a": (1.0, 2.0), "b": [0.0]}


def test_the_operators_of_back_ends_are_registered() -> None:
    operators = private.quantized_decomposed()
    codes = operators.quantize_per_tensor(torch.tensor([0.5]), 0.5, 3, -128, 127, torch.int8)
    assert codes.tolist() == [4]
    scales, zeros = torch.tensor([2.0]), torch.tensor([1])
    assert operators.dequantize_per_channel(codes[None], scales, zeros, 0, -128, 127, torch.int8).tolist() == [[6.0]]


@pytest.mark.filterwarnings("ignore")  # torch's exporter, about itself
def test_the_exporter_notes_which_module_a_node_comes_from() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh()))
    program = torch.onnx.export(model, (torch.ones(1, 2),), dynamo=True, verbose=False)
    notes = {n.op_type: {note.key: note.value for note in n.metadata_props} for n in program.model_proto.graph.node}
    assert ast.literal_eval(notes["Tanh"][private.MODULES_OF_NODE])[:-1] == ["", "1", "1.0"]


class LastTwo(nn.Module):
    """Runs a part of its list."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.all[1:]:
            x = layer(x)
        return x


@pytest.mark.filterwarnings("ignore")  # as above
def test_the_note_on_a_layer_in_a_part_of_a_list_names_the_layer() -> None:
    program = torch.onnx.export(LastTwo(), (torch.randn(2, 4),), dynamo=True, verbose=False)
    notes = [{n.key: n.value for n in node.metadata_props} for node in program.model_proto.graph.node]
    scopes = [ast.literal_eval(note[private.MODULES_OF_NODE]) for note in notes]
    assert {private.whole_name(scope) for each in scopes for scope in each} >= {"all.1", "all.2"}


def test_a_session_that_cannot_be_made_fails_as_it_did() -> None:
    product = onnx.helper.make_node("MatMul", ["x", "x"], ["y"])  # of matrices that do not fit each other
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3]) for name in "xy")
    graph = onnx.helper.make_graph([product], "product", [x], [y])
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    with pytest.raises(private.session_failure()):
        onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def test_a_module_knows_its_trainer_and_the_trainer_its_loaders(tmp_path: Path) -> None:
    model, data, seen = Net(), loader(), []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append((private.trainer_of(pl_module), private.training_loaders(trainer).flattened))

    assert private.trainer_of(model) is None
    made = trainer(tmp_path, [Look()], max_epochs=1)
    made.fit(model, data)
    assert seen == [(made, [data])]


def test_what_lightning_averages_is_found(tmp_path: Path) -> None:
    class Look(WeightAveraging):
        def on_train_end(self, *args: object) -> None:
            assert isinstance(private.averaged_model(self), torch.optim.swa_utils.AveragedModel)
            super().on_train_end(*args)

    callback = Look()
    assert private.averaged_model(callback) is None
    trainer(tmp_path, [callback], max_epochs=1).fit(Net(), loader())


def test_strategies_tell_what_they_were_given() -> None:
    assert private.ddp_options(DDPStrategy(static_graph=True)) == {"static_graph": True}
    assert private.tensor_parallel_size(ModelParallelStrategy(tensor_parallel_size=2)) == 2


def test_files_are_loaded_from_where_lightning_loads(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "x.ckpt")
    whole = (tmp_path / "x.ckpt").read_bytes()
    with fsspec.open("memory://private/x.ckpt", "wb") as file:
        file.write(whole)
    for path in (tmp_path / "x.ckpt", "memory://private/x.ckpt", io.BytesIO(whole)):
        assert private.load_file(path, map_location="cpu", weights_only=True) == {"a": 1}


def test_a_variable_of_the_environment_is_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    key = private.environment_key("LFQ_BACKEND")
    monkeypatch.delenv("LFQ_BACKEND", raising=False)
    assert key not in private.ENVIRONMENT
    monkeypatch.setenv("LFQ_BACKEND", "reference")
    assert key in private.ENVIRONMENT
    assert private.ENVIRONMENT is not os.environ  # which would be slow


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_of_others_stand_in_one_file(path: Path) -> None:
    found = re.findall(r"\btorch\._[a-zA-Z]\w*|(?:import|from) (?:torch|lightning|onnx)[\w.]*\._\w+", path.read_text())
    assert path.name == "private.py" or not found


def test_what_triton_s_launchers_take_is_what_they_are_given() -> None:
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    from lfq_lightning.private_triton import can_launch

    class Other:
        def __call__(self, gridX, gridY, gridZ, function, stream, *rest) -> None:
            pass

    assert can_launch(driver.CudaLauncher)
    assert not can_launch(Other)


def test_who_wants_to_be_told_of_triton_s_launches_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = pytest.importorskip("triton").knobs.runtime
    from lfq_lightning.private_triton import launches_are_hooked

    assert not launches_are_hooked()
    for hook in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patched:
            chain = getattr(runtime, hook)
            if chain is None:  # Triton before 3.6 has one hook, or none
                patched.setattr(runtime, hook, lambda _: None)
            else:
                patched.setattr(chain, "calls", [lambda _: None])
            assert launches_are_hooked()
    assert not launches_are_hooked()
