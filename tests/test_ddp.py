"""Two processes in many settings: equal qparams on both, and the same as one process where that is promised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.training.trainer.strategy import check_strategy
from tests.ranks import DDP, ByHand, alone, fifty, from_zero, kept, operations, run, start_two
from tests.runs import Net, qat, trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Every scenario's folder, after one process has left a checkpoint that two resume from."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("ranks")
    run(directory / "one", ranks=1, callbacks=kept(directory / "one"), max_epochs=4)
    return directory, start_two(directory, "ddp")


def state(runs: tuple[Path, dict[str, str]], name: str) -> dict[str, Tensor]:
    directory, failed = runs
    assert name not in failed, failed[name]
    path = directory / name / "quantizers.pt"
    assert path.exists(), f"not reached after {list(failed)}: {list(failed.values())[:1]}"
    return torch.load(path)


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert list(found) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=rtol, atol=1e-5 if "zero_point" in key else 0.0, msg=key)


@pytest.mark.parametrize("name", DDP)
def test_two_ranks_keep_equal_qparams(runs: Any, name: str) -> None:
    found = state(runs, name)
    moved = [not torch.equal(found[key], found[f"{key}_reference"]) for key in found if key.endswith("quantizer.scale")]
    assert any(moved)


@pytest.mark.parametrize(("name", "options"), [("fifty", {}), ("fifty accumulated", {"accumulate_grad_batches": 2})])
def test_two_ranks_with_half_the_batch_follow_one_process_with_the_whole(
    runs: Any, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    found = state(runs, name)
    fifty(tmp_path, 1, **options)
    assert_near(found, torch.load(tmp_path / "quantizers.pt"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_switch_of_phase_ends_the_run_where_ranks_differ(runs: Any, rank: int) -> None:
    state(runs, "batch norm")  # all went well before
    said = (runs[0] / f"apart/rank{rank}.txt").read_text()
    assert said.startswith("Scales and zero points must be equal on every rank. Found a difference of 0.")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_collapse_that_one_rank_sees_ends_the_run_on_both(runs: Any, rank: int) -> None:
    state(runs, "batch norm")  # all went well before
    said = (runs[0] / f"raised/rank{rank}.txt").read_text()
    assert said.startswith("Quantizers collapsed: first.input_quantizer: it clamps")


def test_how_ddp_keeps_its_buckets_changes_nothing(runs: Any) -> None:
    found, expected = state(runs, "static graph false"), state(runs, "plain")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_static_graph_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, [qat()], strategy=DDPStrategy(static_graph=True))
    with pytest.raises(ValueError, match=r"Found DDPStrategy\(static_graph=True\): leave it out"):
        check_strategy(made)


def test_in_the_users_optimizer_frozen_qparams_keep_still_despite_its_momentum(runs: Any) -> None:
    found, expected = state(runs, "user frozen"), state(runs, "user")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_accumulation_by_hand_without_synchronising_equals_the_trainers(runs: Any, tmp_path: Path) -> None:
    run(tmp_path, ByHand, ranks=1)
    assert_near(state(runs, "no sync"), torch.load(tmp_path / "quantizers.pt"))


def test_ranks_with_unequal_batches_observe_the_whole_batch(runs: Any) -> None:
    whole, parts = state(runs, "plain"), state(runs, "uneven")
    # The first batch is observed before any weight moves.
    key = "first.input_quantizer.observer.maximum"
    assert torch.equal(parts[key], whole[key])


def test_two_ranks_go_on_from_the_checkpoint_of_one(runs: Any) -> None:
    assert_near(state(runs, "resumed"), torch.load(runs[0] / "one/quantizers.pt"), rtol=1e-4)


def test_one_rank_goes_on_from_the_checkpoint_of_two(runs: Any, tmp_path: Path) -> None:
    expected = state(runs, "saved")
    path = runs[0] / "saved/epoch=2.ckpt"
    run(tmp_path, ranks=1, callbacks=kept(tmp_path), max_epochs=4, ckpt_path=path)
    assert_near(torch.load(tmp_path / "quantizers.pt"), expected, rtol=1e-4)


def test_a_collapsed_quantizer_starts_over_on_both_ranks(runs: Any) -> None:
    found, expected = state(runs, "reinit"), state(runs, "plain")
    key = "second.input_quantizer.scale"
    torch.testing.assert_close(found[key], expected[key], rtol=0.2, atol=0.0)


def test_layers_that_one_rank_reaches_or_that_are_reached_late_learn_on_both_ranks(runs: Any) -> None:
    found = state(runs, "branches")
    for name in ("lone", "later", "lone_later"):
        key = f"{name}.input_quantizer.scale"
        assert not torch.equal(found[key], found[f"{key}_reference"]), name
        assert found[f"{name}.input_quantizer.observer.maximum"].isfinite().all(), name


def test_a_weight_that_grows_from_zero_on_two_ranks_follows_one_process(runs: Any, tmp_path: Path) -> None:
    found = state(runs, "from zero")
    from_zero(tmp_path, 1)
    assert_near(found, torch.load(tmp_path / "quantizers.pt"))
    assert found["second.weight_quantizer.observer.blank"].tolist() == [False, True, False, False]
    assert found["second.weight_quantizer.scale"][1] > 1e-3


def test_scales_that_learn_alone_on_two_ranks_follow_one_process_through_batchnorm_too(
    runs: Any, tmp_path: Path
) -> None:
    alone(tmp_path, 1)
    assert_near(state(runs, "alone"), torch.load(tmp_path / "quantizers.pt"))


def test_what_operations_read_follows_one_process_on_two_ranks(runs: Any, tmp_path: Path) -> None:
    found = state(runs, "operations")
    operations(tmp_path, 1)
    assert_near(found, torch.load(tmp_path / "quantizers.pt"))
    named = {key.rpartition("_quantizer")[0] for key in found if key.endswith("quantizer.scale")}
    assert {"attention.in_proj_weight", "recurrent.weight_hh_l0", "own", "tied.weight", "add_input"} <= named
    assert "attention.scaled_dot_product_attention_query" in named


def test_unused_codes_for_a_value_that_one_rank_saw_are_told_once(runs: Any) -> None:
    state(runs, "unused")
    first, second = ((runs[0] / f"unused/rank{rank}.txt").read_text() for rank in (0, 1))
    assert first.startswith("Most codes of quantizers are unused: first.input_quantizer: ")
    assert first.count("first.input_quantizer") == 1
    assert not second


def test_frozen_layers_keep_still_or_learn_alone_on_both_ranks(runs: Any) -> None:
    keep, learn = state(runs, "frozen body"), state(runs, "frozen body learns")
    for key in (key for key in keep if key.endswith("quantizer.scale")):
        still = torch.equal(keep[key], keep[f"{key}_reference"])
        assert still == (not key.startswith("head")), key
        assert not torch.equal(learn[key], learn[f"{key}_reference"]), key


def test_a_run_with_every_argument_and_technique_ends_on_both_ranks(tmp_path: Path) -> None:
    assert start_two(tmp_path, "everything") == {}


def test_sync_batchnorm_leaves_quantized_layers_alone() -> None:
    model = Net()
    lfq.attach(model, weight=4, activation=4)
    before = lfq.quantizers(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # what the Trainer does; it runs on a GPU alone
    assert isinstance(converted.norm, nn.SyncBatchNorm)
    assert list(map(id, lfq.quantizers(converted).values())) == list(map(id, before.values()))
