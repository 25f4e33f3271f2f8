"""What quantizers look like at one step, measured with one copy to the host."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lfq_lightning.placement.host import WEIGHT, hosts, quantizers, whole_weight
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.records.trajectory import TrajectoryRow


class _Probe:
    """A pre-hook that measures what a quantizer is given: the last use's saturation, any use's non-finite values."""

    def __init__(self, name: str, into: dict[str, Tensor]) -> None:
        self.name, self.into = name, into

    def __call__(self, quantizer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(quantizer, LearnableFakeQuantize)
        measured, before = quantizer.saturation(args[0]), self.into.get(self.name)
        if before is not None:
            measured[1] = torch.maximum(measured[1], before[1])
        self.into[self.name] = measured


@contextmanager
def probed(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within it, forward passes measure saturation: by quantizer, the last use's share and a flag for non-finite."""
    measured: dict[str, Tensor] = {}
    handles = [
        quantizer.register_forward_pre_hook(_Probe(name, measured)) for name, quantizer in quantizers(model).items()
    ]
    # Compiled code does not look at hooks that came later, so a measured batch runs eagerly.
    stance = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    try:
        with stance:
            yield measured
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure_weights(model: nn.Module) -> dict[str, Tensor]:
    """The saturation of every weight, as `probed` gives it."""
    return {
        f"{name}.{WEIGHT}": layer.weight_quantizer.saturation(whole_weight(layer))
        for name, layer in hosts(model).items()
        if layer.weight_quantizer is not None
    }


@torch.no_grad()
def record(
    model: nn.Module, step: int, epoch: int, phase: str, measured: dict[str, Tensor]
) -> tuple[list[TrajectoryRow], list[str]]:
    """One row for each quantizer, and the names of those that were given values that are not finite.

    Args:
        model: a model with quantizers.
        step: optimizer steps taken.
        epoch: epochs completed.
        phase: the phase in force.
        measured: by quantizer, saturation and non-finite flag; NaN is recorded where there is none.
    """
    found = quantizers(model)
    if not found:
        return [], []
    columns = [_columns(quantizer, measured.get(name)) for name, quantizer in found.items()]
    table = torch.stack(columns).tolist()
    rows = [TrajectoryRow(step, epoch, phase, name, *values[:8]) for name, values in zip(found, table, strict=True)]
    return rows, [name for name, values in zip(found, table, strict=True) if values[8] > 0]


def _columns(quantizer: LearnableFakeQuantize, measured: Tensor | None) -> Tensor:
    scale, zero_point = quantizer.used_scale.detach(), quantizer.zero_point.detach()
    unknown = scale.new_full((1,), torch.nan)
    gradient = quantizer.scale.grad
    share, flag = (unknown[0], unknown[0]) if measured is None else measured.to(scale.device)
    return torch.stack(
        (
            *(scale.mean(), scale.amin(), scale.amax()),
            *(zero_point.mean(), zero_point.amin(), zero_point.amax()),
            share,
            unknown[0] if gradient is None else gradient.norm(),
            flag,
        )
    )
