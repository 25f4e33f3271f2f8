"""What quantizers look like at one step, measured with one copy to the host."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lfq_lightning.ops import not_finite
from lfq_lightning.placement.points import Points, activations, weights
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.records.codes import in_few_codes
from lfq_lightning.records.trajectory import TrajectoryRow

Array = npt.NDArray[np.float32]


# An input's share of clamped elements is that of an even choice of at least this many.
_ENOUGH = 2**18


def _evenly(x: Tensor, axis: int | None) -> Tensor:
    """Every k-th entry of the first dimension that has several and is not the channels', usually the batch."""
    every = x.numel() // _ENOUGH
    channels = None if axis is None else axis % x.ndim
    dimension = next((d for d, size in enumerate(x.shape) if size > 1 and d != channels), None)
    if every < 2 or dimension is None:
        return x
    return x[(slice(None),) * dimension + (slice(None, None, min(every, x.shape[dimension])),)]


class _Probe:
    """A pre-hook that measures what a quantizer is given: the last use, and any use's non-finite values."""

    def __init__(self, name: str, into: dict[str, Tensor]) -> None:
        self.name, self.into = name, into

    def __call__(self, quantizer: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(quantizer, LearnableFakeQuantize)
        x, before = args[0].detach(), self.into.get(self.name)
        chosen = _evenly(x, quantizer.axis)
        measured = quantizer.measured(chosen)
        if chosen is not x:
            measured[1] = not_finite(x)
        if before is not None:
            measured[1] = torch.maximum(measured[1], before[1])
        self.into[self.name] = measured


@contextmanager
def probed(points: Points) -> Iterator[dict[str, Tensor]]:
    """Within it, forward passes measure activations: `measured` of the last use, and non-finite values of any."""
    measured: dict[str, Tensor] = {}
    handles = [point.quantizer.register_forward_pre_hook(_Probe(point.name, measured)) for point in activations(points)]
    # Compiled code does not look at hooks that came later, so a measured batch runs eagerly.
    stance = torch.compiler.set_stance("force_eager")
    try:
        with stance:
            yield measured
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure_weights(points: Points) -> dict[str, Tensor]:
    """Every weight, as `probed` measures activations."""
    return {point.name: point.quantizer.measured(point.whole_parameter()) for point in weights(points)}


@dataclass(frozen=True)
class Snapshot:
    """Every quantizer's state at one moment, on the host; arrays hold one entry a quantizer, in order of `names`.

    Args:
        names: dotted names of the quantizers.
        phases: of each quantizer its phase.
        scales: of each quantizer its scales, float32 of shape (channels,).
        zero_points: the same of its zero points.
        gradient_norms: the Euclidean norm of the scale's gradient; NaN without one.
        saturation: the share of clamped elements; NaN where it was not measured.
        not_finite: positive where values were met that are not finite.
        in_few_codes: the share of the values that falls into few codes, where that is a fault, else 0.
    """

    names: tuple[str, ...]
    phases: tuple[str, ...]
    scales: tuple[Array, ...]
    zero_points: tuple[Array, ...]
    gradient_norms: tuple[float, ...]
    saturation: tuple[float, ...]
    not_finite: tuple[float, ...]
    in_few_codes: tuple[float, ...]

    def vectors(self) -> dict[str, Array]:
        """Scales and zero points under their keys in a state dict."""
        of_each = zip(self.names, self.scales, self.zero_points, strict=True)
        return {f"{name}.{key}": v for name, s, z in of_each for key, v in (("scale", s), ("zero_point", z))}

    def rows(self, step: int, epoch: int) -> list[TrajectoryRow]:
        """One row for each quantizer."""
        columns = (self.phases, self.scales, self.zero_points, self.saturation, self.gradient_norms)
        return [
            TrajectoryRow(step, epoch, phase, name, *_over_channels(scale), *_over_channels(zero_point), share, norm)
            for name, phase, scale, zero_point, share, norm in zip(self.names, *columns, strict=True)
        ]


def _over_channels(values: Array) -> tuple[float, float, float]:
    return float(values.mean(dtype=np.float64)), float(values.min()), float(values.max())


@torch.no_grad()
def snapshot(points: Points, measured: Mapping[str, Tensor]) -> Snapshot:
    """Copy the state of every quantizer to the host, all in one copy.

    Args:
        points: of a model.
        measured: by quantizer, what `probed` and `measure_weights` give.
    """
    found = {name: point.quantizer for name, point in points.items()}
    if not found:
        return Snapshot((), (), (), (), (), (), (), ())
    scales = [quantizer.used_scale.detach() for quantizer in found.values()]
    zero_points = [quantizer.zero_point.detach() for quantizer in found.values()]
    gradients = [
        scale[:0] if q.scale.grad is None else q.scale.grad for q, scale in zip(found.values(), scales, strict=True)
    ]
    unknown = scales[0].new_full((2,), torch.nan)
    shares = [measured.get(name, unknown).to(unknown.device) for name in found]
    parts = [*scales, *zero_points, *gradients, *shares]
    flat: Array = torch.cat(parts).cpu().numpy()
    split = iter(np.split(flat, np.cumsum([part.numel() for part in parts])[:-1]))
    each_scale, each_zero_point, each_gradient, each_share = (
        tuple(itertools.islice(split, len(found))) for _ in range(4)
    )
    return Snapshot(
        tuple(found),
        tuple(quantizer.phase for quantizer in found.values()),
        each_scale,
        each_zero_point,
        tuple(float(np.linalg.norm(gradient)) if gradient.size else math.nan for gradient in each_gradient),
        tuple(float(share[0]) for share in each_share),
        tuple(float(share[1]) for share in each_share),
        in_few_codes([share[2:] for share in each_share], [quantizer.code_range for quantizer in found.values()]),
    )
