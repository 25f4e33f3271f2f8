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

warnings.filterwarnings("ignore", ".*does not have many workers")  # the digits are in memory


@hydra.main(config_path="../conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    L.seed_everything(cfg.seed, workers=True)
    data = instantiate(cfg.data)

    model = instantiate(cfg.model, **cfg.float.model)
    _, checkpoint, float_metrics = fit_and_test(cfg, "float", model, data, callbacks=[])
    if cfg.quant is None:
        return

    model = type(model).load_from_checkpoint(checkpoint, **cfg.quantized.model)
    callbacks = [instantiate(cfg.quant)]  # all that makes the second fit a quantization-aware one
    callbacks += map(instantiate, cfg.get("technique", {}).values())
    trainer, checkpoint, metrics = fit_and_test(cfg, "quantized", model, data, callbacks)
    if trainer.is_global_zero:
        report(model, data, checkpoint, float_metrics, metrics)


def fit_and_test(cfg: DictConfig, stage: str, model: Any, data: Any, callbacks: list[Any]) -> tuple[Any, ...]:
    """Fit `model`, then test the checkpoint of its last epoch; all lands in `<run directory>/<stage>`."""
    directory = Path(HydraConfig.get().runtime.output_dir, stage)
    callbacks = [*callbacks, ModelCheckpoint(directory, filename="last_epoch")]
    logger = instantiate(cfg.logger, name=stage)
    trainer = instantiate(cfg.trainer, _partial_=True)(logger=logger, callbacks=callbacks, **cfg[stage].trainer)
    trainer.fit(model, data)
    checkpoint = directory / "last_epoch.ckpt"
    if trainer.max_epochs == 0:  # the network came with trained weights
        trainer.save_checkpoint(checkpoint)
    [metrics] = trainer.test(model, data, ckpt_path=checkpoint)
    return trainer, checkpoint, metrics


def report(model: Any, data: Any, checkpoint: Path, float_metrics: dict[str, float], metrics: dict[str, float]) -> None:
    """Print quantizers, fits and parity; write metrics.json, trajectories.png and quantized.onnx."""
    directory, log_directory = checkpoint.parent.parent, checkpoint.parent
    images, _ = next(iter(data.test_dataloader()))
    summary = lfq.summarize(model, images)
    picture = directory / "trajectories.png"
    lfq.plot_trajectories(log_directory, picture)
    float_metrics["weight_bytes"], metrics["weight_bytes"] = summary.float_weight_bytes, summary.weight_bytes
    metrics_file = directory / "metrics.json"
    metrics_file.write_text(json.dumps({"float": float_metrics, "quantized": metrics}, indent=2) + "\n")
    print(f"\n{summary}\n\n{'':14}{'float':>12}{'quantized':>12}")
    for name in metrics:
        print(f"{name:14}{float_metrics[name]:12.6g}{metrics[name]:12.6g}")
    print(f"\ncheckpoint    {checkpoint}\ntrajectory    {log_directory / 'trajectory.csv'}")
    print(f"picture       {picture}\nmetrics       {metrics_file}\n")
    onnx_file = directory / "quantized.onnx"
    print(lfq.export_onnx(model, images, onnx_file, batches=data.test_dataloader()))
    print(f"ONNX          {onnx_file}")


if __name__ == "__main__":
    main()
