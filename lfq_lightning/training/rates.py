"""Learning rates: reading those that are tensors, and keeping one in proportion to another."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer


class Reading:
    """Reads a number that may be a tensor, and waits for a GPU only where it has changed since."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._version, self._value = -1, 0.0

    def __call__(self, number: float | Tensor | None) -> float:
        if not isinstance(number, Tensor):
            return float(number or 0.0)
        if number is not self._tensor or number._version != self._version:
            self._tensor, self._version, self._value = number, number._version, float(number)
        return self._value


class Pace:
    """An optimizer's learning rate in proportion to another's: 1 where that stands at the peak of its schedule."""

    def __init__(self, own: Optimizer, followed: Optimizer) -> None:
        self.own, self.followed = own, followed
        self._peaks = [float(group["lr"]) for group in own.param_groups]
        self._now, self._highest, self._initial = Reading(), Reading(), Reading()
        self._usual = self._now(self._lead.get("lr"))

    @property
    def _lead(self) -> dict[str, Any]:
        """The group that is followed; Lightning has an optimizer without any where a module makes none."""
        return self.followed.param_groups[0] if self.followed.param_groups else {}

    def rates(self) -> list[float]:
        """The learning rate of each group in the coming step."""
        lead = self._lead
        # Schedulers leave these names in the group that they drive.
        peak = self._highest(lead.get("max_lr")) or self._initial(lead.get("initial_lr")) or self._usual
        share = self._now(lead["lr"]) / peak if peak else 1.0
        return [rate * share for rate in self._peaks]

    def keep(self) -> None:
        """Set them."""
        for group, rate in zip(self.own.param_groups, self.rates(), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
