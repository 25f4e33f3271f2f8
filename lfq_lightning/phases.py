"""Moving a model's quantizers from one phase to the next, and merging what they observed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from lfq_lightning.checking import check_model
from lfq_lightning.observers import Observer, Statistics
from lfq_lightning.placement.host import hosts, qparams, quantizers, whole_weight
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.schedule import PHASES, Phase, check_phase

Reduce = Callable[[Tensor, Literal["max", "sum"]], Tensor]

_QUANTIZED: tuple[Phase, ...] = ("estimate", "learn", "freeze")
_BEFORE_LEARNING: tuple[Phase, ...] = ("off", "observe", "estimate")


def set_phase(model: nn.Module, phase: Phase) -> None:
    """Switch every quantizer of a model to a phase.

    On the way to a quantized phase, weights take their range from the weights as they are, and inputs from what was
    observed; quantizers that have learned keep their qparams.

    Args:
        model: a model that `attach` was called on.
        phase: "off", "observe", "estimate", "learn" or "freeze".

    Raises:
        ValueError: if the phase is unknown, there are no quantizers, or one that is to learn or freeze never saw data.

    Example:
        >>> import torch, lfq_lightning as lfq
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> _ = lfq.attach(model)
        >>> lfq.set_phase(model, "observe")
        >>> lfq.quantizers(model)["0.input_quantizer"].phase
        'observe'
    """
    _switch(model, phase, keep_learning=False)


def go_on(model: nn.Module, phase: Phase) -> None:
    """`set_phase`, but for quantizers that have learned already: these do not go back to a phase before "learn".

    What came later, such as a new head on a model that was quantized before, goes through every phase.
    """
    _switch(model, phase, keep_learning=True)


def _switch(model: nn.Module, phase: Phase, keep_learning: bool) -> None:
    check_model(model)
    check_phase(phase)
    found = quantizers(model)
    if not found:
        raise ValueError(f"The model has no quantizers to put in phase {phase!r}: call `lfq_lightning.attach` first.")
    if phase in ("learn", "freeze"):
        blind = [n for n, q in found.items() if not (q.is_weight or q.learned or q.saw_data())]
        if blind:
            raise ValueError(
                f"A quantizer must see data before phase {phase!r}. Found none for {', '.join(blind)}: observe for "
                "longer (`schedule`), call `lfq_lightning.calibrate`, or leave a layer that is never used in float "
                "with a Rule."
            )
    if phase in _QUANTIZED:
        estimate_weights(model)
        for quantizer in found.values():
            if not (quantizer.is_weight or quantizer.learned) and quantizer.saw_data():
                quantizer.estimate()
    for quantizer in found.values():
        own: Phase = "learn" if keep_learning and quantizer.learned and phase in _BEFORE_LEARNING else phase
        if own == "learn":
            quantizer.begin_learning()
        quantizer.phase = own
    forget_compiled_code()


def model_phase(model: nn.Module) -> str:
    """The phase of the quantizers that are least advanced; "off" without any."""
    phases = [quantizer.phase for quantizer in quantizers(model).values()]
    return min(phases, key=lambda phase: PHASES.index(phase) if phase in PHASES else len(PHASES), default="off")


def leading_quantizer(model: nn.Module) -> LearnableFakeQuantize | None:
    """One whose phase is the model's for a whole run: the first that has yet to learn, or the first of all."""
    found = list(quantizers(model).values())
    return next((quantizer for quantizer in found if not quantizer.learned), found[0] if found else None)


def check_ranks_agree(model: nn.Module, highest: Callable[[Tensor], Tensor]) -> None:
    """Raise RuntimeError unless every rank has the same scales and zero points.

    Args:
        model: a model with quantizers.
        highest: the elementwise maximum of a flat tensor over all ranks.
    """
    mine = torch.cat([p.detach() for p in qparams(model)])
    high, low = highest(mine.clone()), -highest(-mine)
    if not torch.equal(high, low):
        raise RuntimeError(
            "Scales and zero points must be equal on every rank. Found a difference of "
            f"{float((high - low).abs().max()):g}: was a parameter changed on one rank alone?"
        )


def forget_compiled_code() -> None:
    """Let compiled modules start afresh: phases times modes would otherwise run into the recompile limit."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def estimate_weights(model: nn.Module, cheap: bool = False) -> None:
    """Set the qparams of weights that have not begun to learn from the weights as they are.

    Args:
        model: a model with quantizers.
        cheap: leave out those that cost more than a look at the weights, as after each batch.
    """
    for layer in hosts(model).values():
        quantizer = layer.weight_quantizer
        if quantizer is not None and not quantizer.learned and not (cheap and quantizer.costly):
            quantizer.estimate_from(whole_weight(layer))


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Within it, quantizers gather the statistics of a batch in every mode, for `merge_statistics` to take in."""
    set_gathering(model, True)
    try:
        yield
    finally:
        set_gathering(model, None)


def set_gathering(model: nn.Module, gathering: bool | None) -> None:
    """Whether quantizers gather statistics for a caller to merge (None: observe by themselves while training)."""
    for quantizer in quantizers(model).values():
        quantizer.gathering = gathering


@torch.no_grad()
def merge_statistics(model: nn.Module, reduce: Reduce | None = None) -> dict[str, Tensor]:
    """Take one batch's statistics into every observing input quantizer, and set its qparams in phase "estimate".

    Args:
        model: the model whose quantizers gathered.
        reduce: the elementwise maximum ("max") or sum ("sum") of a flat tensor over all ranks; called once for each
            that an observer needs. Every rank takes part whatever it saw.

    Returns:
        For each observing quantizer a tensor that is positive if it met values that are not finite.
    """
    inputs = {
        name: (quantizer, quantizer.observer)
        for name, quantizer in quantizers(model).items()
        if quantizer.static_enabled and not quantizer.is_weight and isinstance(quantizer.observer, Observer)
    }
    if not inputs:
        return {}
    parts = [
        observer.nothing() if quantizer.batch_statistics is None else quantizer.batch_statistics
        for quantizer, observer in inputs.values()
    ]
    extremes = _merged([part.extremes for part in parts], "max", reduce)
    sums = _merged([part.sums for part in parts], "sum", reduce)
    met = {}
    for (name, (quantizer, observer)), *merged in zip(inputs.items(), extremes, sums, strict=True):
        quantizer.batch_statistics = None
        observer.update(Statistics(*merged))
        met[name] = merged[0][2].amax()
        if quantizer.fake_quant_enabled and not quantizer.learned:
            quantizer.estimate(sign=not quantizer.estimated)
    return met


def _merged(parts: list[Tensor], operation: Literal["max", "sum"], reduce: Reduce | None) -> list[Tensor]:
    sizes = [part.numel() for part in parts]
    if reduce is None or not sum(sizes):
        return parts
    merged = reduce(torch.cat([part.flatten() for part in parts]), operation).split(sizes)
    return [flat.view_as(part) for flat, part in zip(merged, parts, strict=True)]


def project_(model: nn.Module) -> None:
    """Make every scale and zero point legal in place, after a step of an optimizer that is not the callback's.

    Scales become positive and finite, zero points lie within the range of codes.

    Args:
        model: any module; without quantizers nothing happens.

    Example:
        >>> import torch, lfq_lightning as lfq
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> _ = lfq.attach(model)
        >>> lfq.project_(model)
    """
    for quantizer in quantizers(model).values():
        quantizer.project_()
