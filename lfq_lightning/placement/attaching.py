"""Putting quantizers on a model's layers, and taking them off."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor, nn

from lfq_lightning.placement.host import (
    QuantizedLayer,
    hosts,
    plain_name,
    quantize_layer,
    restore_layer,
    set_compressed,
)
from lfq_lightning.placement.layers import TRANSPOSED, input_channels
from lfq_lightning.placement.planning import PlacedLayer, Placement, plan
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.rules import Rule
from lfq_lightning.spec import QuantSpec, SpecLike


def attach(
    model: nn.Module,
    weight: SpecLike = 8,
    activation: SpecLike = 8,
    rules: Iterable[Rule] = (),
    compress_saved: bool = False,
) -> Placement:
    """Put learnable fake quantizers on the weights and inputs of a model's layers, in place.

    Layers of exactly the types Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d and Embedding are quantized (an Embedding's
    weights alone). The first and the last keep 8 bits where fewer are asked for, unless a rule speaks of them. The
    quantizers start in phase "off": `set_phase` and `calibrate` take them on.

    Args:
        model: any module; its own state-dict keys do not change.
        weight: bits, a QuantSpec or None (float) for the weights. An int means symmetric per channel.
        activation: the same for layer inputs. An int means affine per tensor.
        rules: exceptions; the first that matches a layer decides.
        compress_saved: keep no quantized tensor for backward, but make it again from the float tensor that the
            quantizer keeps anyway, without changing a bit of any gradient. Eager execution only; where a layer saves
            something else (a copy in another dtype), that is stored as usual. Each layer's `saved` tells the bytes.

    Returns:
        What was placed where. Attaching again with the same arguments changes nothing.

    Raises:
        TypeError, ValueError: if an argument is wrong, a rule matches nothing, or a layer that should be quantized
            cannot be. Nothing is changed then.

    Example:
        >>> import torch, lfq_lightning as lfq
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> print(lfq.attach(model, weight=4, activation=None))
        layer  type    weight                       input
        -------------------------------------------------
        0      Linear  8 bit symmetric per_channel  float
        1      Linear  4 bit symmetric per_channel  float
        2      Linear  8 bit symmetric per_channel  float
    """
    placement = plan(model, weight, activation, rules)
    apply(model, placement)
    set_compressed(model, compress_saved)
    return placement


def apply(model: nn.Module, placement: Placement) -> None:
    """Carry a placement out; a layer that already has these specifications keeps its quantizers and their state."""
    modules = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    wanted = {id(modules[layer.name]): layer for layer in placement.layers}
    fresh = []
    for name, layer in hosts(model).items():
        placed = wanted.get(id(layer))
        if placed is None or (placed.weight, placed.activation) != _specs(layer):
            _check_replaceable(name, layer, placed)
            fresh.append(layer)
    for layer in fresh:
        restore_layer(layer)
    shared: dict[int, LearnableFakeQuantize] = {
        id(layer.weight): layer.weight_quantizer
        for layer in hosts(model).values()
        if layer.weight_quantizer is not None
    }
    for placed in placement.layers:
        layer = modules[placed.name]
        if not isinstance(layer, QuantizedLayer):
            weight = shared.get(id(layer.weight))
            if weight is None or placed.weight is None:
                weight = _weight_quantizer(layer, placed.weight)
            elif weight.spec != placed.weight:
                raise ValueError(
                    f"Layers that share one weight need one specification. Found {weight.spec!r} and {placed.weight!r} "
                    f"for {placed.name!r}: make their rules agree."
                )
            if weight is not None:
                shared[id(layer.weight)] = weight
            quantize_layer(layer, weight, _activation_quantizer(layer, placed.activation))


def _specs(layer: QuantizedLayer) -> tuple[QuantSpec | None, QuantSpec | None]:
    weight, activation = layer.weight_quantizer, layer.input_quantizer
    return weight.spec if weight else None, activation.spec if activation else None


def _check_replaceable(name: str, layer: QuantizedLayer, placed: PlacedLayer | None) -> None:
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        if quantizer is not None and (quantizer.learned or quantizer.saw_data()):
            raise ValueError(
                f"{name!r} is already quantized as {_specs(layer)} and has learned from data. Found other settings: "
                f"{(placed.weight, placed.activation) if placed else 'float'}. Use the same settings, or call "
                "`lfq_lightning.detach(model)` first, which discards what was learned."
            )


def _weight_quantizer(layer: nn.Module, spec: QuantSpec | None) -> LearnableFakeQuantize | None:
    if spec is None:
        return None
    weight = layer.weight
    assert isinstance(weight, Tensor)
    axis = spec.axis if spec.axis is not None else int(isinstance(layer, TRANSPOSED))
    channels = None
    if spec.granularity == "per_channel":
        channels = weight.shape[axis]
    elif spec.group_size is not None:
        channels = weight.shape[0] * math.ceil(weight.shape[1] / spec.group_size)
    return LearnableFakeQuantize.from_spec(spec, channels, weight=True, axis=axis, device=weight.device).start_off()


def _activation_quantizer(layer: nn.Module, spec: QuantSpec | None) -> LearnableFakeQuantize | None:
    if spec is None:
        return None
    channels = input_channels(layer) if spec.granularity == "per_channel" else None
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return LearnableFakeQuantize.from_spec(spec, channels, device=weight.device).start_off()


def detach(model: nn.Module) -> None:
    """Take every quantizer off a model, in place: types, keys and outputs are again what `attach` found.

    Args:
        model: any module; without quantizers nothing happens.

    Example:
        >>> import torch, lfq_lightning as lfq
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> _ = lfq.attach(model)
        >>> lfq.detach(model)
        >>> type(model[0]).__name__, list(model.state_dict())
        ('Linear', ['0.weight', '0.bias'])
    """
    for layer in hosts(model).values():
        restore_layer(layer)
