"""A proposal fits its budget, spends it where it counts, and comes back from YAML."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

import lfq_lightning as lfq
from lfq_lightning.analysis.sensitivity import Sensitivity, SensitivityRow
from tests.runs import Net, fit, loader, qat

WIDTHS = (2, 4, 8)


def measured(drops: dict[str, list[float]], sizes: dict[str, int]) -> Sensitivity:
    """Drops at 2, 4 and 8 bits, and sizes in weights."""
    rows = [
        SensitivityRow((name,), bits, sizes[name] * bits // 8, 1 - drop, drop, lfq.QuantSpec(bits=bits).to_dict())
        for name, of_name in drops.items()
        for bits, drop in zip(WIDTHS, of_name, strict=True)
    ]
    return Sensitivity(1.0, True, tuple(rows))


def cost(found: Sensitivity, rules: list[lfq.Rule]) -> tuple[int, float]:
    """Bytes, and the sum of the drops."""
    bits = {rule.match: rule.weight["bits"] if isinstance(rule.weight, dict) else rule.weight.bits for rule in rules}
    rows = [row for row in found.rows if row.bits == bits[row.layers[0]]]
    return sum(row.weight_bytes for row in rows), sum(row.drop for row in rows)


@pytest.mark.quick
def test_bits_go_where_they_count() -> None:
    drops = {"robust": [0.01, 0.001, 0.0], "fragile": [0.5, 0.1, 0.0]}
    found = measured(drops, {"robust": 800, "fragile": 800})
    rules = lfq.propose_bits(found, budget_bytes=1000)
    assert [(rule.match, rule.weight.bits) for rule in rules] == [("robust", 2), ("fragile", 8)]
    assert all(rule.activation == "default" for rule in rules)


@pytest.mark.quick
def test_room_that_is_left_goes_where_it_gains_most() -> None:
    drops = {"small": [0.49, 0.3, 0.21], "flat": [0.73, 0.7, 0.08], "steep": [0.87, 0.56, 0.14]}
    found = measured(drops, {"small": 80, "flat": 400, "steep": 400})
    rules = lfq.propose_bits(found, budget_bytes=661)
    assert [(rule.match, rule.weight.bits) for rule in rules] == [("small", 8), ("flat", 2), ("steep", 8)]


def test_with_room_for_all_every_layer_keeps_its_most_bits() -> None:
    found = measured({"a": [0.3, 0.2, 0.1], "b": [-0.1, 0.0, 0.0]}, {"a": 80, "b": 80})
    assert {rule.weight.bits for rule in lfq.propose_bits(found, 160)} == {8}


@pytest.mark.quick
@given(
    st.lists(
        st.tuples(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.sampled_from([8, 80, 400, 4000])),
        min_size=1,
        max_size=4,
    ),
    st.floats(0.25, 1.0),
)
def test_every_proposal_fits_and_is_near_the_best_of_all(layers: list[tuple[list[float], int]], share: float) -> None:
    drops = {str(i): sorted(of_layer, reverse=True) for i, (of_layer, _) in enumerate(layers)}
    found = measured(drops, {str(i): size for i, (_, size) in enumerate(layers)})
    budget = math.ceil(share * sum(size for _, size in layers))
    size, lost = cost(found, lfq.propose_bits(found, budget))
    assert size <= budget
    of_layer = [[row for row in found.rows if row.layers == (name,)] for name in drops]
    best = min(
        sum(row.drop for row in rows)
        for rows in itertools.product(*of_layer)
        if sum(row.weight_bytes for row in rows) <= budget
    )
    # Greedy on the convex hull is off by less than one layer's change.
    assert lost - best <= max(d[0] for d in drops.values()) + 1e-9


def test_a_width_that_seems_to_gain_makes_the_next_no_dearer() -> None:
    found = measured({"noisy": [0.0, -0.05, 0.0], "other": [0.5, 0.02, 0.0]}, {"noisy": 800, "other": 800})
    rules = lfq.propose_bits(found, budget_bytes=1000)
    assert [(rule.match, rule.weight.bits) for rule in rules] == [("noisy", 2), ("other", 8)]


def test_a_width_that_breaks_the_model_is_taken_last() -> None:
    found = measured({"a": [math.nan, 0.1, 0.0], "b": [0.9, 0.5, 0.0]}, {"a": 800, "b": 800})
    rules = lfq.propose_bits(found, budget_bytes=700)
    assert [(rule.match, rule.weight.bits) for rule in rules] == [("a", 4), ("b", 2)]


@pytest.mark.quick
def test_what_cannot_be_met_is_said() -> None:
    found = measured({"a": [0.1, 0.1, 0.0]}, {"a": 800})
    with pytest.raises(ValueError, match="Found 100, and 200 at the fewest bits"):
        lfq.propose_bits(found, budget_bytes=100)
    own = Sensitivity(1.0, True, (SensitivityRow(("a",), 4, 10, 0.9, 0.1, None),))
    with pytest.raises(ValueError, match="call `sensitivity` with `bits`"):
        lfq.propose_bits(own, budget_bytes=100)


def test_from_measurement_to_a_trained_model_of_the_asked_size(tmp_path: Path) -> None:
    loss = nn.functional.cross_entropy
    found = lfq.sensitivity(Net(), loader(), loss, bits=WIDTHS, higher_is_better=False)
    at_most = sum(row.weight_bytes for row in found.rows if row.bits == 8)
    rules = lfq.propose_bits(found, budget_bytes=at_most * 2 // 3)
    path = tmp_path / "rules.yaml"
    lfq.save_rules(rules, path)
    assert lfq.load_rules(path) == rules or repr(lfq.load_rules(path)) == repr(rules)
    model, _, _ = fit(tmp_path, callback=qat(weight=8, activation=8, rules=lfq.load_rules(path)))
    assert lfq.summarize(model).weight_bytes <= at_most * 2 // 3
    bits = {row.quantizer: row.bits for row in lfq.summarize(model).rows if "weight" in row.quantizer}
    assert bits == {f"{rule.match}.weight_quantizer": rule.weight for rule in rules}


RULES = [
    lfq.Rule("head", weight=8),
    lfq.Rule("blocks.*.conv1", weight=None, activation=4),
    lfq.Rule("first", weight=lfq.QuantSpec(bits=4, granularity="per_channel", quant_min=-7, quant_max=7)),
]


@pytest.mark.quick
def test_rules_come_back_from_yaml_in_the_callback_and_in_hydra(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rules.yaml"
    lfq.save_rules(RULES, path)
    expected = [rule.to_dict() for rule in RULES]
    assert OmegaConf.to_container(OmegaConf.load(path)) == {"rules": expected}
    assert list(map(repr, lfq.load_rules(path))) == [repr(lfq.Rule(**values)) for values in expected]
    by_hand = lfq.QuantizationAwareTraining(rules=OmegaConf.load(path).rules)
    target = {"_target_": "lfq_lightning.QuantizationAwareTraining"}
    merged = instantiate(OmegaConf.merge(target, OmegaConf.load(path)))
    loaded = instantiate({**target, "rules": {"_target_": "lfq_lightning.load_rules", "path": str(path)}})
    assert repr(by_hand) == repr(merged) == repr(loaded)
    assert len(merged.rules) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- match: a", "list under the key `rules`"),
        ("rules: [3]", "list under the key `rules`"),
        ("rules: [{match: a, wait: 4}]", "wait"),
        ("rules: [{match: a, weight: 77}]", "between 2 and 16"),
        ("rules: [", "Found a file that is none"),
    ],
)
def test_a_file_without_rules_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        lfq.load_rules(path)


def test_a_rule_by_type_has_no_plain_values(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="match a glob of names"):
        lfq.save_rules([lfq.Rule(nn.Linear, weight=4)], tmp_path / "rules.yaml")
    assert not (tmp_path / "rules.yaml").exists()


def test_printed_rules_can_be_pasted() -> None:
    printed = repr(RULES)
    names: dict[str, Any] = {}
    exec(f"from lfq_lightning import QuantSpec, Rule; again = repr({printed})", names)
    assert names["again"] == printed
