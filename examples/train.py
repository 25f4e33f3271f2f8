"""Fit a network in float, fit it again with learned quantizers from that checkpoint, and compare the two.

python examples/train.py                                          # the digits in 4 bits
python examples/train.py experiment=digits_w2a2                   # another file of conf/experiment
python examples/train.py quant=w3a3 logger=tensorboard seed=1     # any group, any value
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig

import lfq_lightning as lfq
from lfq_lightning.export import bench, float_file

warnings.filterwarnings("ignore", ".*does not have many workers")  # the digits are in memory


@hydra.main(config_path="../conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    L.seed_everything(cfg.seed, workers=True)
    data = instantiate(cfg.data)
    callbacks = [instantiate(cfg.quant)]  # all that makes the second fit a quantization-aware one
    callbacks += map(instantiate, {**cfg.get("recipe", {}).get("callbacks", {}), **cfg.get("technique", {})}.values())

    model = instantiate(cfg.model, **cfg.float.model)
    size = sum(4 * parameter.numel() for parameter in model.parameters())
    trainer, checkpoint, metrics = fit_and_test(cfg, "float", model, data, callbacks=[])
    results = {"float": {**metrics, "parameter_bytes": size}}

    if cfg.quant.weight is not None or cfg.quant.activation is not None:
        model = type(model).load_from_checkpoint(checkpoint, **cfg.quantized.model)
        trainer, checkpoint, metrics = fit_and_test(cfg, "quantized", model, data, callbacks)
        images, _ = next(iter(data.test_dataloader()))
        summary = lfq.summarize(model, images)  # prints its table
        size += summary.weight_bytes - summary.float_weight_bytes
        results["quantized"] = {**metrics, "parameter_bytes": size}
    if trainer.is_global_zero:
        report(model, data, checkpoint, results, cfg.onnx)


def fit_and_test(cfg: DictConfig, stage: str, model: Any, data: Any, callbacks: list[Any]) -> tuple[Any, ...]:
    """Fit `model`, then test the checkpoint of its last epoch; all lands in `<run directory>/<stage>`."""
    directory = Path(HydraConfig.get().runtime.output_dir, stage)
    callbacks = [*callbacks, ModelCheckpoint(directory, filename="last_epoch")]
    cfg.stage = stage
    loggers = list(map(instantiate, cfg.logger.values()))
    trainer = instantiate(cfg.trainer, _partial_=True)(logger=loggers, callbacks=callbacks, **cfg[stage].trainer)
    trainer.fit(model, data)
    checkpoint = directory / "last_epoch.ckpt"
    if trainer.max_epochs == 0:  # the network came with trained weights
        trainer.save_checkpoint(checkpoint)
    [metrics] = trainer.test(model, data, ckpt_path=checkpoint)
    return trainer, checkpoint, metrics


def report(model: Any, data: Any, checkpoint: Path, results: dict[str, dict[str, float]], onnx: bool) -> None:
    """Print fits, parity and latency; write metrics.json, trajectories.png and both networks as ONNX."""
    directory, log_directory = checkpoint.parent.parent, checkpoint.parent
    written = {"checkpoint": checkpoint, "metrics": directory / "metrics.json"}
    written["metrics"].write_text(json.dumps(results, indent=2) + "\n")
    if "quantized" in results:
        images, _ = next(iter(data.test_dataloader()))
        written["trajectory"] = log_directory / "trajectory.csv"
        written["picture"] = lfq.plot_trajectories(log_directory, directory / "trajectories.png")
        if onnx:
            written["ONNX"], written["ONNX, float"] = directory / "quantized.onnx", directory / "float.onnx"
            batches = data.test_dataloader()
            print(f"\n{lfq.export_onnx(model, images, written['ONNX'], batches=batches, optimize_for='speed')}")
            float_file(model, images, written["ONNX, float"])
            print(f"\n{bench([written['ONNX, float'], written['ONNX']], batch=len(images))}")
    print("", *(f"{name:16}{path}" for name, path in written.items()), sep="\n")
    print(f"\n{'':16}{''.join(f'{stage:>12}' for stage in results)}")
    for name in results["float"]:
        print(f"{name:16}{''.join(f'{metrics[name]:12.6g}' for metrics in results.values())}")


if __name__ == "__main__":
    main()
