"""Knowledge distillation from the float model, without a change to the user's training_step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from lfq_lightning.checking import check_number, check_path, check_texts
from lfq_lightning.checkpoint import load_state_dict
from lfq_lightning.placement import to_float
from lfq_lightning.placement.quantized_layer import quantizers
from lfq_lightning.reading import read_checkpoint
from lfq_lightning.techniques.order import check_quantized
from lfq_lightning.techniques.served import Served
from lfq_lightning.techniques.teacher import Calls, float_copy
from lfq_lightning.training.trainer.neighbours import check_package
from lfq_lightning.training.wrapping import AtRest, Wrappers


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the mean over all but the last dimension.

    Hinton et al. 2015 (arXiv 1503.02531), section 2; T^2 keeps the gradients' size when T changes.

    Args:
        student: scores before the softmax, shape (N, ..., classes).
        teacher: the same of the teacher.
        temperature: T.

    Returns:
        A float32 scalar.

    Example:
        >>> import torch
        >>> distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3))
        tensor(0.)
    """
    classes = student.shape[-1]
    own = functional.log_softmax(student.float().reshape(-1, classes) / temperature, dim=1)
    target = functional.log_softmax(teacher.float().reshape(-1, classes) / temperature, dim=1)
    return functional.kl_div(own, target, reduction="batchmean", log_target=True) * temperature**2


