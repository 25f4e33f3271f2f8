"""All that steps in a fit because it is quantized, whoever's optimizers scales and zero points are in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import lightning as L
from torch import nn
from torch.optim import Optimizer

from lfq_lightning.placement.quantized_layer import qparams
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.telling import tell
from lfq_lightning.training.hiding import hidden_qparams
from lfq_lightning.training.stepping.hooks import held_by
from lfq_lightning.training.stepping.qparams import (
    ALONE_AT,
    Falling,
    OptimizerFactory,
    QParamOptimizer,
    ScheduleFactory,
    default_optimizer,
)
from lfq_lightning.training.stepping.users import UserOptimizers, grouped_qparams
from lfq_lightning.training.stepping.weights import WeightSteps
from lfq_lightning.training.trainer.length import steps_left
from lfq_lightning.training.trainer.strategy import mean_over_shards

Choice = OptimizerFactory | Literal["user"] | None


def check_makers(choice: object, schedule: object) -> None:
    """Raise TypeError or ValueError unless the arguments `optimizer` and `lr_schedule` fit together."""
    for name, value in (("optimizer", choice), ("lr_schedule", schedule)):
        if value is not None and not callable(value) and (name, value) != ("optimizer", "user"):
            raise TypeError(f"`{name}` must be a callable that makes one, or None. Found {value!r}.")
    if isinstance(choice, str) and schedule is not None:
        raise ValueError('With `optimizer="user"` the user\'s schedulers apply. Found `lr_schedule` too: leave it out.')


def arranged_qparams(model: nn.Module, choice: Choice) -> AbstractContextManager[None]:
    """What `configure_optimizers` runs in: qparams are grouped, or hidden where they have an optimizer of their own."""
    return grouped_qparams(model) if choice == "user" else hidden_qparams(model)


class Steps:
    """What steps the qparams, and the longer steps of weights of few bits; nothing until it follows optimizers.

    Attributes:
        qparams: what steps scales and zero points; None before a fit.
    """

    def __init__(self) -> None:
        self.qparams: QParamOptimizer | UserOptimizers | None = None
        self._weights = WeightSteps()

    def follow(
        self,
        trainer: L.Trainer,
        model: L.LightningModule,
        choice: Choice,
        schedule: ScheduleFactory | None,
        alone: bool = False,
    ) -> None:
        """Step with the Trainer's optimizers from now on.

        Args:
            trainer: whose optimizers are made.
            model: the module.
            choice: whose optimizer the qparams are in.
            schedule: of their rate.
            alone: whether nothing else learns; their rate then falls to zero where nobody has said otherwise.

        Raises:
            ValueError: if qparams are to have an optimizer of their own and one of the user's holds them too, or a
                gradient scaler would find nothing to scale.
        """
        _check_scaler(trainer, model)
        if alone and schedule is None and choice != "user" and not trainer.lr_scheduler_configs:
            schedule = Falling
        if choice is None:
            choice = partial(default_optimizer, lr=ALONE_AT) if alone else default_optimizer
        self.qparams = _make(trainer, model, choice, schedule)
        if not alone:
            self._weights.follow(
                model,
                trainer.optimizers,
                partial(steps_left, trainer),
                mean_over_shards(trainer),
                partial(tell, trainer),
            )

    def fall(self, left: float, end: float) -> None:
        """Tell learning rates that fall by which step of the Trainer to be zero, and how many are left until then."""
        if isinstance(self.qparams, QParamOptimizer):
            self.qparams.fall(left, end)

    @property
    def unseen(self) -> list[str]:
        """The names of optimizers that the qparams step with and that no hook has seen step."""
        return [] if self.qparams is None else self.qparams.unseen

    def announce(self, optimizer: Optimizer) -> None:
        """An optimizer is about to step, with the gradients as they are now."""
        if self.qparams is not None:
            self.qparams.hooks.announce(optimizer)
        self._weights.hooks.announce(optimizer)

    def begin_batch(self) -> None:
        """Drop what was kept for a step of the batch before that was not made."""
        self._weights.forget()

    def forget(self, quantizers: Iterable[LearnableFakeQuantize]) -> None:
        """Drop what optimizers remember of these."""
        if self.qparams is not None:
            for quantizer in quantizers:
                self.qparams.forget(quantizer)

    def remove(self) -> None:
        """Let go of all optimizers."""
        self._weights.remove()
        if self.qparams is not None:
            self.qparams.remove()

    def take_up(self, restored: dict[str, Any]) -> bool:
        """Take the steps' state out of what a checkpoint holds of the run, once; whether there was one."""
        self._weights.load_state_dict(restored.pop("weight_steps", {}))
        if "qparam_optimizer" not in restored or self.qparams is None:
            return False
        self.qparams.load_state_dict(restored.pop("qparam_optimizer"))
        return True

    def state_dict(self) -> dict[str, Any]:
        """What `take_up` takes; plain values and tensors."""
        if self.qparams is None:
            return {}
        measured = self._weights.state_dict()
        return {"qparam_optimizer": self.qparams.state_dict()} | ({"weight_steps": measured} if measured else {})


def _make(
    trainer: L.Trainer,
    model: L.LightningModule,
    choice: Literal["user"] | OptimizerFactory,
    schedule: ScheduleFactory | None,
) -> QParamOptimizer | UserOptimizers:
    if choice == "user":
        scheduled = bool(trainer.lr_scheduler_configs)
        return UserOptimizers(model, trainer.optimizers, scheduled, mean_over_shards(trainer))
    _check_apart(model, trainer.optimizers)
    faces = model.optimizers()
    return QParamOptimizer(
        model,
        trainer.optimizers,
        choice,
        schedule,
        getattr(trainer.precision_plugin, "scaler", None),
        faces if isinstance(faces, list) else [faces],
        mean_over_shards(trainer),
    )


def _check_scaler(trainer: L.Trainer, model: nn.Module) -> None:
    held = held_by(trainer.optimizers) - {id(p) for p in qparams(model)}
    trained = any(p.requires_grad and id(p) in held for p in model.parameters())
    if getattr(trainer.precision_plugin, "scaler", None) is None or not held or trained:
        return
    raise ValueError(
        "A gradient scaler asks the module's optimizer for gradients at every step. Found none in a run in which "
        'scales and zero points learn alone: use `precision="bf16-mixed"`, or "32-true".'
    )


def _check_apart(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    held = held_by(optimizers)
    twice = sum(id(p) in held for p in qparams(model))
    if twice:
        raise ValueError(
            f"Scales and zero points have an optimizer of their own, and would step twice. Found {twice} of them in an "
            "optimizer of the module: make it in `configure_optimizers`, where `self.parameters()` does not show them."
        )
