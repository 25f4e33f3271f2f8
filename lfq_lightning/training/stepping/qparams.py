"""The optimizer of scales and zero points: it has units of its own, and steps when the weights' optimizer does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lfq_lightning.private import version_of
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.training.stepping.hooks import StepHooks, held_by, wrapped_by
from lfq_lightning.training.stepping.slots import Row, Slot, places, rows_of
from lfq_lightning.training.trainer.strategy import average_gradients
from lfq_lightning.training.wrapping import Wrappers

OptimizerFactory = Callable[[Iterable[Tensor]], Optimizer]
ScheduleFactory = Callable[[Optimizer], LRScheduler]


ALONE_AT = 3e-4  # what the default optimizer's rate is where nothing else learns


def default_optimizer(parameters: Iterable[Tensor], lr: float = 1e-3) -> Optimizer:
    """Adam, of which one step at a rate of 0.001 moves a scale by about a thousandth of its reference value."""
    parameters = list(parameters)
    # One kernel for all, which on the CPU takes a third of the time, and which not every device has.
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.Adam(parameters, lr=lr, fused=fused, foreach=not fused)


class Reading:
    """Reads a number that may be a tensor, and waits for a GPU only where it has changed since."""

    def __init__(self) -> None:
        self._tensor: Tensor | None = None
        self._version, self._value = -1, 0.0

    def __call__(self, number: float | Tensor | None) -> float:
        if not isinstance(number, Tensor):
            return float(number or 0.0)
        if number is not self._tensor or version_of(number) != self._version:
            self._tensor, self._version, self._value = number, version_of(number), float(number)
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


class Falling(LRScheduler):
    """A learning rate that falls to zero as a cosine, from when it is known by which step on.

    Attributes:
        steps: how many steps it takes; infinite for a rate that stays.
        end: the optimizer step of the Trainer at which it is zero.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.steps = self.end = math.inf
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        gone = min(1.0, self.last_epoch / max(1.0, self.steps))  # 0 of an endless run
        return [rate * 0.5 * (1.0 + math.cos(math.pi * gone)) for rate in self.base_lrs]

    def fall(self, left: float, end: float) -> None:
        """Be zero after so many more steps, when the Trainer has made `end`; a resumed run of that end knows."""
        if end != self.end:
            self.steps, self.end = self.last_epoch + left, end


