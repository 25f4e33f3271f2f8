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

if __name__ == "__main__":
    LightningCLI(DigitsClassifier, Digits, seed_everything_default=0)
