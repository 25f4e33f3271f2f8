"""A quantized model in torch's own modules and operations, with constant scales and zero points."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lfq_lightning.export.exportable import check_estimated
from lfq_lightning.placement.host import hosts, restore_layer, whole_weight
from lfq_lightning.quantizer import LearnableFakeQuantize


def freeze(model: nn.Module) -> nn.Module:
    """A copy of a quantized model that computes the same with constants, and needs only torch to run.

    Layers are of their float types again. Their weights hold the fake-quantized values, and a forward pre-hook of plain
    operations (a `torch.fx.GraphModule`) fake-quantizes their inputs, so the copy goes through `torch.export`,
    `torch.jit.trace` and pickle. It computes in eval mode whatever the model's phase was.

    Args:
        model: a model with quantizers whose qparams are set; it is not changed.

    Returns:
        The copy, in eval mode, without quantizers.

    Raises:
        ValueError: if there are no quantizers, or one has never seen data.

    Example:
        >>> import torch, lfq_lightning as lfq
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> _ = lfq.attach(model, weight=4, activation=8)
        >>> lfq.calibrate(model, [torch.randn(8, 4)])
        >>> frozen = lfq.freeze(model)
        >>> x = torch.randn(3, 4)
        >>> type(frozen[0]).__name__, torch.equal(frozen(x), model.eval()(x))
        ('Linear', True)
    """
    check_estimated(model)
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    known: set[int] = set()
    for layer in hosts(frozen).values():
        weight, activation = layer.weight_quantizer, layer.input_quantizer
        if weight is not None and id(layer.weight) not in known:
            layer.weight.copy_(weight.quantized(whole_weight(layer)))
            known.add(id(layer.weight))  # tied weights are quantized once
        restore_layer(layer)
        if activation is not None:
            quantize = torch.fx.symbolic_trace(_InputHook(activation))
            layer.add_module("quantize_input", quantize)
            layer.register_forward_pre_hook(quantize, with_kwargs=True)
    return frozen


class _InputHook(nn.Module):
    """Fake-quantizes the first input of a module; traced, so that torch alone can run it."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: LearnableFakeQuantize) -> None:
        super().__init__()
        scale, zero_point = quantizer.used_qparams()
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", zero_point.clone())
        self.axis, self.codes = quantizer.axis, quantizer.code_range

    def forward(self, module: Any, args: Any, kwargs: Any) -> Any:
        x = args[0]
        moved = x if self.axis is None else x.movedim(self.axis, -1)
        codes = torch.clamp((moved.float() / self.scale).round() + self.zero_point, *self.codes)
        y = (codes - self.zero_point) * self.scale
        return ((y if self.axis is None else y.movedim(-1, self.axis)).to(x.dtype),), kwargs
