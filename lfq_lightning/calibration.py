"""First scales and zero points for a model that is not trained."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lfq_lightning.checking import check_batches, check_function, check_model
from lfq_lightning.gathering import Gathered, gathering
from lfq_lightning.phases import go_on
from lfq_lightning.placement.points import points
from lfq_lightning.running import in_eval_mode, run_by


def calibrate(model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None) -> None:
    """Give an attached model its first qparams without training: observe in eval mode, then go to phase "estimate".

    Quantizers that have learned already go on learning.

    Args:
        model: a model that `attach` was called on; its training modes are restored.
        batches: what the model is run on, for instance a DataLoader.
        forward: how to run the model on one batch. By default a mapping is passed as keywords, of a tuple or list as
            many entries as `forward` must be given, and anything else as it is.

    Raises:
        TypeError: if an argument is of another kind.
        ValueError: if there are no quantizers, all have learned already, or `batches` is empty.

    Example:
        >>> import torch, lfq_lightning as lfq
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> _ = lfq.attach(model)
        >>> lfq.calibrate(model, [torch.randn(8, 4)])
        >>> lfq.quantizers(model)["0.weight_quantizer"].phase
        'estimate'
    """
    check_model(model)
    check_batches("batches", batches)
    check_function("forward", forward, "the model and a batch")
    found = points(model)
    if not found:
        raise ValueError("A model is calibrated by its quantizers. Found none: call `lfq_lightning.attach` first.")
    learned = [name for name, point in found.items() if point.quantizer.learned]
    if learned and len(learned) == len(found):
        raise ValueError(
            f"Calibration would overwrite what was learned. Found learned qparams in {', '.join(learned[:5])}: call "
            "`.forget()` on the quantizers first if that is meant."
        )
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("`batches` must hold at least one batch. Found none: an iterator may have been used up.")
    placed = [point.quantizer for point in found.values()]
    before, gathered = {quantizer: quantizer.switches for quantizer in placed}, Gathered(found)
    go_on(found, "observe")
    try:
        with in_eval_mode(model), gathering(placed), torch.no_grad():
            for batch in itertools.chain([first], batches):
                run_by(forward, model, batch)
                met = gathered.merge()
                for name in met.not_finite() if met else ():
                    found[name].quantizer.warn_non_finite(name)
    except BaseException:
        for quantizer, switches in before.items():
            quantizer.fake_quant_enabled, quantizer.static_enabled, quantizer.learning_enabled = switches
        raise
    go_on(found, "estimate")
