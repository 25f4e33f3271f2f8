"""Scales and zero points in the optimizers that the user makes, in a parameter group of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lfq_lightning.placement.points import Point
from lfq_lightning.private import each_optimizer_made
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.training.hiding import hidden_qparams
from lfq_lightning.training.stepping.hooks import StepHooks, held_by, wrapped_by
from lfq_lightning.training.stepping.qparams import Reading
from lfq_lightning.training.stepping.slots import places
from lfq_lightning.training.trainer.strategy import average_gradients

_REMEDY = (
    'With `optimizer="user"` each optimizer has one parameter group more, its last, for scales and zero points. A '
    "scheduler that takes a list needs one entry more, and an optimizer that allows a single group cannot hold them: "
    "leave `optimizer` out for an optimizer of their own."
)


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
    free = [(point, list(point.quantizer.parameters(recurse=False))) for point in places(model)]  # hidden below

    def join(made: Optimizer) -> None:
        held = held_by([made])
        joining = [qparams for point, qparams in free if _joins(point, held)]
        free[:] = [(point, qparams) for point, qparams in free if not _joins(point, held)]
        if joining:
            _add_group(made, [p for qparams in joining for p in qparams])

    try:
        with each_optimizer_made(join), hidden_qparams(model):
            yield
    except Exception as error:
        error.add_note(_REMEDY)
        raise


def _joins(point: Point, held: set[int]) -> bool:
    followed = point.followed
    return not followed or any(id(p) in held for p in followed)


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
        self._places, self._over_ranks = places(model), over_ranks
        _check_linear(self._places)
        qparams = {id(p): p for point in self._places for p in point.quantizer.parameters(recurse=False)}
        held = held_by(optimizers)
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
        self.hooks = StepHooks()
        self._unseen = set(self.optimizers)
        for optimizer in self.optimizers:
            for each in (optimizer, *wrapped_by(optimizer)):
                self.hooks.add(each, self._prepare, partial(self._project, optimizer))

    @property
    def learning_rates(self) -> list[float]:
        """The present learning rate of each group of qparams."""
        return [read(optimizer.param_groups[position].get("lr")) for optimizer, position, read in self._groups]

    def _prepare(self, optimizer: Optimizer) -> None:
        """Leave the gradients that a step is to be made with, those of all ranks.

        None is left that must move nothing: Adam's momentum moves a parameter whose gradient is zero.
        """
        learning: list[nn.Parameter] = []
        for point in self._places:
            if not (point.quantizer.learning_enabled and point.learns):
                for parameter in point.quantizer.parameters(recurse=False):
                    parameter.grad = None
            elif self._over_ranks is not None:
                learning += point.quantizer.parameters(recurse=False)
        if self._over_ranks is not None:
            average_gradients(learning, self._over_ranks)

    @property
    def unseen(self) -> list[str]:
        """The names of optimizers that have not stepped yet, as far as hooks tell."""
        return [type(optimizer).__name__ for optimizer in self.optimizers if optimizer in self._unseen]

    @torch.no_grad()
    def _project(self, optimizer: Optimizer, stepped: Optimizer) -> None:
        self._unseen.discard(optimizer)
        for point in self._places:
            point.quantizer.project_()

    def forget(self, quantizer: LearnableFakeQuantize) -> None:
        """Drop what optimizers remember of a quantizer."""
        for optimizer in self.optimizers:
            for parameter in quantizer.parameters(recurse=False):
                optimizer.state.pop(parameter, None)

    def remove(self) -> None:
        """Let go of the optimizers."""
        self.hooks.remove()

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


def _check_linear(found: Sequence[Point]) -> None:
    for point in found:
        domain = point.quantizer.scale_domain
        if domain != "linear":
            raise ValueError(
                f'With `optimizer="user"` scales learn in the linear domain. Found scale_domain={domain!r} for '
                f"{point.name}: leave `optimizer` out for an optimizer of their own."
            )
