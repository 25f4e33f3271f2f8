"""Fine-tune a trained float checkpoint to 2 bits, keep the best quantized epoch, and load it without the callback.

python examples/finetune_from_checkpoint.py [EPOCHS]
"""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from digits import Digits, DigitsClassifier
from lightning.pytorch.callbacks import ModelCheckpoint

import lfq_lightning as lfq

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def main(max_epochs: int = 20) -> None:
    L.seed_everything(0)
    data = Digits()
    trainer = L.Trainer(max_epochs=max_epochs, **QUIET)
    trainer.fit(DigitsClassifier(), data)
    trainer.save_checkpoint("float.ckpt")

    # From here on it could be another script: all it needs is the checkpoint.
    model = DigitsClassifier.load_from_checkpoint("float.ckpt", learning_rate=1e-3)
    [before] = trainer.test(model, data)
    qat = lfq.QuantizationAwareTraining(weight=2, activation=2)
    # A float epoch would win: only epochs that are quantized compete.
    best = lfq.while_learning(ModelCheckpoint(monitor="val/accuracy", mode="max"))
    trainer = L.Trainer(max_epochs=max_epochs, callbacks=[qat, best], **QUIET)
    trainer.fit(model, data)

    # Anywhere else, without the callback: the quantizers come from the checkpoint.
    loaded = lfq.load_from_checkpoint(DigitsClassifier, best.best_model_path)
    [after] = L.Trainer(logger=False, **QUIET).test(loaded, data)
    print(f"{best.best_model_path}\nfloat {before['test/accuracy']:.2%}, 2 bits {after['test/accuracy']:.2%}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
