"""A small Llama of transformers on Python's source, to 4-bit weights in groups: all of it, or adapters of peft.

pip install transformers peft
python examples/finetune_hf.py [STEPS]
"""

from __future__ import annotations

import copy
import sys
from tempfile import mkdtemp
from typing import Any

import lightning as L
import torch
from language_model import source_code
from low_rank import adapted
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lfq_lightning as lfq


class Causal(L.LightningModule):
    """Any causal model of transformers, trained to tell the next token; parameters that are frozen stay so."""

    def __init__(self, network: nn.Module, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.network, self.learning_rate = network, learning_rate

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network(input_ids=batch, labels=batch).loss

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)


def main(steps: int = 300) -> None:
    L.seed_everything(0)
    batches, test = source_code(steps)
    options = {"vocab_size": 256, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    base = LlamaForCausalLM(LlamaConfig(**options, **ends, num_attention_heads=4))
    weight = lfq.QuantSpec(bits=4, granularity="per_group", group_size=32)
    fits = {"float": lambda: base, "4 bits": lambda: copy.deepcopy(base), "4 bits, adapters": lambda: adapted(base)}
    for name, make in fits.items():
        model = Causal(make())
        qat = lfq.QuantizationAwareTraining(weight=weight, activation=None)
        callbacks: list[L.Callback] = [] if name == "float" else [qat]
        trainer = L.Trainer(max_epochs=1, callbacks=callbacks, accelerator="cpu", enable_progress_bar=False)
        trainer.fit(model, batches)
        [result] = trainer.test(model, test, verbose=False)
        print(f"{name}: loss {result['loss']:.3f}")
        if callbacks:
            network: Any = lfq.freeze(model).network
            network = network.unload() if name.endswith("adapters") else network
            folder = mkdtemp()
            network.save_pretrained(folder)
            prompt = next(iter(test))[:1, :16]
            own = {
                "max_new_tokens": 32,
                "do_sample": False,
                "attention_mask": torch.ones_like(prompt),
                "pad_token_id": 0,
            }
            read = AutoModelForCausalLM.from_pretrained(folder)
            generating: tuple[Any, ...] = (model.network, network, read)
            same = [each.eval().generate(prompt, **own) for each in generating]
            print(f"  from {folder}: the same text, {all(torch.equal(same[0], text) for text in same)}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
