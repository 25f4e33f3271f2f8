"""What a layer computes with a weight that is handed to it; nothing is written to the layer: threads may share it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

Compute = Callable[..., Any]  # of a layer, its weight, and what its forward takes


def computation(layer_type: type[nn.Module]) -> Compute:
    """How layers of a type compute: torch's own functions where forward is torch's, or else its forward on a view."""
    return _BY_FORWARD.get(layer_type.forward) or _on_view(layer_type)


def has_own_computation(layer_type: type[nn.Module]) -> bool:
    """Whether a layer of this type computes as torch's own does, whatever class it is of."""
    kinds = [kind for kind in layer_type.__mro__ if kind.__name__ != "QuantizedLayer"]
    first = next((place for place, kind in enumerate(kinds) if "forward" in vars(kind)), None)
    if first is None or vars(kinds[first])["forward"] not in _BY_FORWARD:
        return False
    return not any("_conv_forward" in vars(kind) for kind in kinds[:first])


# The argument names are those of the layers' own forward: `layer(input=x)` is a call as good as any.
def _linear(layer: Any, weight: Tensor, input: Tensor) -> Tensor:
    return F.linear(input, weight, layer.bias)


def _convolution(function: Callable[..., Tensor], layer_type: type[nn.Module]) -> Compute:
    padded = _on_view(layer_type)

    def compute(layer: Any, weight: Tensor, input: Tensor) -> Any:
        if layer.padding_mode != "zeros":
            return padded(layer, weight, input)
        return function(input, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    return compute


def _embedding(layer: Any, weight: Tensor, input: Tensor) -> Tensor:
    return F.embedding(
        input,
        weight,
        layer.padding_idx,
        layer.max_norm,
        layer.norm_type,
        layer.scale_grad_by_freq,
        layer.sparse,
    )


def _transposed(function: Callable[..., Tensor], layer_type: type[nn.Module]) -> Compute:
    sized = _on_view(layer_type)

    def compute(layer: Any, weight: Tensor, input: Tensor, output_size: list[int] | None = None) -> Any:
        if output_size is not None:
            return sized(layer, weight, input, output_size)
        shape = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        return function(input, weight, layer.bias, *shape)

    return compute


def _on_view(layer_type: type[nn.Module]) -> Compute:
    """For a subclass with a forward of its own, which reads `self.weight` as it likes."""

    class View(layer_type):  # type: ignore[misc, valid-type]
        """The layer, parameters, buffers and children its own, with another weight; what forward sets goes to both."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            setattr(self.__dict__["_viewed"], name, value)

    def compute(layer: Any, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        view = object.__new__(View)
        # An instance attribute hides the parameter, which nn.Module finds only when nothing else has the name.
        view.__dict__.update({**layer.__dict__, "weight": weight, "_viewed": layer})
        return layer_type.forward(view, *args, **kwargs)

    return compute


_BY_FORWARD: dict[Any, Compute] = {
    nn.Linear.forward: _linear,
    nn.Conv1d.forward: _convolution(F.conv1d, nn.Conv1d),
    nn.Conv2d.forward: _convolution(F.conv2d, nn.Conv2d),
    nn.Conv3d.forward: _convolution(F.conv3d, nn.Conv3d),
    nn.ConvTranspose1d.forward: _transposed(F.conv_transpose1d, nn.ConvTranspose1d),
    nn.ConvTranspose2d.forward: _transposed(F.conv_transpose2d, nn.ConvTranspose2d),
    nn.ConvTranspose3d.forward: _transposed(F.conv_transpose3d, nn.ConvTranspose3d),
    nn.Embedding.forward: _embedding,
}
