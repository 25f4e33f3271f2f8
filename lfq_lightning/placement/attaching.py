"""Which layers are quantized and how: decided from names and types, then carried out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from torch import Tensor, nn

from lfq_lightning.placement.host import (
    QuantizedLayer,
    float_type,
    hosts,
    plain_name,
    quantize_layer,
    restore_layer,
    set_compressed,
)
from lfq_lightning.placement.layers import TRANSPOSED, candidates, check_quantizable, input_channels, is_lazy
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.spec import QuantSpec, Rule, SpecLike, activation_spec, weight_spec


@dataclass(frozen=True)
class PlacedLayer:
    """One layer and its specifications; None is float."""

    name: str
    type_name: str
    weight: QuantSpec | None
    activation: QuantSpec | None


@dataclass(frozen=True)
class Placement:
    """Every quantized layer, and every layer with weights that was left in float with the reason; prints as a table."""

    layers: tuple[PlacedLayer, ...]
    left_in_float: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        rows = [("layer", "type", "weight", "input")]
        for layer in self.layers:
            weight, activation = (s.label if s else "float" for s in (layer.weight, layer.activation))
            rows.append((layer.name, layer.type_name, weight, activation))
        rows += [(name, "", "float", f"float: {reason}") for name, reason in self.left_in_float]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "-" * sum(widths, 6), *lines[1:]])


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


def plan(
    model: nn.Module, weight: SpecLike, activation: SpecLike, rules: Iterable[Rule], final: bool = True
) -> Placement:
    """What `attach` would place; with `final` False, rules may match nothing yet and layers may still be missing."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module. Found {type(model).__name__}.")
    defaults = weight_spec(weight), activation_spec(activation)
    rules = tuple(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"`rules` must hold Rule objects. Found {rule!r} of type {type(rule).__name__}.")
    found, left = candidates(model, rules)
    if final:
        _check_rules(rules, model, found)
    chosen: list[tuple[str, nn.Module, list[QuantSpec | None], list[bool]]] = []
    for name, layer in found.items():
        decides = next((r for r in rules if r.matches(name, float_type(layer))), None)
        specs, ruled = list(defaults), [False, False]
        if decides is not None and decides.weight != "default":
            specs[0], ruled[0] = weight_spec(decides.weight), True
        if decides is not None and decides.activation != "default":
            specs[1], ruled[1] = activation_spec(decides.activation), True
        if isinstance(layer, nn.Embedding):
            if ruled[1] and specs[1] is not None:
                raise ValueError(
                    f"The input of an Embedding is integers and cannot be quantized. Found {decides!r} for {name!r}: "
                    "leave `activation` out."
                )
            specs[1] = None
        if specs != [None, None]:
            chosen.append((name, layer, specs, ruled))
    placed = []
    for position, (name, layer, specs, ruled) in enumerate(chosen):
        if position in (0, len(chosen) - 1):
            specs = [s if r else _at_least_8_bits(s) for s, r in zip(specs, ruled, strict=True)]
        if not final and is_lazy(layer):
            continue
        check_quantizable(name, layer, *specs)
        placed.append(PlacedLayer(name, float_type(layer).__name__, specs[0], specs[1]))
    if final and not placed:
        warnings.warn(
            f"{type(model).__name__} has nothing to quantize: no layer of a supported type, or all were left in float.",
            stacklevel=3,
        )
    return Placement(tuple(placed), tuple(left.items()))


def _at_least_8_bits(spec: QuantSpec | None) -> QuantSpec | None:
    if spec is None or spec.bits >= 8 or spec.quant_min is not None:
        return spec
    return spec.replace(bits=8)


def _check_rules(rules: tuple[Rule, ...], model: nn.Module, found: dict[str, nn.Module]) -> None:
    free = dict(found)
    for rule in rules:
        taken = [name for name, layer in free.items() if rule.matches(name, float_type(layer))]
        if not taken:
            raise ValueError(f"{rule!r} applies to nothing: {_why_unused(rule, model, found)}")
        for name in taken:
            del free[name]


def _why_unused(rule: Rule, model: nn.Module, found: dict[str, nn.Module]) -> str:
    shadowed = [name for name, layer in found.items() if rule.matches(name, float_type(layer))]
    if shadowed:
        return f"an earlier rule already decides for {', '.join(shadowed)}. Put it before that rule."
    modules = {plain_name(n): m for n, m in model.named_modules()}
    other = [n for n, m in modules.items() if rule.matches(n, float_type(m)) and n]
    if other:
        return f"{', '.join(other[:5])} has no floating weights of a kind that can be quantized. Remove the rule."
    near = get_close_matches(rule.match, modules, n=3, cutoff=0.3) if isinstance(rule.match, str) else []
    names = near or list(found)[:5]
    return f"no module has that {'name' if isinstance(rule.match, str) else 'type'}. Near are {', '.join(names)}."


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
