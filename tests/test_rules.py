"""Rule: what it matches, what it allows, and that it survives configuration files."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lfq_lightning import QuantizationAwareTraining, QuantSpec, Rule

pytestmark = pytest.mark.quick

RULES = [
    Rule("head", weight=8, activation=None),
    Rule("*.fc[12]"),
    Rule("encoder.*", weight=QuantSpec(bits=4, granularity="per_group", group_size=32)),
    Rule("a", weight={"bits": 4}, activation={"bits": 8, "symmetric": False}),
    Rule(nn.Linear, weight=None),
    Rule("x", activation=4),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_rule_prints_as_the_call_that_makes_it_and_survives_pickle(rule: Rule) -> None:
    assert eval(repr(rule), {"Rule": Rule, "QuantSpec": QuantSpec, "Linear": nn.Linear}) == rule
    assert pickle.loads(pickle.dumps(rule)) == rule


def test_a_glob_matches_dotted_names_and_case_counts() -> None:
    rule = Rule("encoder.*.fc1")
    assert rule.matches("encoder.layers.0.fc1", nn.Linear)
    assert not rule.matches("encoder.fc1", nn.Linear)
    assert not rule.matches("encoder.layers.0.FC1", nn.Linear)
    assert not rule.matches("model.encoder.layers.0.fc1", nn.Linear)


def test_a_type_matches_exactly_that_type() -> None:
    class Own(nn.Linear):
        pass

    assert Rule(nn.Linear).matches("anything", nn.Linear)
    assert not Rule(nn.Linear).matches("anything", Own)


HYDRA_RULES = """
- _target_: lfq_lightning.Rule
  match: encoder.*
  weight: {_target_: lfq_lightning.QuantSpec, bits: 4, granularity: per_channel}
  activation: null
- _target_: lfq_lightning.Rule
  match: head
  weight: {bits: 8}
- _target_: lfq_lightning.Rule
  match: {_target_: hydra.utils.get_class, path: torch.nn.Linear}
  weight: 3
"""


def test_a_list_of_rules_survives_hydra() -> None:
    rules = instantiate(OmegaConf.create(yaml.safe_load(HYDRA_RULES)), _convert_="all")
    assert rules == [
        Rule("encoder.*", weight=QuantSpec(bits=4, granularity="per_channel"), activation=None),
        Rule("head", weight={"bits": 8}),
        Rule(nn.Linear, weight=3),
    ]


def test_a_list_of_rules_survives_hydra_without_conversion() -> None:
    rules = instantiate(OmegaConf.create(yaml.safe_load(HYDRA_RULES)))
    assert [rule.match for rule in rules] == ["encoder.*", "head", nn.Linear]


def test_a_rule_holds_plain_values_whatever_it_was_given() -> None:
    rule = Rule("head", weight=OmegaConf.create({"bits": 8}))
    assert rule == Rule("head", weight={"bits": 8})
    assert not isinstance(rule.weight, DictConfig)


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"match": ""}, ValueError, "`match` must name something. Found an empty glob"),
        ({"match": 3}, TypeError, "`match` must be a glob on module names or a module type. Found 3"),
        ({"match": int}, TypeError, "`match` must be a glob on module names or a module type. Found <class 'int'>"),
        ({"match": nn.Linear(1, 1)}, TypeError, "`match` must be a glob on module names or a module type"),
        ({"match": "a", "weight": 1}, ValueError, "`bits` must be between 2 and 16. Found 1"),
        ({"match": "a", "activation": "eight"}, TypeError, "`activation` must be a number of bits"),
        ({"match": "a", "weight": {"bit": 1}}, ValueError, "`weight` has unknown keys"),
        (
            {"match": "a", "activation": {"granularity": "per_group", "group_size": 4}},
            ValueError,
            "per tensor, channel or token",
        ),
    ],
    ids=str,
)
def test_a_wrong_rule_raises_when_it_is_made(arguments: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        Rule(**arguments)


@pytest.mark.parametrize(
    ("rules", "kind", "words"),
    [
        (
            [Rule("a"), {"match": "b", "wieght": 4}],
            ValueError,
            r"`rules\[1\]` has unknown keys \['wieght'\]. Known are",
        ),
        ([{"weight": 4}], TypeError, r"`rules\[0\]`: .* missing .*'match'"),
        ([{"match": "b", "weight": {"bits": 1}}], ValueError, r"`rules\[0\]`: `weight`: `bits` must be between 2 and"),
        (["head"], TypeError, r"`rules\[0\]` must be a Rule or a mapping of its fields. Found 'head'"),
    ],
    ids=str,
)
def test_a_wrong_rule_of_the_callback_is_named_by_its_place(rules: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        QuantizationAwareTraining(rules=rules)


def test_a_wrong_schedule_of_the_callback_is_named() -> None:
    with pytest.raises(ValueError, match=r"`schedule` has unknown keys \['estmate'\]. Known are observe, estimate"):
        QuantizationAwareTraining(schedule={"estmate": 3})
    with pytest.raises(ValueError, match="`schedule`: Phases start in the order"):
        QuantizationAwareTraining(schedule={"observe": 3})


@pytest.mark.parametrize("rules", [Rule("head", weight=8), {"match": "head"}, "head"], ids=str)
def test_one_rule_without_brackets_is_refused_with_the_remedy(rules: Any) -> None:
    with pytest.raises(TypeError, match=r"`rules` must be a list of rules, even of one\. Found .*: put it in brackets"):
        QuantizationAwareTraining(rules=rules)
