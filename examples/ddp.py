"""Train on two processes. Nothing about quantization changes: scales are equal on every rank.

python examples/ddp.py [EPOCHS]

On GPUs, one process each, and on several nodes, run this on every node with devices="auto", accelerator="gpu" and
num_nodes=4 in the Trainer:

torchrun --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 examples/ddp.py
"""

from __future__ import annotations

import sys

import lightning as L
import torch
from digits import Digits, DigitsClassifier

import lfq_lightning as lfq


def main(max_epochs: int = 10) -> None:
    torch.set_num_threads(1)  # a core for each process
    L.seed_everything(0)
    qat = lfq.QuantizationAwareTraining(weight=4, activation=4)
    trainer = L.Trainer(
        max_epochs=max_epochs,
        callbacks=[qat],
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        enable_progress_bar=False,
    )
    model = DigitsClassifier()
    trainer.fit(model, Digits())
    trainer.test(model, Digits())

    scales = torch.cat([quantizer.scale.detach() for quantizer in lfq.quantizers(model).values()])
    ranks = trainer.strategy.all_gather(scales)
    if trainer.is_global_zero:
        print(f"{len(ranks)} ranks, {len(scales)} scales, equal in every bit: {bool((ranks == ranks[0]).all())}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
