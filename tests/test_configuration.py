"""Every configuration composes and makes what it says, and a mistake in one is answered with its key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, InstantiationException
from hydra.utils import get_object, instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import MissingMandatoryValue, OmegaConf

import lfq_lightning as lfq
from lfq_lightning.spec import weight_spec

ROOT = Path(__file__).parents[1]
CONF, LFQ = ROOT / "conf", ROOT / "lfq_lightning/conf/lfq"
NEEDS_TORCHVISION = {"cifar10", "imagenet", "imagenet_resnet18", "imagenet_mobilenet_v2"}
NEEDS = {"wandb": "wandb", "mlflow": "mlflow"}


def choices(group: str) -> list[str]:
    return sorted(path.stem for root in (CONF, LFQ) for path in (root / group).glob("*.yaml"))


def composed(*overrides: str, **options: Any) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides), **options)


@pytest.mark.parametrize("experiment", choices("experiment"))
def test_every_experiment_composes(experiment: str) -> None:
    config = composed(f"experiment={experiment}")
    assert isinstance(instantiate(config.quant), lfq.QuantizationAwareTraining)
    assert config.quantized.trainer.max_epochs > 0
    for technique in config.get("technique", {}).values():
        assert isinstance(instantiate(technique), L.Callback)
    targets = re.findall(r"_target_: (\S+)", OmegaConf.to_yaml(config))
    for target in targets:
        assert target.startswith("torchvision.") or get_object(target), target


@pytest.mark.parametrize("technique", choices("technique"))
def test_every_technique_makes_a_callback(technique: str) -> None:
    [made] = composed(f"technique=[{technique}]").technique.values()
    assert isinstance(instantiate(made), L.Callback)


@pytest.mark.parametrize(
    ("experiment", "bits", "rate", "decay", "epochs"),
    [
        ("w4a4", 4, 0.01, 1e-4, 90),
        ("w3a3", 3, 0.01, 5e-5, 90),
        ("w2a2", 2, 0.01, 2.5e-5, 90),
        ("w8a8", 8, 1e-3, 1e-4, 1),
    ],
)
@pytest.mark.parametrize("data", ["cifar10", "imagenet"])
def test_the_recipes_of_lsq_differ_as_the_paper_says(
    data: str, experiment: str, bits: int, rate: float, decay: float, epochs: int
) -> None:
    config = composed(f"experiment={data}_resnet18_{experiment}")
    callback = instantiate(config.quant)
    spec = weight_spec(callback.weight)
    assert (spec.bits, callback.activation) == (bits, bits)
    assert spec.lr_factor_at(bits) == 1.0  # the rate is the paper's
    assert dict(config.quantized.model) == {"learning_rate": rate, "weight_decay": decay}
    assert config.quantized.trainer.max_epochs == epochs


BITS = {
    "w8a8": (8, 8),
    "w4a4": (4, 4),
    "w3a3": (3, 3),
    "w2a2": (2, 2),
    "w4_group": (4, None),
    "w4_pot": (4, 8),
    "float": (None, None),
}


def bits(spec: Any) -> int | None:
    return spec.bits if isinstance(spec, lfq.QuantSpec) else spec


@pytest.mark.parametrize("quant", choices("quant"))
def test_every_quantizer_configuration_has_the_bits_of_its_name(quant: str) -> None:
    callback = instantiate(composed(f"quant={quant}").quant)
    assert isinstance(callback, lfq.QuantizationAwareTraining)
    assert (bits(callback.weight), bits(callback.activation)) == BITS[quant]
    assert callback.schedule is None


@pytest.mark.parametrize("schedule", choices("schedule"))
@pytest.mark.parametrize("quant", choices("quant"))
def test_every_schedule_reaches_every_quantizer_configuration(quant: str, schedule: str) -> None:
    config = composed(f"quant={quant}", f"schedule={schedule}", "schedule.learn=700", "++schedule.freeze=900")
    made = instantiate(config.quant).schedule
    assert isinstance(made, lfq.PhaseSchedule)
    assert (made.learn, made.freeze) == (700, 900)


@pytest.mark.parametrize("target", choices("target"))
@pytest.mark.parametrize("quant", choices("quant"))
def test_every_target_reaches_every_quantizer_configuration(quant: str, target: str) -> None:
    made = instantiate(composed(f"quant={quant}", f"target={target}").quant).target
    assert made == {"onnxruntime_openvino": ["onnxruntime", "openvino"]}.get(target, target)
    assert lfq.QuantizationAwareTraining(target=made).target == made
    assert instantiate(composed(f"quant={quant}", "~target", "quant.target=openvino").quant).target == "openvino"


@pytest.mark.parametrize("recipe", choices("recipe"))
@pytest.mark.parametrize("quant", choices("quant"))
def test_every_recipe_reaches_every_quantizer_configuration(quant: str, recipe: str) -> None:
    config = composed(f"quant={quant}", f"recipe={recipe}")
    assert instantiate(config.quant).learn == ("scales" if recipe == "scales_alone" else "all")
    assert (config.recipe.learning_rate > 0) == (recipe != "scales_alone")
    optimizer = instantiate(config.quant).optimizer
    assert optimizer is None if recipe == "scales_alone" else optimizer.keywords == {"lr": 3e-3}
    assert instantiate(composed(f"quant={quant}").quant).optimizer is None
    made = [instantiate(each) for each in config.recipe.callbacks.values()]
    assert [each.freeze for each in made] == ([0] if recipe == "batch_norm_eval" else [])
    assert instantiate(composed(f"quant={quant}").quant).learn == "all"


@pytest.mark.parametrize("model", [m for m in choices("model") if m not in NEEDS_TORCHVISION])
def test_every_model_is_made_and_takes_quantizers(model: str) -> None:
    config = composed(f"model={model}")
    made = instantiate(config.model, **config.quantized.model)
    assert lfq.attach(made, weight=4, activation=4).layers


@pytest.mark.parametrize("data", choices("data"))
def test_every_data_set_is_made(data: str) -> None:
    if data in NEEDS_TORCHVISION:
        pytest.importorskip("torchvision", reason="torchvision is not installed")
    assert isinstance(instantiate(composed(f"data={data}").data), L.LightningDataModule)


@pytest.mark.parametrize("logger", choices("logger"))
def test_every_logger_is_made(logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if logger in NEEDS:
        pytest.importorskip(NEEDS[logger], reason=f"{NEEDS[logger]} is not installed: extra `loggers`")
    monkeypatch.chdir(tmp_path)
    where = f"hydra.runtime.output_dir={tmp_path}"
    config = composed(f"logger={logger}", where, f"hydra.runtime.cwd={tmp_path}", return_hydra_config=True)
    for name, value in config.hydra.job.env_set.items():
        monkeypatch.setenv(name, value)
    HydraConfig.instance().set_config(config)
    config.stage = "quantized"
    made = [instantiate(node) for node in config.logger.values()]
    assert all(isinstance(each, Logger) for each in made)
    if logger in NEEDS:  # others have no folder for a run, in which the trajectory could lie
        assert Path(made[0].log_dir) == tmp_path / "quantized"


@pytest.mark.parametrize("trainer", choices("trainer"))
def test_every_trainer_is_made(trainer: str) -> None:
    config = composed(f"trainer={trainer}")
    if config.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    assert instantiate(config.trainer, max_epochs=1, logger=False).max_epochs == 1


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("quant=w4a5", r"(?s)Could not find 'quant/w4a5'.*Available options in 'quant':.*w4a4"),
        ("schedule=later", r"(?s)Could not find 'schedule/later'.*first_batch"),
        ("technique=[distilation]", "Could not load 'technique/distilation'"),
        ("quants=w4a4", "Could not override 'quants'"),
        ("quant.wieght=4", r"(?s)Could not override 'quant.wieght'.*Key 'wieght' is not in struct"),
        ("schedule=freeze schedule.unfreeze=4", "(?s)Could not override 'schedule.unfreeze'"),
    ],
)
def test_a_name_that_does_not_exist_is_answered_with_the_key(override: str, words: str) -> None:
    with pytest.raises(ConfigCompositionException) as raised:
        composed(*override.split())
    assert re.search(words, f"{raised.value}\n{raised.value.__cause__}")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("quant.weight=1", r"(?s)`weight`: `bits` must be between 2 and 16. Found 1.*full_key: quant$"),
        ("quant.activation=four", r"(?s)`activation` must be a number of bits.*'four'.*full_key: quant$"),
        ("+quant.wieght=4", r"(?s)unexpected keyword argument 'wieght'.*full_key: quant$"),
        ("quant=w4_group quant.weight.bits=1", r"(?s)`bits` must be between.*full_key: quant.weight$"),
        ("quant=w4_group quant.weight.granularity=per_row", r"(?s)`granularity` must be .*full_key: quant.weight$"),
        ("schedule=freeze schedule.freeze=1", r"(?s)learn=2 and freeze=1.*full_key: quant.schedule$"),
        ("+quant.on_collapse=explode", r"(?s)`on_collapse` must be .*'explode'.*full_key: quant$"),
        ("+quant.rules=[{match:head,wieght:4}]", r"(?s)`rules\[0\]` has unknown keys \['wieght'\].*full_key: quant$"),
    ],
)
def test_a_wrong_value_is_answered_with_its_key(overrides: str, words: str) -> None:
    with pytest.raises(InstantiationException, match=words):
        instantiate(composed(*overrides.split()).quant)


def test_what_an_experiment_must_fill_is_named_where_none_is_chosen() -> None:
    config = composed("~experiment")
    with pytest.raises(MissingMandatoryValue, match=r"float\.trainer\.max_epochs"):
        OmegaConf.to_container(config, throw_on_missing=True)
