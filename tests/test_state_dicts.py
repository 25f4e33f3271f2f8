"""State dicts of quantized models hold tensors alone, and say by themselves what belongs to a quantizer."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.quantizer.saved import NOTE
from lfq_lightning.schedule import PHASES
from tests.runs import Net, fit, images, loader, trainer

pytestmark = pytest.mark.quick

X = images().tensors[0][:4]

State = dict[str, Any]


def learned(phase: Any = "learn") -> Net:
    model = Net()
    lfq.attach(model, weight=4, activation=4)
    lfq.calibrate(model, [X])
    lfq.set_phase(model, phase)
    return model


def attached() -> Net:
    model = Net()
    lfq.attach(model, weight=4, activation=4)
    return model


def through_safetensors(state: State) -> State:
    torch_files = pytest.importorskip("safetensors.torch")
    return torch_files.load(torch_files.save(state))


def in_place_mean(state: State) -> State:
    mean = {key: value.clone() for key, value in state.items()}
    for key, value in state.items():
        mean[key] += value
        mean[key] += value
        if mean[key].is_floating_point():
            mean[key] /= 3
        else:
            mean[key] //= 3
    return mean


LOOPS: dict[str, Callable[[State], State]] = {
    "clones": lambda state: {key: value.clone() for key, value in state.items()},
    "mean of a stack": lambda state: {k: torch.stack([v, v, v]).float().mean(0) for k, v in state.items()},
    "sum over count": lambda state: {key: (value + value + value) / 3 for key, value in state.items()},
    "in-place mean": in_place_mean,
    "moving average": lambda state: {k: v.float().clone().mul_(0.9).add_(v, alpha=0.1) for k, v in state.items()},
    "lerp": lambda state: {k: torch.lerp(v.float(), v.float(), 0.3) for k, v in state.items()},
    "half": lambda state: {key: value.half() for key, value in state.items()},
    "bfloat16": lambda state: {key: value.bfloat16() for key, value in state.items()},
    "copies": lambda state: {key: torch.empty_like(value).copy_(value) for key, value in state.items()},
    "safetensors": through_safetensors,
}


@pytest.mark.parametrize("loop", LOOPS)
def test_what_serves_a_float_state_dict_serves_a_quantized_one(loop: str) -> None:
    source, target = learned(), attached()
    assert all(isinstance(value, Tensor) for value in source.state_dict().values())
    target.load_state_dict(LOOPS[loop](source.state_dict()))
    for name, quantizer in lfq.quantizers(source).items():
        assert lfq.quantizers(target)[name].describe() == quantizer.describe()
    torch.testing.assert_close(target.eval()(X), source.eval()(X), rtol=0.1, atol=0.1)


def test_the_size_of_a_state_is_the_same_in_every_phase() -> None:
    model = learned()
    shapes = set()
    for phase in PHASES:
        lfq.set_phase(model, phase)
        shapes.add(tuple((key, value.shape) for key, value in model.state_dict().items()))
    assert len(shapes) == 1


def test_a_mean_over_phases_is_in_one_of_them() -> None:
    early, late, target = attached().state_dict(), learned().state_dict(), attached()
    target.load_state_dict({key: 0.1 * early[key] + 0.9 * late[key] for key in late})
    assert {quantizer.phase for quantizer in lfq.quantizers(target).values()} == {"learn"}


def test_a_state_loads_by_assignment_and_in_part() -> None:
    source, target = learned(), attached()
    target.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(target.eval()(X), source.eval()(X))
    state = {key: value for key, value in source.state_dict().items() if not key.endswith("_extra_state")}
    target = attached()
    missing = target.load_state_dict(state, strict=False).missing_keys
    assert missing == [key for key in source.state_dict() if key.endswith("_extra_state")]
    assert {quantizer.phase for quantizer in lfq.quantizers(target).values()} == {"off"}


@pytest.mark.parametrize("odd", [torch.zeros(3), torch.full((400,), torch.nan), {}, None, "learn"])
def test_an_extra_state_of_another_kind_is_refused_with_the_reason(odd: Any) -> None:
    model = attached()
    with pytest.raises(ValueError, match=r"extra state must be what `state_dict\(\)` gave. Found"):
        model.load_state_dict({**model.state_dict(), "head.weight_quantizer._extra_state": odd})


def test_a_file_whose_quantizers_are_described_by_dicts_loads_and_resumes(tmp_path: Path) -> None:
    path = tmp_path / "old.ckpt"
    path.write_bytes(gzip.decompress(Path(__file__).with_name("checkpoint_of_dicts.ckpt.gz").read_bytes()))
    old = torch.load(path, weights_only=True)
    model = lfq.load_from_checkpoint(Net, path).eval()
    torch.testing.assert_close(model(X), old["expected"])
    assert {quantizer.phase for quantizer in lfq.quantizers(model).values()} == {"learn"}
    model, made, _ = fit(tmp_path / "resumed", Net(width=2), ckpt_path=path, max_epochs=4)
    assert made.global_step == old["global_step"] + len(loader())
    reference = old["state_dict"]["second.input_quantizer.scale_reference"]
    assert torch.equal(model.second.input_quantizer.scale_reference, reference)
    assert not torch.equal(model.second.input_quantizer.scale, old["state_dict"]["second.input_quantizer.scale"])


# ---- whose is a key ------------------------------------------------------------------------------------------------


class Foreign(Net):
    """Has modules of its own with the names that `attach` gives, one of them with an extra state."""

    class Scaler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.full((1,), 2.0))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

        def get_extra_state(self) -> Tensor:
            return torch.arange(400, dtype=torch.uint8)

        def set_extra_state(self, state: Tensor) -> None:
            assert torch.equal(state, self.get_extra_state())

    def __init__(self) -> None:
        super().__init__()
        self.input_quantizer = self.Scaler()
        self.norm.weight_quantizer = self.Scaler()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.input_quantizer(x))


def test_a_users_module_with_the_name_of_a_quantizer_is_the_users(tmp_path: Path) -> None:
    model, made, _ = fit(tmp_path, Foreign())
    made.save_checkpoint(tmp_path / "x.ckpt")
    again = lfq.load_from_checkpoint(Foreign, tmp_path / "x.ckpt").eval()
    assert again.input_quantizer.factor != 2.0
    assert torch.equal(again(X), model.eval()(X))
    back = Foreign()
    lfq.load_state_dict(back, model.state_dict())
    assert torch.equal(back.input_quantizer.factor, model.input_quantizer.factor)


# ---- the note ------------------------------------------------------------------------------------------------------


def test_a_plain_load_of_a_quantized_checkpoint_names_the_remedy_first(tmp_path: Path) -> None:
    _, made, _ = fit(tmp_path, callbacks=[ModelCheckpoint(tmp_path, "weights", save_weights_only=True)])
    made.save_checkpoint(tmp_path / "x.ckpt")
    remedy = 'Unexpected key\\(s\\) in state_dict: "quantized by lfq_lightning: use lfq_lightning.load_from_checkpoint'
    for path in (tmp_path / "x.ckpt", tmp_path / "weights.ckpt"):
        with pytest.raises(RuntimeError, match=remedy):
            Net.load_from_checkpoint(path)
        with pytest.raises(RuntimeError, match=remedy):
            trainer(tmp_path, []).test(Net(), loader(), ckpt_path=path, weights_only=True)
        quantized = attached()
        quantized.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        assert {quantizer.phase for quantizer in lfq.quantizers(quantized).values()} == {"learn"}
        assert NOTE not in quantized.state_dict()
