"""QuantSpec: what it allows, what it says, and that it survives configuration files."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate
from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lfq_lightning import LearnableFakeQuantize, QuantSpec
from lfq_lightning.spec import activation_spec, weight_spec

pytestmark = pytest.mark.quick

PLAIN = (bool, int, float, str, type(None))


@st.composite
def specs(draw: st.DrawFn) -> QuantSpec:
    """Any valid specification."""
    bits = draw(st.integers(2, 16))
    granularity = draw(st.sampled_from(["per_tensor", "per_channel", "per_group"]))
    symmetric = draw(st.booleans())
    quant_min = draw(st.none() | st.integers(-(2**15), 2**15 - 1))
    codes = draw(st.integers(2, 2**bits))
    return QuantSpec(
        bits=bits,
        symmetric=symmetric,
        granularity=granularity,
        axis=draw(st.none() | st.integers(-3, 3)) if granularity == "per_channel" else None,
        group_size=draw(st.integers(1, 256)) if granularity == "per_group" else None,
        signed=draw(st.none() | st.booleans()) if symmetric else draw(st.sampled_from([None, False])),
        quant_min=quant_min,
        quant_max=None if quant_min is None else min(quant_min + codes - 1, 2**16),
        observer=draw(st.sampled_from(["minmax", "moving_average", "percentile", "mse", "lsq", "lsq+"])),
        grad_factor=draw(st.just("lsq") | st.floats(1e-6, 1e3)),
        saturation=draw(st.sampled_from(["lsq", "exclusive", "inclusive"])),
        scale_domain=draw(st.sampled_from(["linear", "log", "power_of_two"])),
        learn_zero_point=draw(st.booleans()),
        lr_factor=draw(st.sampled_from(["path", "bits"]) | st.floats(1e-3, 1e3)),
    )


@given(specs())
def test_a_specification_prints_as_the_call_that_makes_it(spec: QuantSpec) -> None:
    assert eval(repr(spec)) == spec


@given(specs())
def test_a_specification_survives_plain_values_yaml_and_pickle(spec: QuantSpec) -> None:
    values = spec.to_dict()
    assert all(type(value) in PLAIN for value in values.values())
    assert QuantSpec(**values) == spec
    assert QuantSpec(**yaml.safe_load(yaml.safe_dump(values))) == spec
    assert pickle.loads(pickle.dumps(spec)) == spec


@given(specs())
def test_a_specification_survives_hydra(spec: QuantSpec) -> None:
    config = OmegaConf.create({"_target_": "lfq_lightning.QuantSpec", **spec.to_dict()})
    made = instantiate(OmegaConf.create(OmegaConf.to_yaml(config)))
    assert made == spec
    assert all(type(value) in PLAIN for value in made.to_dict().values())


@given(specs())
def test_a_list_and_a_mapping_of_specifications_survive_hydra_without_conversion(spec: QuantSpec) -> None:
    node = {"_target_": "lfq_lightning.QuantSpec", **spec.to_dict()}
    assert list(instantiate(OmegaConf.create([node, node]))) == [spec, spec]
    assert instantiate(OmegaConf.create({"weight": node})).weight == spec


@given(specs())
def test_the_codes_are_as_many_as_the_bits_hold_unless_a_range_is_given(spec: QuantSpec) -> None:
    assume(spec.quant_min is None)
    for signed in (True, False):
        quant_min, quant_max = spec.code_range(signed)
        assert quant_max - quant_min + 1 == 2**spec.bits
        assert (quant_min < 0) == (spec.symmetric and (signed if spec.signed is None else spec.signed))


def test_the_defaults_are_eight_bits_symmetric_per_tensor() -> None:
    assert repr(QuantSpec()) == "QuantSpec(bits=8)"
    assert QuantSpec().code_range(signed=True) == (-128, 127)
    assert QuantSpec().code_range(signed=False) == (0, 255)
    assert QuantSpec(bits=4, quant_min=-7, quant_max=7).code_range(signed=False) == (-7, 7)
    assert QuantSpec(symmetric=False).code_range(signed=True) == (0, 255)


def test_a_label_names_bits_symmetry_and_granularity() -> None:
    assert QuantSpec(bits=4, granularity="per_channel").label == "4 bit symmetric per_channel"
    assert QuantSpec(symmetric=False).label == "8 bit affine per_tensor"
    assert QuantSpec(bits=4, granularity="per_group", group_size=32).label == "4 bit symmetric per_group(32)"


def test_a_specification_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec().bits = 4


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"bits": 1}, ValueError, "`bits` must be between 2 and 16. Found 1: 2 are the fewest"),
    ({"bits": 17}, ValueError, "`bits` must be between 2 and 16. Found 17: leave the module in float with None"),
    ({"bits": 4.0}, TypeError, "`bits` must be an int. Found 4.0 of type float"),
    ({"bits": "4"}, TypeError, "`bits` must be an int. Found '4' of type str"),
    ({"bits": True}, TypeError, "`bits` must be an int. Found True of type bool"),
    ({"symmetric": None}, TypeError, "`symmetric` must be true or false. Found None"),
    ({"symmetric": 1}, TypeError, "`symmetric` must be true or false. Found 1"),
    ({"signed": "yes"}, TypeError, "`signed` must be true or false. Found 'yes'"),
    ({"granularity": "per_row"}, ValueError, "`granularity` must be one of per_tensor, .* Found 'per_row'"),
    ({"observer": "max"}, ValueError, r"`observer` must be one of minmax, moving_average, .*lsq\+\. Found 'max'"),
    ({"saturation": "hard"}, ValueError, "`saturation` must be one of lsq, .* Found 'hard'"),
    ({"granularity": "per_group"}, ValueError, "`group_size` goes with .* Found group_size=None with 'per_group'"),
    ({"group_size": 32}, ValueError, "`group_size` goes with .* Found group_size=32 with 'per_tensor'"),
    ({"granularity": "per_group", "group_size": 0}, ValueError, "`group_size` must be at least 1. Found 0"),
    ({"granularity": "per_group", "group_size": 2.5}, TypeError, "`group_size` must be an int. Found 2.5"),
    ({"granularity": "per_group", "group_size": "32"}, TypeError, "`group_size` must be an int. Found '32'"),
    ({"axis": 0}, ValueError, "`axis` goes with granularity 'per_channel'. Found axis=0 with 'per_tensor'"),
    ({"granularity": "per_channel", "axis": 1.0}, TypeError, "`axis` must be an int. Found 1.0"),
    ({"symmetric": False, "signed": True}, ValueError, "affine quantizer .* unsigned codes. Found signed=True"),
    ({"quant_min": 0}, ValueError, "Give `quant_min` and `quant_max` together. Found 0 and None"),
    ({"quant_max": 7}, ValueError, "Give `quant_min` and `quant_max` together. Found None and 7"),
    ({"quant_min": 7, "quant_max": -8}, ValueError, "`quant_min` must be less than `quant_max`. Found 7 and -8"),
    ({"quant_min": 0.0, "quant_max": 7}, TypeError, "`quant_min` must be an int. Found 0.0"),
    ({"bits": 3, "quant_min": -4, "quant_max": 4}, ValueError, "3 bits hold 8 codes. .* which are 9: use more bits"),
    ({"grad_factor": 0}, ValueError, "`grad_factor` must be .*. Found 0"),
    ({"grad_factor": -1.0}, ValueError, "`grad_factor` must be .*. Found -1.0"),
    ({"grad_factor": float("nan")}, ValueError, "`grad_factor` must be .*. Found nan"),
    ({"grad_factor": "1e-3"}, ValueError, "`grad_factor` must be .*. Found '1e-3'"),
    ({"grad_factor": True}, TypeError, "`grad_factor` must be .*. Found True"),
    ({"grad_factor": None}, TypeError, "`grad_factor` must be .*. Found None"),
    ({"lr_factor": 0}, ValueError, '`lr_factor` must be "path" or "bits" or a positive number. Found 0'),
    ({"lr_factor": "lsq"}, ValueError, '`lr_factor` must be "path" or "bits" or a positive number. Found .lsq.'),
    ({"lr_factor": None}, TypeError, '`lr_factor` must be "path" or "bits" or a number. Found None'),
    ({"bitwidth": 8}, TypeError, "unexpected keyword argument 'bitwidth'"),
]


@pytest.mark.parametrize(("wrong", "kind", "words"), WRONG, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_a_wrong_specification_raises_with_the_rule_and_what_was_found(
    wrong: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        QuantSpec(**wrong)


# ---- where a specification is expected ------------------------------------------------------------------------------


def test_an_int_means_that_many_bits() -> None:
    assert weight_spec(4) == QuantSpec(bits=4, granularity="per_channel")
    activation = activation_spec(4)
    assert activation == QuantSpec(bits=4, symmetric=False)


@pytest.mark.parametrize("convert", [weight_spec, activation_spec])
def test_a_specification_a_mapping_and_none_are_taken(convert: Any) -> None:
    spec = QuantSpec(bits=3, symmetric=False)
    assert convert(spec) is spec
    assert convert(None) is None
    assert convert({"bits": 3, "symmetric": False}) == spec
    assert convert(OmegaConf.create({"bits": 3, "symmetric": False})) == spec


@pytest.mark.parametrize(("convert", "role"), [(weight_spec, "weight"), (activation_spec, "activation")])
def test_anything_else_is_refused_by_the_name_of_its_role(convert: Any, role: str) -> None:
    for found in ("8", 4.0, True, [8]):
        with pytest.raises(TypeError, match=f"`{role}` must be a number of bits.* of type {type(found).__name__}"):
            convert(found)
    with pytest.raises(ValueError, match=f"`{role}` has unknown keys \\['bit', 'sign'\\]. Known are bits, symmetric"):
        convert({"bit": 8, "sign": True})
    for value in (1, {"bits": 1}):
        with pytest.raises(ValueError, match=f"^`{role}`: `bits` must be between 2 and 16. Found 1"):
            convert(value)


def test_a_number_in_quotes_is_told_to_lose_them() -> None:
    with pytest.raises(TypeError, match=r"`weight` must be .*Found '4' of type str: write 4 without quotes"):
        weight_spec("4")


def test_an_activation_has_no_groups() -> None:
    with pytest.raises(ValueError, match=r"per tensor, channel or token\. Found .*per_group"):
        activation_spec(QuantSpec(granularity="per_group", group_size=4))


def test_the_rule_of_saturation_is_the_domains_where_none_is_asked_for() -> None:
    assert QuantSpec().saturation == QuantSpec(scale_domain="log").saturation == "lsq"
    assert QuantSpec(scale_domain="power_of_two").saturation == "exclusive"  # Jain et al. 2020, equation 7
    assert QuantSpec(scale_domain="power_of_two", saturation="lsq").saturation == "lsq"
    assert LearnableFakeQuantize.from_spec(QuantSpec(scale_domain="power_of_two")).saturation_rule == "exclusive"


def test_the_domains_rule_of_saturation_is_not_printed_and_goes_with_the_domain() -> None:
    usual, asked = (QuantSpec(scale_domain="power_of_two", saturation=rule) for rule in (None, "lsq"))
    assert repr(usual) == "QuantSpec(bits=8, scale_domain='power_of_two')"
    assert repr(asked) == "QuantSpec(bits=8, saturation='lsq', scale_domain='power_of_two')"
    assert usual.replace(scale_domain="linear") == QuantSpec()
    assert QuantSpec().replace(scale_domain="power_of_two") == usual
    assert usual.replace(bits=4).saturation == "exclusive"
    assert asked.replace(bits=4).saturation == "lsq"
    for spec in (usual, asked):
        assert QuantSpec(**spec.to_dict()) == spec
        assert eval(repr(spec)) == spec
