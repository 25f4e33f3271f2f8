"""Two optimizers, stepped by hand: the generator and the discriminator of a GAN learn their own quantizers.

python examples/gan.py [EPOCHS]
"""

from __future__ import annotations

import sys
from typing import cast

import lightning as L
import torch
from digits import Digits
from matplotlib import image
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import Optimizer

import lfq_lightning as lfq


class GAN(L.LightningModule):
    automatic_optimization = False

    def __init__(self, latent: int = 16, width: int = 96) -> None:
        super().__init__()
        self.latent = latent
        self.generator = nn.Sequential(
            nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64), nn.Sigmoid()
        )
        self.discriminator = nn.Sequential(
            nn.Linear(64, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)
        )

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        real = batch[0].flatten(1)
        fake = self(torch.randn(len(real), self.latent))
        generator, discriminator = cast(list[Optimizer], self.optimizers())

        # Each scale and zero point moves with the optimizer that holds its layer's weight, and no other.
        self.toggle_optimizer(discriminator)
        loss = softplus(-self.discriminator(real)).mean() + softplus(self.discriminator(fake.detach())).mean()
        self.step("discriminator_loss", discriminator, loss)
        self.untoggle_optimizer(discriminator)

        self.toggle_optimizer(generator)
        self.step("generator_loss", generator, softplus(-self.discriminator(fake)).mean())
        self.untoggle_optimizer(generator)

    def step(self, name: str, optimizer: Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log(name, loss)

    def configure_optimizers(self) -> list[Optimizer]:
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.5, 0.99)) for network in networks]


def main(max_epochs: int = 60) -> None:
    L.seed_everything(0)
    qat = lfq.QuantizationAwareTraining(weight=4, activation=8)
    trainer = L.Trainer(max_epochs=max_epochs, callbacks=[qat], accelerator="cpu", enable_progress_bar=False)
    model = GAN()
    trainer.fit(model, Digits(batch_size=32))
    lfq.summarize(model, torch.randn(64, model.latent))  # prints its table

    with torch.no_grad():
        digits = model(torch.randn(128, model.latent)).view(8, 16, 8, 8)
    sheet = digits.transpose(1, 2).reshape(64, 128)  # 8 rows of 16 digits
    picture = f"{trainer.log_dir}/samples.png"
    image.imsave(picture, sheet.kron(torch.ones(4, 4)).numpy(), cmap="gray")
    print(picture)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
