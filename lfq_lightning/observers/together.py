"""Many observers at once: a network has thousands of few numbers each, and one operation serves them all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from lfq_lightning.observers.base import Observer, Statistics


def reset_all(observers: Sequence[Observer]) -> None:
    """`reset` of each."""
    alike, others = _parted(observers, ("reset",), lambda observer: observer.minimum.device)
    for group in alike:
        lows, highs = [observer.minimum for observer in group], [observer.maximum for observer in group]
        torch._foreach_zero_(lows + highs)
        torch._foreach_add_(lows, torch.inf)
        torch._foreach_sub_(highs, torch.inf)
    for observer in others:
        observer.reset()


def update_all(observers: Sequence[Observer], statistics: Sequence[Statistics]) -> None:
    """`update` of each with its statistics, bit for bit."""
    new = dict(zip(observers, statistics, strict=True))
    alike, others = _parted(observers, ("update",), lambda observer: observer.minimum.device)
    for group in alike:
        extremes = torch.cat([new[observer].extremes for observer in group], dim=1)
        sizes = [new[observer].extremes.shape[1] for observer in group]
        torch._foreach_minimum_([observer.minimum for observer in group], (-extremes[0]).split(sizes))
        torch._foreach_maximum_([observer.maximum for observer in group], extremes[1].split(sizes))
    for observer in others:
        observer.update(new[observer])


def calculate_all(observers: Sequence[Observer]) -> list[tuple[Tensor, Tensor]]:
    """`calculate_qparams` of each, bit for bit."""
    alike, others = _parted(observers, ("calculate_qparams", "_range", "_qparams", "covering"), _settings)
    found = {observer: observer.calculate_qparams() for observer in others}
    for group in alike:
        first, sizes = group[0], [observer.channels for observer in group]
        device = first.minimum.device
        whole = Observer(
            first.quant_min,
            first.quant_max,
            first.symmetric,
            channels=sum(sizes),
            device=device,
            power_of_two=first.power_of_two,
        )
        whole.minimum = torch.cat([observer.minimum for observer in group])
        whole.maximum = torch.cat([observer.maximum for observer in group])
        scales, zero_points = (qparams.split(sizes) for qparams in whole.calculate_qparams())
        found.update(zip(group, zip(scales, zero_points, strict=True), strict=True))
    return [found[observer] for observer in observers]


def _settings(observer: Observer) -> Hashable:
    return observer.quant_min, observer.quant_max, observer.symmetric, observer.power_of_two, observer.minimum.device


def _parted(
    observers: Sequence[Observer], methods: tuple[str, ...], settings: Callable[[Observer], Hashable]
) -> tuple[list[list[Observer]], list[Observer]]:
    """Those whose methods are `Observer`'s own, by what they have in common, and the others."""
    alike: dict[Hashable, list[Observer]] = {}
    others: list[Observer] = []
    plain = {
        kind: all(getattr(kind, name) is getattr(Observer, name) for name in methods)
        for kind in {type(observer) for observer in observers}
    }
    for observer in observers:
        if plain[type(observer)]:
            alike.setdefault(settings(observer), []).append(observer)
        else:
            others.append(observer)
    return list(alike.values()), others