class QParamOptimizer:
    """Steps the qparams of each layer after the optimizer that holds the layer's weight, and clears them with it.

    A scale learns relative to its value on entering `learn`, or as the logarithm of that ratio (TQT, Jain et al. 2020),
    as its `scale_domain` says; a zero point relative to the range of codes. Multiplying an activation by 1000 gives the
    same relative steps. One step changes a scale by at most a factor of two, and zero points stay within the range.
    Gradients that are None are skipped, and a qparam whose gradient is not finite keeps still.

    Args:
        model: a model with quantizers.
        followed: the user's optimizers.
        factory: makes an optimizer of a list of parameters; one is made for each of `followed` that holds weights.
        schedule: makes a learning-rate scheduler, stepped after each step of its optimizer; None keeps the rate in
            proportion to that of the followed optimizer's first group.
        scaler: the gradient scaler of mixed precision, or None.
        faces: other objects whose `zero_grad` users call for `followed`, such as Lightning's wrappers.
        over_ranks: the mean of a flat tensor over all ranks, where nothing else averages the qparams' gradients.

    Attributes:
        hooks: by which it steps.
        optimizers: what steps the proxies.
    """

    def __init__(
        self,
        model: nn.Module,
        followed: Sequence[Optimizer],
        factory: OptimizerFactory = default_optimizer,
        schedule: ScheduleFactory | None = None,
        scaler: Any = None,
        faces: Sequence[Any] = (),
        over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._scaler, self._over_ranks = scaler, over_ranks
        self._unseen: dict[int, str] = {}
        self._slots: list[list[Slot]] = []
        self._switches: list[list[dict[str, Any]]] = []  # each quantizer's, asked of thousands at every step
        self._rows: list[list[Row]] = []
        self.optimizers: list[Optimizer] = []
        self._pace: list[Pace] = []
        self.hooks, self._wrappers = StepHooks(), Wrappers()
        assigned = _assign(model, followed)
        for index, slots in assigned.items():
            self._rows.append(rows_of(slots))
            own = factory([slot.proxy for slot in slots])
            if not isinstance(own, Optimizer):
                raise TypeError(
                    "`optimizer` must be a callable that makes a torch optimizer of a list of parameters. Found one "
                    f"that made {type(own).__name__}: `functools.partial(torch.optim.Adam, lr=1e-3)` is an example."
                )
            self.optimizers.append(own)
            self._pace.append(Pace(own, followed[index]))
            self._unseen[len(self._unseen)] = type(followed[index]).__name__
            self._slots.append(slots)
            self._switches.append([vars(quantizer) for quantizer in {slot.quantizer: None for slot in slots}])
        self._schedules = [schedule(own) for own in self.optimizers] if schedule else []
        for position, (index, slots) in enumerate(assigned.items()):  # nothing can fail from here on
            self.hooks.add_once(followed[index], partial(self.step, position))
            for face in (followed[index], *wrapped_by(followed[index]), *faces[index : index + 1]):
                self._wrappers.around(face, "zero_grad", partial(_zero_grad, slots))

    @property
    def learning_rates(self) -> list[float]:
        """The learning rate of each optimizer in its coming step."""
        if self._schedules:
            return [Reading()(own.param_groups[0]["lr"]) for own in self.optimizers]
        return [pace.rates()[0] for pace in self._pace]

    @property
    def unseen(self) -> list[str]:
        """The names of the user's optimizers that have not stepped yet, as far as hooks tell."""
        return list(self._unseen.values()) if self._slots else ["any optimizer, as there is none"]

    @torch.no_grad()
    def step(self, position: int) -> None:
        """Step the qparams of one optimizer with the gradients they hold."""
        self._unseen.pop(position, None)
        if not any(own["learning_enabled"] for own in self._switches[position]):
            return
        if self._over_ranks is not None:
            average_gradients([slot.value for slot in self._slots[position]], self._over_ranks)
        self._follow_devices(position)
        taken = [(row, row.take_gradients(self._scaler)) for row in self._rows[position]]
        if all(before is None for _, before in taken):
            return
        if not self._schedules:
            self._pace[position].keep()
        self.optimizers[position].step()
        for row, before in taken:
            if before is not None:
                row.write_back(before)
        if self._schedules:
            self._schedules[position].step()

    def fall(self, left: float, end: float) -> None:
        """Tell learning rates that fall when to be zero: see `Falling`."""
        for schedule in self._schedules:
            if isinstance(schedule, Falling):
                schedule.fall(left, end)

    def _follow_devices(self, position: int) -> None:
        """Lay out anew what was moved to another device, with the optimizer's state."""
        if all(row.is_in_place for row in self._rows[position]):
            return
        own, before = self.optimizers[position], [slot.proxy for slot in self._slots[position]]
        self._rows[position] = rows_of(self._slots[position])
        renewed = dict(zip(before, (slot.proxy for slot in self._slots[position]), strict=True))
        for group in own.param_groups:
            group["params"] = [renewed[proxy] for proxy in group["params"]]
        for proxy in before:
            if proxy in own.state:
                own.state[renewed[proxy]] = own.state.pop(proxy)
        own.load_state_dict(own.state_dict())  # to where the proxies are

    def forget(self, quantizer: LearnableFakeQuantize) -> None:
        """Drop what the optimizers remember of a quantizer."""
        for own, slots in zip(self.optimizers, self._slots, strict=True):
            for slot in slots:
                if slot.quantizer is quantizer:
                    own.state.pop(slot.proxy, None)

    def remove(self) -> None:
        """Let go of the user's optimizers."""
        self.hooks.remove()
        self._wrappers.remove()

    def state_dict(self) -> dict[str, Any]:
        """The optimizers' and schedulers' states."""
        return {
            "optimizers": [own.state_dict() for own in self.optimizers],
            "schedules": [schedule.state_dict() for schedule in self._schedules],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            ValueError: if it is of other optimizers.
        """
        mine: dict[str, Sequence[Any]] = {"optimizers": self.optimizers, "schedules": self._schedules}
        for name, own in mine.items():
            if len(state[name]) != len(own):
                raise ValueError(
                    f"The checkpoint's qparams have {len(state[name])} {name}. Found {len(own)} here: resume with the "
                    "`optimizer` and `lr_schedule` that the run began with."
                )
            for target, saved in zip(own, state[name], strict=True):
                target.load_state_dict(saved)


def _zero_grad(slots: Iterable[Slot], original: Any, *args: Any, **kwargs: Any) -> None:
    """A user optimizer's `zero_grad` also clears the qparams that follow it."""
    original(*args, **kwargs)
    for slot in slots:
        slot.value.grad = None


def _assign(model: nn.Module, followed: Sequence[Optimizer]) -> dict[int, list[Slot]]:
    """For each of the user's optimizers the qparams that follow it: of a layer that none holds, the first."""
    holder = {key: index for index, optimizer in reversed(list(enumerate(followed))) for key in held_by([optimizer])}
    assigned: dict[int, list[Slot]] = {}
    for point in places(model) if followed else ():
        index = next((holder[id(p)] for p in point.followed if id(p) in holder), 0)
        slots = [Slot(point, name) for name, value in point.quantizer._parameters.items() if value is not None]
        assigned.setdefault(index, []).extend(slots)
    return assigned
