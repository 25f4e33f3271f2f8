"""Sharded weights: FSDP2 under ModelParallelStrategy follows DDP, and what cannot work is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader

import lfq_lightning as lfq
from lfq_lightning.training.trainer.strategy import check_strategy
from tests.ranks import FSDP, NormFree, alone, operations, run, start_two
from tests.runs import Net, images, qat, trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    directory = tmp_path_factory.mktemp("sharded")
    return directory, start_two(directory, "fsdp")


def state(runs: tuple[Path, dict[str, str]], name: str) -> dict[str, Any]:
    directory, failed = runs
    path = directory / name / "quantizers.pt"
    assert path.exists(), failed.get(name, f"not reached after {list(failed)}")
    return torch.load(path)


def test_sharded_weights_give_the_qparams_of_one_process(runs: Any, tmp_path: Path) -> None:
    run(tmp_path, ranks=1)
    found, expected = state(runs, "sharded"), torch.load(tmp_path / "quantizers.pt")
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5 if "zero_point" in key else 0.0, msg=key)


def test_what_operations_read_is_quantized_alike_where_it_is_sharded(runs: Any, tmp_path: Path) -> None:
    operations(tmp_path, 1)
    found, expected = state(runs, "operations"), torch.load(tmp_path / "quantizers.pt")
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5 if "zero_point" in key else 0.0, msg=key)


def test_scales_learn_alone_where_weights_are_sharded(runs: Any, tmp_path: Path) -> None:
    alone(tmp_path, 1, NormFree)
    found, expected = state(runs, "alone"), torch.load(tmp_path / "quantizers.pt")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5 if "zero_point" in key else 0.0, msg=key)


def test_in_the_users_optimizer_sharded_weights_give_the_qparams_of_ddp(runs: Any) -> None:
    found, expected = state(runs, "user"), state(runs, "user by DDP")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", [name for name in FSDP if "resumed" in name])
def test_a_sharded_run_resumes_bit_equal_from_either_kind_of_checkpoint(runs: Any, name: str) -> None:
    found, expected = state(runs, name), state(runs, "user" if name.startswith("user") else "saved")
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_whole_checkpoint_of_a_sharded_run_loads_into_one_process(runs: Any) -> None:
    expected = state(runs, "whole")
    model = lfq.load_from_checkpoint(NormFree, runs[0] / "whole/epoch=3.ckpt").eval()
    found = model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert model(torch.randn(2, 1, 8, 8)).isfinite().all()


@pytest.mark.parametrize("kind", ["saved", "whole"])
def test_sharded_weights_predict_from_either_kind_of_checkpoint_as_one_process_does(runs: Any, kind: str) -> None:
    directory, failed = runs
    path = directory / "predicted" / f"{kind}.pt"
    assert path.exists(), failed.get("predicted", f"not reached after {list(failed)}")
    model = lfq.load_from_checkpoint(NormFree, directory / "whole/epoch=3.ckpt").eval()
    with torch.no_grad():
        expected = [model(x) for x, _ in DataLoader(images(8))]
    torch.testing.assert_close(torch.load(path), expected)


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_rewrite_parameters_are_refused(tmp_path: Path, strategy: type) -> None:
    made = trainer(tmp_path, [qat()])
    made.strategy.__class__ = strategy
    with pytest.raises(ValueError, match=f"{strategy.__name__} flattens"):
        check_strategy(made)


def test_tensor_parallelism_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, [qat()])
    made.strategy.__class__, made.strategy._tensor_parallel_size = ModelParallelStrategy, 2
    with pytest.raises(ValueError, match="Found ModelParallelStrategy with tensor_parallel_size=2"):
        check_strategy(made)


def test_a_model_that_is_sharded_already_is_refused_with_the_remedy(tmp_path: Path) -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(*Net().children())
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"DTensor in '0'.*`fully_shard` in `configure_model`"):
            lfq.attach(model)
        assert not lfq.quantizers(model)
    finally:
        destroy_process_group()
