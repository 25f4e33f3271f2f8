"""What a network of the zoo is: how it is made, and the batches that it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import lfq_lightning as lfq

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One network.

    Args:
        name: by which it is listed.
        make: the network with random weights.
        sample: keyword inputs of `forward` for one sample, drawn anew by each call; `batched` ones for a whole batch.
        batched: whether `sample` gives whole batches, as a graph is one.
        rules: what a user would ask for beside the defaults.
        share: the least part of the weight parameters that must be quantized.
        why: what is in float, and why no integer runtime could do it, where `share` is below 0.99.
    """

    name: str
    make: Callable[[], nn.Module]
    sample: Callable[[], Sample]
    batched: bool = False
    rules: tuple[lfq.Rule, ...] = field(default=())
    share: float = 0.99
    why: str = ""
