"""Scales and zero points in the optimizers that the user makes, in a parameter group of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lfq_lightning.placement.host import QuantizedLayer, hosts, qparams, quantizers
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.training.hiding import hidden_qparams
from lfq_lightning.training.stepping.hooks import StepHooks, wrapped_by
from lfq_lightning.training.stepping.qparams import (
    OptimizerFactory,
    QParamOptimizer,
    Reading,
    ScheduleFactory,
    default_optimizer,
)
from lfq_lightning.training.trainer.module import complete_gradients
from lfq_lightning.training.trainer.strategy import average_gradients, mean_over_shards
from lfq_lightning.training.wrapping import Wrappers

_REMEDY = (
    'With `optimizer="user"` each optimizer has one parameter group more, its last, for scales and zero points. A '
    "scheduler that takes a list needs one entry more, and an optimizer that allows a single group cannot hold them: "
    "leave `optimizer` out for an optimizer of their own."
)


def _placed(model: nn.Module) -> list[tuple[QuantizedLayer | None, LearnableFakeQuantize]]:
    """Each quantizer once, with the first layer that has it; None where the user has placed it."""
    found: dict[LearnableFakeQuantize, QuantizedLayer | None] = {}
    for layer in hosts(model).values():
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if quantizer is not None:
                found.setdefault(quantizer, layer)
    for quantizer in quantizers(model).values():
        found.setdefault(quantizer, None)
    return [(layer, quantizer) for quantizer, layer in found.items()]


def _add_group(optimizer: Optimizer, qparams: Sequence[nn.Parameter]) -> None:
    named = "param_names" in optimizer.param_groups[0]
    group: dict[str, Any] = {"params": [(f"qparam{i}", p) for i, p in enumerate(qparams)] if named else list(qparams)}
    if "weight_decay" in optimizer.defaults:
        group["weight_decay"] = 0.0
    optimizer.add_param_group(group)


@contextmanager
def grouped_qparams(model: nn.Module) -> Iterator[None]:
    """Within it, an optimizer that is made takes the qparams of the layers whose parameters it holds as its last group.

    Those of quantizers that the user has placed go to the first that is made. The group is there before a scheduler can
    look at the optimizer. `model.parameters()` does not know the qparams, as they would end up in groups that decay, or
    nowhere.
    """
    free = [(layer, list(quantizer.parameters(recurse=False))) for layer, quantizer in _placed(model)]
    init = Optimizer.__init__

    def init_with_group(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        held = {id(p) for group in self.param_groups for p in group["params"]}
        joining = [entry for entry in free if entry[0] is None or _holds(held, entry[0])]
        free[:] = [entry for entry in free if not any(entry is other for other in joining)]
        if joining:
            _add_group(self, [p for _, qparams in joining for p in qparams])

    Optimizer.__init__ = init_with_group  # type: ignore[method-assign]
    try:
        with hidden_qparams(model):
            yield
    except Exception as error:
        error.add_note(_REMEDY)
        raise
    finally:
        Optimizer.__init__ = init  # type: ignore[method-assign]


def _holds(held: set[int], layer: QuantizedLayer) -> bool:
    return any(id(p) in held for p in layer.parameters(recurse=False))


class UserOptimizers:
    """Keeps qparams sound in optimizers that are not ours: still outside `learn`, and legal after each step.

    Args:
        model: a model whose optimizers were made within `grouped_qparams`.
        optimizers: those optimizers.
        scheduled: whether learning-rate schedulers were made of them already.
        over_ranks: the mean of a flat tensor over all ranks, where nothing else averages the qparams' gradients.

    Raises:
        ValueError: if there are qparams that no optimizer took, and schedulers keep them from joining one now, or
            scales that learn in the log domain.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        scheduled: bool,
        over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._placed, self._over_ranks = _placed(model), over_ranks
        _check_linear(model)
        qparams = {id(p): p for _, quantizer in self._placed for p in quantizer.parameters(recurse=False)}
        held = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
        missing = [p for key, p in qparams.items() if key not in held]
        if missing:
            if not any(optimizer.param_groups for optimizer in optimizers):
                raise ValueError(
                    '`optimizer="user"` puts scales and zero points into the optimizers of `configure_optimizers`. '
                    "Found none: leave `optimizer` out for one of their own."
                )
            if scheduled:
                raise ValueError(
                    f'`optimizer="user"` must find the weights of quantized layers in an optimizer. Found '
                    f"{len(missing)} scales and zero points of layers that no optimizer of `configure_optimizers` "
                    "holds, and schedulers that do not expect another group: leave those layers in float with a Rule, "
                    "or leave `optimizer` out."
                )
            _add_group(optimizers[0], missing)
        # Positions, as an optimizer that takes up a checkpoint has other groups then.
        groups = [(o, i, g["params"]) for o in optimizers for i, g in enumerate(o.param_groups)]
        holding = [(o, i) for o, i, parameters in groups if any(id(p) in qparams for p in parameters)]
        self.optimizers = list(dict.fromkeys(optimizer for optimizer, _ in holding))
        self._groups = [(optimizer, position, Reading()) for optimizer, position in holding]
        self._hooks = StepHooks()
        self._unseen = set(self.optimizers)
        for optimizer in self.optimizers:
            for each in (optimizer, *wrapped_by(optimizer)):
                self._hooks.add(each, lambda *_: self.keep_still(), partial(self._project, optimizer))

    @property
    def learning_rates(self) -> list[float]:
        """The present learning rate of each group of qparams."""
        return [read(optimizer.param_groups[position].get("lr")) for optimizer, position, read in self._groups]

    def prepare(self) -> None:
        """Leave the gradients that a step is to be made with, those of all ranks."""
        self.keep_still()
        learning = [p for layer, q in self._placed if _learns(layer, q) for p in q.parameters(recurse=False)]
        if self._over_ranks is not None:
            average_gradients(learning, self._over_ranks)

    def keep_still(self) -> None:
        """Take gradients away that must move nothing: Adam's momentum moves a parameter whose gradient is zero."""
        for layer, quantizer in self._placed:
            if not _learns(layer, quantizer):
                for parameter in quantizer.parameters(recurse=False):
                    parameter.grad = None

    @property
    def unseen(self) -> list[str]:
        """The names of optimizers that have not stepped yet, as far as hooks tell."""
        return [type(optimizer).__name__ for optimizer in self.optimizers if optimizer in self._unseen]

    @torch.no_grad()
    def _project(self, optimizer: Optimizer, *step: Any) -> None:
        self._unseen.discard(optimizer)
        for _, quantizer in self._placed:
            quantizer.project_()

    def forget(self, quantizer: LearnableFakeQuantize) -> None:
        """Drop what optimizers remember of a quantizer."""
        for optimizer in self.optimizers:
            for parameter in quantizer.parameters(recurse=False):
                optimizer.state.pop(parameter, None)

    def remove(self) -> None:
        """Let go of the optimizers."""
        self._hooks.remove()

    def state_dict(self) -> dict[str, Any]:
        """Nothing of its own: the optimizers are in the checkpoint already."""
        return {"optimizers": [], "schedules": []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave.

        Raises:
            ValueError: if the checkpoint's qparams had an optimizer of their own.
        """
        if state["optimizers"]:
            raise ValueError(
                'The checkpoint\'s qparams have an optimizer of their own. Found `optimizer="user"` here: resume with '
                "the `optimizer` that the run began with."
            )


def _learns(layer: QuantizedLayer | None, quantizer: LearnableFakeQuantize) -> bool:
    return quantizer.learning_enabled and (layer is None or layer.learns)


def _check_linear(model: nn.Module) -> None:
    for name, quantizer in quantizers(model).items():
        if quantizer.scale_domain != "linear":
            raise ValueError(
                'With `optimizer="user"` scales learn in the linear domain. Found scale_domain='
                f"{quantizer.scale_domain!r} for {name}: leave `optimizer` out for an optimizer of their own."
            )


def _check_apart(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    held = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]}
    twice = sum(id(p) in held for p in qparams(model))
    if twice:
        raise ValueError(
            f"Scales and zero points have an optimizer of their own, and would step twice. Found {twice} of them in an "
            "optimizer of the module: make it in `configure_optimizers`, where `self.parameters()` does not show them."
        )


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


def make_optimizer(
    wrappers: Wrappers,
    trainer: L.Trainer,
    model: L.LightningModule,
    choice: Choice,
    schedule: ScheduleFactory | None,
) -> QParamOptimizer | UserOptimizers:
    """What steps the qparams of this run, once the Trainer has the user's optimizers, and what the module sees of it.

    Raises:
        ValueError: if they are to have an optimizer of their own and one of the user's holds them too.
    """
    complete_gradients(wrappers, model, choice != "user")
    if choice == "user":
        scheduled = bool(trainer.lr_scheduler_configs)
        return UserOptimizers(model, trainer.optimizers, scheduled, mean_over_shards(trainer))
    _check_apart(model, trainer.optimizers)
    faces = model.optimizers()
    return QParamOptimizer(
        model,
        trainer.optimizers,
        default_optimizer if choice is None else choice,
        schedule,
        getattr(trainer.precision_plugin, "scaler", None),
        faces if isinstance(faces, list) else [faces],
        mean_over_shards(trainer),
    )
