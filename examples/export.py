"""Train a digits classifier to 4 bits, and let the fit end with an integer ONNX file that was run and compared.

python examples/export.py [EPOCHS]
"""

from __future__ import annotations

import sys

import lightning as L
import torch
from digits import Digits, DigitsClassifier

import lfq_lightning as lfq


def main(max_epochs: int = 10) -> None:
    L.seed_everything(0)
    qat = lfq.QuantizationAwareTraining(weight=4, activation=8, export="digits.onnx")
    trainer = L.Trainer(max_epochs=max_epochs, callbacks=[qat], accelerator="cpu", enable_progress_bar=False)
    model, data = DigitsClassifier(), Digits()
    trainer.fit(model, data)  # prints the comparison, which is also at hand as qat.parity

    # The same by hand, on the test images, and as a program for PyTorch's own back ends.
    images = torch.cat([images for images, _ in data.test_dataloader()])
    print(lfq.export_onnx(model, images[:64], f"{trainer.log_dir}/by_hand.onnx", batches=[images]))
    lfq.export_pt2(model, images[:64], f"{trainer.log_dir}/digits.pt2")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
