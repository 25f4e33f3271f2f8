"""Train a digits classifier to 4 bits, and let the fit end with an integer ONNX file that was run and compared.

python examples/export.py
"""

from __future__ import annotations

import warnings

import lightning as L
import torch
from digits import Digits
from networks import ConvolutionalNetwork
from torch import Tensor, nn

import lfq_lightning as lfq

warnings.filterwarnings("ignore", ".*does not have many workers")  # the digits are in memory


class DigitsClassifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = ConvolutionalNetwork("residual", channels=1, classes=10, widths=[16, 32], depth=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(max_epochs: int = 10) -> None:
    qat = lfq.QuantizationAwareTraining(weight=4, activation=8, export="digits.onnx")
    trainer = L.Trainer(max_epochs=max_epochs, callbacks=[qat], accelerator="cpu", enable_progress_bar=False)
    model, data = DigitsClassifier(), Digits()
    trainer.fit(model, data)  # prints the comparison, which is also at hand as qat.parity

    # The same by hand, on the test images, and as a program for PyTorch's own back ends.
    images = torch.cat([images for images, _ in data.test_dataloader()])
    print(lfq.export_onnx(model, images[:64], f"{trainer.log_dir}/by_hand.onnx", batches=[images]))
    lfq.export_pt2(model, images[:64], f"{trainer.log_dir}/digits.pt2")


if __name__ == "__main__":
    main()
