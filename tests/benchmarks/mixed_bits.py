"""Bits by layer for a pretrained EfficientNet-Lite0: weights of 4 or 8 bits at the bytes of 6, against 4 and 6 in all.

python -m tests.benchmarks.mixed_bits        # some minutes; prints its table, and leaves it as JSON in `.benchmarks/`
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from distill_pretrained import compare, pretrained
from photographs import Photographs

import lfq_lightning as lfq
from lfq_lightning.techniques import distillation_loss
from tests.benchmarks.measuring import Table, machine


def quantized(network: nn.Module, rules: list[lfq.Rule]) -> tuple[nn.Module, int]:
    """A copy with weights as the rules say and inputs in float, from their ranges alone; bytes of its weights."""
    made = copy.deepcopy(network)
    example = next(iter(Photographs(1).train_dataloader()))
    lfq.attach(made, weight=8, activation=None, rules=rules, example=example)
    lfq.calibrate(made, [example])
    with contextlib.redirect_stdout(None):  # its table
        return made, lfq.summarize(made).weight_bytes


def main() -> None:
    torch.set_num_threads(1)
    network = pretrained().eval()
    uniform = {bits: [lfq.Rule("*", weight=bits)] for bits in (4, 6, 8)}
    budget = quantized(network, uniform[6])[1]
    with torch.no_grad():
        batches = [(images, network(images)) for images in Photographs(4).train_dataloader()]
    found = lfq.sensitivity(network, batches, distillation_loss, bits=(4, 8), higher_is_better=False)
    proposals = {f"{bits} bits": rules for bits, rules in uniform.items()}
    proposals["4 or 8 bits, proposed"] = lfq.propose_bits(found, budget)
    table = Table("mixed_bits", notes=["KL from float in nats on 256 crops of other photographs; nothing is trained"])
    for name, rules in proposals.items():
        made, size = quantized(network, rules)
        divergence, agreement = compare(made, network, Photographs(1).test_dataloader())
        few = sum(quantizer.bitwidth == 4 for quantizer in lfq.quantizers(made).values())
        row = {"bytes": f"{size:,}", "layers_in_4_bits": str(few)}
        table.add(weights=name, **row, KL=f"{divergence:.4f}", agreement=f"{100 * agreement:.1f} %")
    print(table)
    path = Path(".benchmarks/mixed_bits.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "notes": table.notes, "rows": table.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
