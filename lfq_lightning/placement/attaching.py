"""Putting quantizers on a model's layers, and taking them off."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import get_args

from torch import Tensor, nn

from lfq_lightning.checking import check_choice, check_flags, check_model
from lfq_lightning.placement.layers import TRANSPOSED, input_channels
from lfq_lightning.placement.planning import PlacedLayer, Placement, plan
from lfq_lightning.placement.quantized_layer import (
    FrozenLayers,
    QuantizedLayer,
    check_compressible,
    plain_name,
    quantize_layer,
    quantized_layers,
    quantizers,
    quantizers_of,
    restore_layer,
    set_compressed,
    set_learning_alone,
)
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.rules import Rule
from lfq_lightning.spec import QuantSpec, SpecLike


def attach(
    model: nn.Module,
    weight: SpecLike = 8,
    activation: SpecLike = 8,
    rules: Iterable[Rule] = (),
    compress_saved: bool = False,
    frozen_layers: FrozenLayers = "keep",
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
        frozen_layers: "keep" gives scales and zero points no gradient while their layer's weight has
            `requires_grad=False`, as a GAN and finetuning need it; "learn" lets them learn whether or not it learns.

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
    check_model(model)
    check_flags(compress_saved=compress_saved)
    check_choice("frozen_layers", frozen_layers, get_args(FrozenLayers))
    placement = plan(model, weight, activation, rules)
    apply(model, placement, compress_saved)
    set_learning_alone(quantized_layers(model).values(), frozen_layers == "learn")
    return placement


def apply(model: nn.Module, placement: Placement, compress_saved: bool = False) -> None:
    """Carry a placement out; a layer that already has these specifications keeps its quantizers and their state.

    Whatever can refuse does so before the first layer is changed.
    """
    check_compressible(model, compress_saved)
    modules = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    wanted = {id(modules[layer.name]): layer for layer in placement.layers}
    replaced: set[nn.Module] = set()
    shared: dict[int, LearnableFakeQuantize] = {}
    for name, layer in quantized_layers(model).items():
        placed = wanted.get(id(layer))
        if placed is None or (placed.weight, placed.activation) != _specs(layer):
            _check_replaceable(name, layer, placed)
            replaced.add(layer)
        elif layer.weight_quantizer is not None:
            shared[id(layer.weight)] = layer.weight_quantizer
    made = []
    for placed in placement.layers:
        module = modules[placed.name]
        if module in replaced or not isinstance(module, QuantizedLayer):
            weight = None
            if placed.weight is not None:
                weight = shared.get(id(module.weight)) or _weight_quantizer(module, placed.weight)
                shared[id(module.weight)] = weight
            made.append((module, weight, _activation_quantizer(module, placed.activation)))
    for module in replaced:
        restore_layer(module)
    for module, weight, activation in made:
        quantize_layer(module, weight, activation)
    set_compressed(model, compress_saved)


def _specs(layer: QuantizedLayer) -> tuple[QuantSpec | None, QuantSpec | None]:
    weight, activation = layer.weight_quantizer, layer.input_quantizer
    return weight.spec if weight else None, activation.spec if activation else None


def _check_replaceable(name: str, layer: QuantizedLayer, placed: PlacedLayer | None) -> None:
    for quantizer in quantizers_of(layer):
        if quantizer.learned or quantizer.saw_data():
            raise ValueError(
                f"{name!r} is already quantized as {_specs(layer)} and has learned from data. Found other settings: "
                f"{(placed.weight, placed.activation) if placed else 'float'}. Use the same settings, or call "
                "`lfq_lightning.detach(model)` first, which discards what was learned."
            )


def _weight_quantizer(layer: nn.Module, spec: QuantSpec) -> LearnableFakeQuantize:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    axis = spec.axis if spec.axis is not None else int(isinstance(layer, TRANSPOSED))
    channels = None
    if spec.granularity == "per_channel":
        channels = weight.shape[axis]
    elif spec.group_size is not None:
        channels = weight.shape[0] * math.ceil(weight.shape[1] / spec.group_size)
    made = LearnableFakeQuantize.from_spec(spec, channels, weight=True, axis=axis, device=weight.device)
    return made.start_off().train(layer.training)


def _activation_quantizer(layer: nn.Module, spec: QuantSpec | None) -> LearnableFakeQuantize | None:
    if spec is None:
        return None
    channels, axis = input_channels(layer)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    made = LearnableFakeQuantize.from_spec(
        spec,
        channels if spec.granularity == "per_channel" else None,
        axis=axis,
        feature_dims=-axis,
        device=weight.device,
    )
    return made.start_off().train(layer.training)


def detach(model: nn.Module) -> None:
    """Take every quantizer off a model's layers, in place: types and keys are again what `attach` found, and outputs.

    A quantizer that you have placed yourself is yours: it stays, in the phase and with the scale that it has now.

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
    check_model(model)
    for layer in quantized_layers(model).values():
        restore_layer(layer)


def to_float(model: nn.Module) -> None:
    """Detach, and switch off the quantizers that the user has placed: the float model, as for a comparison."""
    detach(model)
    for quantizer in quantizers(model).values():
        quantizer.phase = "off"
