"""BatchNorm folded into the layers before it: into their scales and biases, so that no integer is rounded again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lfq_lightning.export.integers import IntegerWeight
from lfq_lightning.placement.host import WEIGHT, QuantizedLayer
from lfq_lightning.placement.layers import TRANSPOSED


def fold_batch_norm(model: nn.Module, example_inputs: tuple[Any, ...]) -> list[str]:
    """Fold every BatchNorm that alone follows a layer with integer weights, in place, and return their names.

    With f = gamma / sqrt(variance + eps): the scales of each output channel are multiplied by |f|, the sign of f goes
    into the integers, and the bias becomes (bias - mean) f + beta. (Jacob et al. 2018, arXiv 1712.05877, section 3.2,
    without the second rounding.)

    Args:
        model: what `integer_copy` made, in eval mode.
        example_inputs: positional inputs of the model, to see what follows what.
    """
    folded = []
    for layer_name, norm_name in _pairs(model, example_inputs):
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        assert isinstance(layer, QuantizedLayer)
        assert isinstance(norm, _BatchNorm)
        if _fold(layer, norm):
            parent, _, child = norm_name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
            folded.append(norm_name)
    return folded


def _fold(layer: QuantizedLayer, norm: _BatchNorm) -> bool:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gamma = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    factor = gamma.double() / (norm.running_var.double() + norm.eps).sqrt()
    weight = layer._modules[WEIGHT]
    axis = 1 if isinstance(layer, TRANSPOSED) else 0
    if axis == 1 and layer.groups != 1:
        return False  # output channels are spread over both dimensions
    if not isinstance(weight, IntegerWeight) or not weight.scaled(factor.float(), axis):
        return False
    bias = layer.bias.double() if isinstance(layer.bias, Tensor) else torch.zeros_like(factor)
    shift = 0.0 if norm.bias is None else norm.bias.double()
    layer.bias = nn.Parameter(((bias - norm.running_mean.double()) * factor + shift).float(), requires_grad=False)
    return True


def _pairs(model: nn.Module, example_inputs: tuple[Any, ...]) -> list[tuple[str, str]]:
    """Names of layers and of the BatchNorms that are the only readers of what they give; each used once."""
    calls: list[tuple[str, nn.Module, list[int]]] = []
    outputs: dict[int, str] = {}
    kept: list[Tensor] = []  # so that no address is used twice
    names = {module: name for name, module in model.named_modules()}

    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append((names[module], module, [id(a) for a in args if isinstance(a, Tensor)]))
        if isinstance(output, Tensor):
            kept.append(output)
            if _channels_second(module, output):
                outputs[id(output)] = names[module]

    handles = [m.register_forward_hook(see) for m in names if isinstance(m, (QuantizedLayer, _BatchNorm))]
    reads = _Reads(outputs)
    try:
        with torch.no_grad(), reads:
            result = model(*example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    returned = {id(leaf) for leaf in torch.utils._pytree.tree_leaves(result)}
    found = []
    for name, module, inputs in calls:
        once = sum(call[0] == name for call in calls) == 1
        if not isinstance(module, _BatchNorm) or module.running_mean is None:  # its factors are each batch's own
            continue
        if once and inputs and inputs[0] in outputs:
            layer = outputs[inputs[0]]
            used = sum(call[0] == layer for call in calls) == 1 and inputs[0] not in returned
            if used and reads.count.get(inputs[0], 0) == 1:
                found.append((layer, name))
    return found


def _channels_second(module: nn.Module, output: Tensor) -> bool:
    """Whether BatchNorm takes the layer's output channels for its own: a Linear in a sequence has them last."""
    if not isinstance(module, QuantizedLayer) or isinstance(module, nn.Embedding):
        return False
    return output.ndim == (2 if isinstance(module, nn.Linear) else module.weight.ndim)


class _Reads(torch.overrides.TorchFunctionMode):
    """Counts the operations that read each watched tensor."""

    def __init__(self, watched: dict[int, str]) -> None:
        super().__init__()
        self.watched, self.count = watched, dict[int, int]()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        # Looking at a tensor's shape or grad mode (BatchNorm checks its input's dimensions) is not reading it.
        if name not in ("dim", "size", "__get__", "numel"):
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs or {})):
                if isinstance(tensor, Tensor) and id(tensor) in self.watched:
                    self.count[id(tensor)] = self.count.get(id(tensor), 0) + 1
        return function(*args, **(kwargs or {}))
