"""What keeps still in a fit though its optimizer holds it: parameters that are not quantizers', and BatchNorm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lfq_lightning.placement.quantized_layer import qparams
from lfq_lightning.private import BatchNorm
from lfq_lightning.running import batch_norms


class FixedStatistics:
    """BatchNorm normalizes by its running statistics, as in eval mode, and leaves them as they are."""

    def __init__(self) -> None:
        self._modes: dict[BatchNorm, bool] | None = None

    def hold(self, model: nn.Module) -> None:
        """Keep statistics as they are in the coming batch, whoever has called `train()` meanwhile."""
        if self._modes is None:
            self._modes = {norm: norm.training for norm in batch_norms(model)}
        for norm in self._modes:
            norm.eval()

    def give_back(self) -> None:
        """Every BatchNorm is in the mode that it was found in."""
        for norm, mode in (self._modes or {}).items():
            norm.training = mode
        self._modes = None


class Still:
    """All of a model but its scales and zero points: parameters get no gradient, and BatchNorm counts no batch."""

    def __init__(self) -> None:
        self._parameters: dict[nn.Parameter, None] = {}
        self._statistics = FixedStatistics()

    def hold(self, model: nn.Module) -> None:
        """Take the gradient from every parameter that has one."""
        moving = set(qparams(model))
        found = [p for p in model.parameters() if p.requires_grad and p not in moving]
        self._parameters |= dict.fromkeys(found)
        self._require(False)

    @contextmanager
    def let_go(self) -> Iterator[None]:
        """Within it parameters are as the user made them: `configure_optimizers` may ask which require a gradient."""
        self._require(True)
        try:
            yield
        finally:
            self._require(False)

    def before_batch(self, model: nn.Module) -> None:
        """Hold what others have set free meanwhile."""
        if any(parameter.requires_grad for parameter in self._parameters):
            self._require(False)
        self._statistics.hold(model)

    def give_back(self) -> None:
        """All is as it was found."""
        self._require(True)
        self._parameters.clear()
        self._statistics.give_back()

    def _require(self, gradient: bool) -> None:
        for parameter in self._parameters:
            parameter.requires_grad_(gradient)
