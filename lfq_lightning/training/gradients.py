"""What a module's own hooks meet where they go over gradients: none that is missing because of quantization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lfq_lightning.placement.host import quantizers
from lfq_lightning.training.optimizer import any_parameter, hidden
from lfq_lightning.training.wrapping import Wrappers


def complete_gradients(wrappers: Wrappers, model: L.LightningModule, apart: bool) -> None:
    """See to it that a loop over `self.parameters()` that takes every gradient for given works as it does in float.

    Outside `learn`, and in frozen layers, qparams have no gradient. The module's hooks do not meet those then, and
    where gradients are clipped they do not meet any that has an optimizer of its own: clipping is for the others. After
    `manual_backward`, which a loop of the user's own may follow, what is missing is zero.

    Args:
        wrappers: what takes the arrangement off again.
        model: the module, whose optimizers are made.
        apart: whether qparams have an optimizer of their own.
    """
    found = list(quantizers(model).values())

    def unseen(hide: Callable[[Tensor], bool]) -> Callable[..., Any]:
        def wrapper(original: Any, *args: Any, **kwargs: Any) -> Any:
            with hidden(found, hide):
                return original(*args, **kwargs)

        return wrapper

    def manual_backward(original: Any, *args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        for parameter in (p for quantizer in found for p in quantizer.parameters(recurse=False) if _is_missing(p)):
            parameter.grad = torch.zeros_like(parameter)

    for name in ("on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping"):
        if is_overridden(name, model):  # others do not look
            every = apart and name == "configure_gradient_clipping"
            wrappers.around(model, name, unseen(any_parameter if every else _is_missing))
    if not model.automatic_optimization:
        wrappers.around(model, "manual_backward", manual_backward)


def _is_missing(parameter: Tensor) -> bool:
    return parameter.grad is None