class Distillation(AtRest):
    """Adds to the training loss how far the model's outputs are from those of its float teacher.

    The loss becomes (1 - weight) * loss + weight * KL, and KL is logged as `lfq/distillation`. The teacher is a
    detached float copy of the module in eval mode, made when the fit starts, before quantization changes it. It is not
    part of the module: not in its parameters, its state dict or its optimizers.

    It serves modules with automatic optimization whose `training_step` calls `self(...)` once, or once the named
    submodule, and gets one floating tensor of shape (N, ..., classes) of scores before the softmax. With `output_of`,
    the teacher runs the module's forward if the step calls it, and takes the named submodule's output; else it runs
    that submodule alone, which must then be given the batch itself and not features. Modules that are compiled as a
    whole or sharded are not served. What cannot be served raises: at the start of the fit where that can be seen, else
    in the first step, before any weight moves.

    Args:
        weight: share of the distillation in the loss, in (0, 1].
        temperature: T of the softmax.
        output_of: dotted name of the submodule whose output counts; None takes the module's own.
        teacher: path of a float checkpoint of the same module. With None, the teacher's state is kept in each
            checkpoint as this callback's state (the size of the float model), so that a resumed run has the same
            teacher; with a path, nothing is kept, and the file is read again.

    Raises:
        ValueError: if an argument is out of range, or the module cannot be served.

    Example:
        >>> import lfq_lightning as lfq
        >>> callbacks = [lfq.QuantizationAwareTraining(weight=2, activation=2), lfq.Distillation(weight=0.5)]
    """

    def __init__(
        self,
        weight: float = 0.5,
        temperature: float = 1.0,
        output_of: str | None = None,
        teacher: str | Path | None = None,
    ) -> None:
        check_number("weight", weight)
        check_number("temperature", temperature)
        check_texts(output_of="" if output_of is None else output_of)
        check_path("teacher", teacher, needed=False)
        if not 0.0 < weight <= 1.0:
            raise ValueError(f"`weight` must be in (0, 1]. Found {weight}.")
        if not 0.0 < temperature < math.inf:
            raise ValueError(f"`temperature` must be positive and finite. Found {temperature}.")
        self.weight, self.temperature, self.output_of, self.teacher = weight, temperature, output_of, teacher
        self._rest()

    def _rest(self) -> None:
        self._served = Served()
        self._copy: L.LightningModule | None = None
        self._restored: dict[str, Any] | None = None
        self._wrappers = Wrappers()
        self._handles: list[RemovableHandle] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget the teacher of another model."""
        check_package(trainer, self)
        if self._served.is_another(pl_module):
            self._copy = self._restored = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the teacher, and listen to the student."""
        self._let_go()
        if self.teacher is None:
            check_quantized(self, pl_module)
        _check_served(trainer, pl_module, self.output_of)
        self._copy = self._make_teacher(pl_module)
        calls = {name: Calls() for name in {"", self.output_of or ""}}
        for name, call in calls.items():
            handle = pl_module.get_submodule(name).register_forward_hook(call, with_kwargs=True)
            self._handles.append(handle)

        def training_step(original: Any, *args: Any, **kwargs: Any) -> Any:
            for call in calls.values():
                call.open = True  # and not earlier: DDP runs the whole step as the module's forward
            try:
                given = original(*args, **kwargs)
                return self._combine(pl_module, given, calls)
            finally:
                for call in calls.values():
                    call.open = False
                    call.kept.clear()

        original = pl_module.training_step
        self._wrappers.around(pl_module, "training_step", training_step)
        pl_module.training_step.__wrapped__ = original  # type: ignore[attr-defined]  # Lightning reads its signature

    def _make_teacher(self, module: L.LightningModule) -> L.LightningModule:
        if self._restored is None and self.teacher is None and self._copy is None:
            learned = [name for name, quantizer in quantizers(module).items() if quantizer.learned]
            if learned:
                raise ValueError(
                    "The teacher is the float model that quantization starts from. Found a model that has learned "
                    f"scales already ({learned[0]}): pass `teacher=` with the path of its float checkpoint."
                )
        made = float_copy(module)
        if self.teacher is not None:
            load_state_dict(made, read_checkpoint(self.teacher))
        elif self._restored is not None:
            load_state_dict(made, self._restored)
        elif self._copy is not None:  # a second fit of a model that has learned meanwhile
            load_state_dict(made, self._copy.state_dict())
        to_float(made)  # a state that was loaded may have a phase
        self._restored = None
        return made

    def _combine(self, module: L.LightningModule, given: Any, calls: Mapping[str, Calls]) -> Any:
        loss = given.get("loss") if isinstance(given, Mapping) else given
        if loss is None:
            return given
        if self._copy is not None and self._copy.device != module.device:
            self._copy.to(module.device)  # the module was moved since
        student, teacher = self._outputs(calls)
        distance = distillation_loss(student, teacher, self.temperature)
        module.log("lfq/distillation", distance.detach(), on_step=True, on_epoch=False)
        combined = (1.0 - self.weight) * loss + self.weight * distance
        return {**given, "loss": combined} if isinstance(given, Mapping) else combined

    def _outputs(self, calls: Mapping[str, Calls]) -> tuple[Tensor, Tensor]:
        """The student's scores, and the teacher's for the same arguments."""
        named = self.output_of or ""
        kept = calls[named].kept
        found = "no call" if not kept else f"{len(kept)} calls"
        if len(kept) == 1 and not _is_scores(kept[0][2]):
            found = f"an output of type {type(kept[0][2]).__name__}"
        elif len(kept) == 1:
            outer = "" if len(calls[""].kept) == 1 else named
            args, kwargs, _ = calls[outer].kept[0]
            if outer == "" or not any(isinstance(a, Tensor) and a.requires_grad for a in (*args, *kwargs.values())):
                return kept[0][2], self._ask_teacher(outer, args, kwargs)
            found = "a call with features that depend on weights, and none of `self(...)`"
        raise ValueError(
            f"Distillation needs one call a step of {f'`{named}`' if named else '`self(...)`'} that gives one floating "
            f"tensor of shape (N, ..., classes). Found {found} in `training_step`: call `self(...)` there, or pass "
            "`output_of` with the name of the submodule that gives the scores."
        )

    @torch.no_grad()
    def _ask_teacher(self, outer: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        assert self._copy is not None
        answer = Calls()
        answer.open = True
        with self._copy.get_submodule(self.output_of or "").register_forward_hook(answer, with_kwargs=True):
            self._copy.get_submodule(outer)(*args, **kwargs)
        scores: Tensor = answer.kept[0][2]
        return scores

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._let_go()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._let_go()

    def _let_go(self) -> None:
        self._wrappers.remove()
        while self._handles:
            self._handles.pop().remove()

    def state_dict(self) -> dict[str, Any]:
        """The teacher's state, unless it comes from a file."""
        if self._copy is None or self.teacher is not None:
            return {}
        return {"teacher": dict(self._copy.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a checkpoint's teacher until the fit starts."""
        self._restored = state_dict["teacher"]


def _is_scores(output: Any) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and output.ndim >= 2


def _check_served(trainer: L.Trainer, module: L.LightningModule, output_of: str | None) -> None:
    if not module.automatic_optimization:
        raise ValueError("Distillation needs automatic optimization. Found manual: add `distillation_loss` by hand.")
    if getattr(module, "_compiler_ctx", None) is not None:
        raise ValueError(
            "Distillation listens to the module's forward. Found the whole LightningModule compiled: compile a "
            "submodule, such as `self.network`, instead."
        )
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise ValueError('Distillation copies the whole module. Found it sharded: use `strategy="ddp"`.')
    if output_of is not None and output_of not in dict(module.named_modules()):
        raise ValueError(f"`output_of` must name a submodule of {type(module).__name__}. Found {output_of!r}.")
