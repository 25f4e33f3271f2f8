"""Longer steps for weights of few bits, whose codes would hardly change otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lfq_lightning.placement.host import QuantizedLayer, hosts
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.spec import QuantSpec
from lfq_lightning.training.stepping.hooks import StepHooks, wrapped_by

_Moved = tuple[float, list[Tensor], list[Tensor]]  # a factor, weights, and what they were before the step


class WeightSteps:
    """Multiplies what a step of the user's optimizers does to each quantized weight by its `QuantSpec.lr_factor`.

    Any optimizer will do: learning rates, parameter groups, schedulers and optimizer states stay as they are. A weight
    is lengthened while it is quantized, and no other is touched or copied. Where an optimizer wraps another that makes
    the steps, those are lengthened: what the wrapper does to weights between them, as SAM's ascent, is no step.
    """

    def __init__(self) -> None:
        self._layers: list[tuple[QuantizedLayer, LearnableFakeQuantize]] = []
        self._before: dict[Optimizer, list[_Moved]] = {}
        self._followed: list[Optimizer] = []
        self._hooks = StepHooks()

    def follow(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Lengthen the steps of these optimizers from now on, where the model has weights of few bits."""
        self.remove()
        lengthened: set[tuple[int, float]] = set()
        for layer in hosts(model).values():
            quantizer = layer.weight_quantizer
            if quantizer is None or quantizer.spec is None:
                continue
            bits = _bits_at_last(quantizer.spec)
            factor = quantizer.spec.lr_factor_at(bits)
            if factor != 1.0:
                self._layers.append((layer, quantizer))
                lengthened.add((bits, factor))
        self._followed = [[optimizer, *wrapped_by(optimizer)][-1] for optimizer in (optimizers if self._layers else ())]
        for optimizer in self._followed:
            self._hooks.add(optimizer, self._before_step, self._after_step)
        for bits, factor in sorted(lengthened):
            rank_zero_info(f"Weights of {bits} bits move {factor:g} times as far a step (`QuantSpec.lr_factor`).")

    @torch.no_grad()
    def remember(self, optimizer: Optimizer) -> None:
        """Keep the weights that the optimizer is about to step; the first call before a step counts."""
        if optimizer not in self._followed or optimizer in self._before:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        moving: dict[float, dict[int, Tensor]] = {}
        for layer, quantizer in self._layers:
            weight = _stepped(layer)
            if quantizer.fake_quant_enabled and weight.grad is not None and id(weight) in held:
                assert quantizer.spec is not None
                moving.setdefault(quantizer.spec.lr_factor_at(quantizer.bitwidth), {})[id(weight)] = weight
        self._before[optimizer] = [
            (factor, list(weights.values()), [weight.detach().clone() for weight in weights.values()])
            for factor, weights in moving.items()
        ]

    def forget(self) -> None:
        """Drop what was kept for a step that a gradient scaler left out."""
        self._before.clear()

    def remove(self) -> None:
        """Let go of the optimizers."""
        self._hooks.remove()
        self._followed, self._layers = [], []
        self.forget()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:  # within a closure, gradients are yet to come, and memory is dear
            self.remember(optimizer)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for factor, weights, before in self._before.pop(optimizer, ()):
            torch._foreach_sub_(before, weights)
            torch._foreach_add_(weights, before, alpha=1.0 - factor)


def _bits_at_last(spec: QuantSpec) -> int:
    """Bits that hold every code, once annealing is over: the number of codes says how far it is to the next one."""
    lowest, highest = spec.code_range(signed=True)
    return (highest - lowest).bit_length()


def _stepped(layer: QuantizedLayer) -> Tensor:
    """The parameter by which an optimizer moves the weight: `torch.nn.utils.prune` makes it another."""
    pruned = layer._parameters.get("weight_orig")
    return layer.weight if pruned is None else pruned
