"""The callback from YAML, with LightningCLI. Needs the extra `cli`.

python examples/cli.py fit --config examples/cli.yaml
python examples/cli.py fit --config examples/cli.yaml --print_config     # every setting with its default
python examples/cli.py fit --config examples/cli.yaml --trainer.max_epochs=5 --model.width=8
"""

from __future__ import annotations

from digits import Digits, DigitsClassifier
from lightning.pytorch.cli import LightningCLI

import lfq_lightning as lfq

# What is imported can be named by its class alone: `class_path: QuantizationAwareTraining`.
__all__ = ["lfq"]


class CLI(LightningCLI):
    """Says in one line what is wrong with a value, where LightningCLI shows 80 of its own code."""

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (TypeError, ValueError) as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise SystemExit(f"error: {cause}") from error


if __name__ == "__main__":
    CLI(DigitsClassifier, Digits, seed_everything_default=0)
