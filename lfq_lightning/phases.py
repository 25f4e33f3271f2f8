"""Moving a model's quantizers from one phase to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lfq_lightning.checking import check_model
from lfq_lightning.gathering import estimate_weights
from lfq_lightning.placement.points import Points, activations, points
from lfq_lightning.placement.quantized_layer import qparams, quantizers
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.schedule import PHASES, Phase, check_phase

_QUANTIZED: tuple[Phase, ...] = ("estimate", "learn", "freeze")
_BEFORE_LEARNING: tuple[Phase, ...] = ("off", "observe", "estimate")


def set_phase(model: nn.Module, phase: Phase) -> None:
    """Switch every quantizer of a model to a phase.

    On the way to a quantized phase, weights take their range from the weights as they are, and inputs from what was
    observed; quantizers that have learned keep their qparams. On the way to "learn" or "freeze", an input that no data
    ever reached (of an expert that no token chose, of a layer that is rarely used) goes on observing and stays in
    float, and one warning names it. While the model trains it observes, and the next call takes it along.

    Args:
        model: a model that `attach` was called on.
        phase: "off", "observe", "estimate", "learn" or "freeze".

    Raises:
        ValueError: if the phase is unknown, there are no quantizers, or no input that is to learn or freeze saw data.

    Example:
        >>> import torch, lfq_lightning as lfq
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> _ = lfq.attach(model)
        >>> lfq.set_phase(model, "observe")
        >>> lfq.quantizers(model)["0.input_quantizer"].phase
        'observe'
    """
    check_model(model)
    _switch(points(model), phase, keep_learning=False)


def go_on(found: Points, phase: Phase) -> None:
    """`set_phase`, but for quantizers that have learned already: these do not go back to a phase before "learn".

    What came later, such as a new head on a model that was quantized before, goes through every phase.
    """
    _switch(found, phase, keep_learning=True)


def _switch(found: Points, phase: Phase, keep_learning: bool) -> None:
    check_phase(phase)
    if not found:
        raise ValueError(
            f"The model has no quantizers to put in phase {phase!r}. Found none: call `lfq_lightning.attach` first."
        )
    unlearned = {point.name: point.quantizer for point in activations(found) if not point.quantizer.learned}
    late = set()
    if phase in ("learn", "freeze"):
        _check_some_saw_data(found, phase)
        late = {quantizer for quantizer in unlearned.values() if not quantizer.knows_range()}
        _warn_of_late([name for name, q in unlearned.items() if q in late and not q.late], phase)
    if phase in _QUANTIZED:
        estimate_weights(found)
        for quantizer in unlearned.values():
            if quantizer not in late and quantizer.saw_data():
                quantizer.estimate()
    for point in found.values():
        _put(point.quantizer, phase, keep_learning, point.quantizer in late)
    forget_compiled_code()


def goes_on(quantizer: LearnableFakeQuantize, phase: Phase) -> Phase:
    """The phase of a quantizer while its model goes to this one: what has learned goes on learning."""
    return "learn" if quantizer.learned and phase in _BEFORE_LEARNING else phase


def _put(quantizer: LearnableFakeQuantize, phase: Phase, keep_learning: bool, late: bool) -> None:
    own = goes_on(quantizer, phase) if keep_learning else phase
    if late:
        own = "observe"
    elif own == "learn":
        quantizer.begin_learning()
    elif own == "freeze":
        quantizer.settle()
    quantizer.phase, quantizer.late = own, late


def _check_some_saw_data(found: Points, phase: Phase) -> None:
    # A weight that a user hands in comes with a model's own code, and says nothing of data.
    seeing = {point.name: point.quantizer for point in activations(found) if point.role != "weight"}
    if seeing and not any(quantizer.learned or quantizer.saw_data() for quantizer in seeing.values()):
        raise ValueError(
            f"A quantizer must see data before phase {phase!r}. Found none for {', '.join(seeing)}: observe for "
            "longer (`schedule`), or call `lfq_lightning.calibrate`."
        )


def _warn_of_late(names: list[str], phase: Phase) -> None:
    if names:
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        rank_zero_warn(
            f"{shown} never saw data, and so cannot go to phase {phase!r} with the others: the layer was not used. "
            "Its input stays in float and is observed until there is data. If it is never used, leave it in float with "
            "a Rule; if it is used rarely, observe for longer.",
            stacklevel=4,
        )


def join(found: Iterable[LearnableFakeQuantize], phase: Phase) -> list[LearnableFakeQuantize]:
    """Take those of the late quantizers to a phase that have seen data by now, and give them."""
    joined = [quantizer for quantizer in found if quantizer.late and quantizer.knows_range()]
    for quantizer in joined:
        quantizer.estimate()
        _put(quantizer, phase, keep_learning=False, late=False)
    if joined:
        forget_compiled_code()
    return joined


def model_phase(model: nn.Module) -> str:
    """The phase of the quantizers that are least advanced, leaving out those that wait for data; "off" without any."""
    return phase_of(quantizers(model).values())


def phase_of(found: Iterable[LearnableFakeQuantize]) -> str:
    """`model_phase` of these quantizers."""
    phases = {quantizer.phase for quantizer in found if not quantizer.late}
    return min(phases, key=lambda phase: PHASES.index(phase) if phase in PHASES else len(PHASES), default="off")


def leading_quantizer(found: Iterable[LearnableFakeQuantize]) -> LearnableFakeQuantize | None:
    """One whose phase is the model's: the first that has yet to learn, or the first of all, but none that is late."""
    in_time = [quantizer for quantizer in found if not quantizer.late]
    return next((quantizer for quantizer in in_time if not quantizer.learned), in_time[0] if in_time else None)


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
    torch.compiler.reset()  # of everybody's code in this process: torch has no narrower way


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
