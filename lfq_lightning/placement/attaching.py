"""Putting quantizers on a model's layers and operations, and taking them off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lfq_lightning.checking import check_choice, check_flags, check_model
from lfq_lightning.flow.graph import Flow
from lfq_lightning.flow.tracing import trace
from lfq_lightning.placement.layers import QUANTIZABLE, TABLES, TRANSPOSED, computes_directly, input_channels
from lfq_lightning.placement.meeting import (
    OUTPUT,
    input_name,
    leave_operations,
    meet_operations,
    operand_name,
    quantize_output,
    weight_name,
)
from lfq_lightning.placement.paths import path_between
from lfq_lightning.placement.placed import PlacedLayer, PlacedOperand, Placement
from lfq_lightning.placement.planning import plan
from lfq_lightning.placement.quantized_layer import (
    INPUT,
    WEIGHT,
    WITH_FAST_PATH,
    FrozenLayers,
    QuantizedLayer,
    check_compressible,
    holders,
    keep_slow_path,
    let_fast_path,
    quantize_layer,
    quantized_layers,
    quantizers,
    quantizers_of,
    restore_layer,
    set_compressed,
    set_learning_alone,
    tensor_of,
)
from lfq_lightning.private import plain_name
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.quantizer.saved import Place, Role
from lfq_lightning.rules import Rule
from lfq_lightning.running import example_of, explained
from lfq_lightning.spec import QuantSpec, SpecLike


def attach(
    model: nn.Module,
    weight: SpecLike = 8,
    activation: SpecLike = 8,
    rules: Iterable[Rule] = (),
    compress_saved: bool = False,
    frozen_layers: FrozenLayers = "keep",
    example: Any = None,
    target: str | Sequence[str] | None = None,
) -> Placement:
    """Put learnable fake quantizers on the weights of a model and on what meets them, in place.

    With an example batch, every operation that reads a parameter is quantized, wherever in the code it stands: the
    model is run once without computing anything, to see what it does. One tensor that several read has one quantizer.
    Without one, layers of the types Linear, Conv1d/2d/3d, ConvTranspose1d/2d/3d and Embedding are quantized. The first
    and the last, by the flow or else by their order, keep 8 bits where fewer are asked for, unless a rule speaks of
    them. The quantizers start in phase "off": `set_phase` and `calibrate` take them on.

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
        example: what the model is run on: one input, a tuple of positional inputs, a mapping of keyword inputs, or a
            batch of inputs and targets as a DataLoader gives it.
        target: the runtime that the network is trained for, which needs an `example`: "onnxruntime", "openvino",
            "tensorrt", "executorch" (XNNPACK), "x86" (torchao's lowering for Inductor) or "litert", or several, for
            what all of them compute in integers. Additions, concatenations and poolings between quantized operations
            are quantized too, with one scale where a runtime wants one, a product's own operand of a sum bare where it
            adds within the product, and results of layers where it wants these. None quantizes what meets a parameter
            alone.

    Returns:
        What was placed where. Attaching again with the same arguments changes nothing. Where less than half of the
        weights are quantized and nobody asked for that, a warning says so.

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
    if target is not None and example is None:
        raise ValueError(
            f"`target` must know the operations of a batch. Found {target!r} without `example`: give a batch."
        )
    flow = None if example is None else flow_of(model, example)
    placement = plan(model, weight, activation, rules, flow=flow, target=target)
    apply(model, placement, compress_saved)
    set_learning_alone(holders(model), frozen_layers == "learn")
    shortfall = placement.shortfall("what `attach` returns")
    if shortfall:
        rank_zero_warn(shortfall)
    return placement


def flow_of(model: nn.Module, example: Any) -> Flow:
    """What a model does with an example.

    Raises:
        Exception: what the model raises, with a note of what it was given.
    """
    args, kwargs = example_of(model, example)
    with explained(f"{type(model).__name__} must take the example", example, "as `forward` does"):
        return trace(model, lambda copied: copied(*args, **kwargs), "the example", prepare=to_float)


def apply(model: nn.Module, placement: Placement, compress_saved: bool = False) -> None:
    """Carry a placement out; what already has these specifications keeps its quantizers and their state.

    Whatever can refuse does so before anything is changed.
    """
    check_compressible(model, compress_saved)
    modules = {plain_name(name): module for name, module in model.named_modules(remove_duplicate=False)}
    wanted = _wanted(modules, placement)
    existing = _existing(model)
    kept = {key: existing[key] for key, want in wanted.items() if key in existing and existing[key].spec == want.spec}
    stale = [key for key in existing if key not in kept]
    _check_replaceable(modules, wanted, existing, stale)
    made: dict[Key, LearnableFakeQuantize] = {}
    for key, want in wanted.items():
        first = want.same_as or key
        own = kept.get(key)
        # What has a state of its own keeps it, although what it quantizes may be quantized elsewhere too.
        if own is not None and (first == key or own is made.get(first) or own.learned or own.saw_data()):
            made[key] = own
        else:
            made[key] = made[first] if first in made else want.make()
    leave_operations(model)
    for holder, name in stale:
        _drop(holder, name)
    _put(modules, placement, made)
    _tell_places(model, wanted)
    set_compressed(model, compress_saved)


Key = tuple[nn.Module, str]


@dataclass
class _Want:
    """A quantizer that a placement asks for.

    Args:
        name: dotted name of the module that holds it.
        child: its own name there.
        role: what it serves.
        spec: its specification.
        make: makes it.
        same_as: where the quantizer is that it is one with.
        parameter: the parameter that it serves, of the module that holds it.
        readers: see `Place`, as dotted names.
        call: see `Place`.
        operand: see `Place`.
        features: see `Place`.
        size: see `Place`.
    """

    name: str
    child: str
    role: Role
    spec: QuantSpec
    make: Callable[[], LearnableFakeQuantize]
    same_as: Key | None = None
    parameter: str = "weight"
    readers: tuple[str, ...] = ()
    call: str = ""
    operand: str = ""
    features: int = -1
    size: int | None = None

    def place(self, others: list[_Want]) -> Place:
        """What the quantizer stands before, from the first of the modules that hold it."""
        readers = tuple(path_between(self.name, reader) for reader in self.readers)
        also = tuple(
            (path_between(self.name, o.name), "" if o.call else o.parameter, o.call, o.operand) for o in others
        )
        return Place(self.parameter, readers, self.call, self.operand, self.features, self.size, also)


def _tell_places(model: nn.Module, wanted: Mapping[Key, _Want]) -> None:
    """Have each quantizer know what it stands before, from where it is first found in the model."""
    found: dict[LearnableFakeQuantize, list[_Want]] = {}
    for module in model.modules():
        for name, child in module._modules.items():
            if isinstance(child, LearnableFakeQuantize) and (module, name) in wanted:
                found.setdefault(child, [])
    for path, child in model.named_modules(remove_duplicate=False):
        if isinstance(child, LearnableFakeQuantize) and child in found:
            holder, _, name = path.rpartition(".")
            wish = wanted[model.get_submodule(holder), name]
            if all(wish is not other for other in found[child]):
                found[child].append(wish)
    for quantizer, wishes in found.items():
        quantizer.role, quantizer.site = wishes[0].role, ""
        quantizer.place = wishes[0].place(wishes[1:])


def _wanted(modules: Mapping[str, nn.Module], placement: Placement) -> dict[Key, _Want]:
    wanted: dict[Key, _Want] = {}
    by_name: dict[str, Key] = {}
    tied: dict[int, Key] = {}

    def want(module: nn.Module, wish: _Want, shares: str) -> None:
        key = (module, wish.child)
        wish.same_as = by_name.get(shares)
        if key not in wanted:
            wanted[key] = wish
            by_name[".".join(filter(None, (wish.name, wish.child)))] = key

    for layer in placement.layers:
        module = modules[layer.name]
        if layer.weight is not None:
            make = partial(_weight_quantizer, module, layer)
            child = weight_name(layer.parameter)
            wish = _Want(layer.name, child, "weight", layer.weight, make, None, layer.parameter, layer.readers)
            own = module._parameters.get(layer.parameter)
            want(module, wish, "")
            if own is not None:
                first = tied.setdefault(id(own), (module, child))
                wish.same_as = None if first == (module, child) else first
        if layer.activation is not None:
            make = partial(_activation_quantizer, module, layer)
            child = input_name(layer.parameter)
            wish = _Want(layer.name, child, "input", layer.activation, make, None, layer.parameter)
            if not _is_layers(module, layer):
                wish.features, wish.size = layer.features, layer.inputs
            want(module, wish, layer.shares)
    for operand in placement.operands:
        module = modules[operand.module]
        make = partial(_operand_quantizer, module, operand)
        child = OUTPUT if operand.role == "output" else operand_name(operand.call, operand.operand)
        wish = _Want(operand.module, child, operand.role, operand.spec, make)
        if operand.call:
            wish.call, wish.operand = operand.call, operand.operand
            wish.features, wish.size = -1 if operand.axis is None else operand.axis, operand.size
        want(module, wish, operand.shares)
    return wanted


def _existing(model: nn.Module) -> dict[Key, LearnableFakeQuantize]:
    """What `attach` has put on a model's modules, under every name that each has."""
    return {
        (module, name): child
        for module in model.modules()
        for name, child in module._modules.items()
        if isinstance(child, LearnableFakeQuantize) and child.site is not None
    }


def _check_replaceable(
    modules: Mapping[str, nn.Module],
    wanted: Mapping[Key, _Want],
    existing: Mapping[Key, LearnableFakeQuantize],
    stale: Iterable[Key],
) -> None:
    names = {module: name for name, module in modules.items()}
    for holder, child in stale:
        quantizer = existing[holder, child]
        if quantizer.learned or quantizer.saw_data():
            own = [(n, q.spec) for (module, n), q in existing.items() if module is holder]
            new = [(n, w.spec) for (module, n), w in wanted.items() if module is holder]
            raise ValueError(
                f"{names[holder]!r} is already quantized as {_shown(own)} and has learned from data. Found other "
                f"settings: {_shown(new)}. Use the same settings, or call `lfq_lightning.detach(model)` first, which "
                "discards what was learned."
            )


def _shown(specs: Sequence[tuple[str, QuantSpec | None]]) -> str:
    return ", ".join(f"{name.removesuffix('_quantizer')}: {spec!r}" for name, spec in specs) or "float"


def _drop(holder: nn.Module, name: str) -> None:
    if isinstance(holder, QuantizedLayer) and name in (WEIGHT, INPUT):
        holder._modules[name] = None
        if not quantizers_of(holder):
            restore_layer(holder)
    else:
        del holder._modules[name]


def _put(modules: Mapping[str, nn.Module], placement: Placement, made: Mapping[Key, LearnableFakeQuantize]) -> None:
    for layer in placement.layers:
        module = modules[layer.name]
        children = weight_name(layer.parameter), input_name(layer.parameter)
        weight, activation = (made.get((module, child)) for child in children)
        if layer.parameter == "weight" and (computes_directly(module) or not layer.readers):
            if isinstance(module, QuantizedLayer):
                module._modules[WEIGHT], module._modules[INPUT] = weight, activation
            else:
                quantize_layer(module, weight, activation)
        else:
            for child, quantizer in zip(children, (weight, activation), strict=True):
                if quantizer is not None:
                    module.add_module(child, quantizer)
        for reader in layer.readers:
            meet_operations(modules[reader], [(module, layer.parameter)], ())
    for operand in placement.operands:
        module = modules[operand.module]
        if operand.role == "output":
            module.add_module(OUTPUT, made[module, OUTPUT])
            quantize_output(module)
        else:
            child = operand_name(operand.call, operand.operand)
            module.add_module(child, made[module, child])
            meet_operations(module, (), [(operand.call, operand.operand)])
    holding = {holder for holder, _ in made}
    for module in dict.fromkeys(modules.values()):
        if isinstance(module, WITH_FAST_PATH) and not holding.isdisjoint(module.modules()):
            keep_slow_path(module)


def _is_layers(module: nn.Module, placed: PlacedLayer) -> bool:
    """Whether what is placed is the weight of a layer that is handed it, and its input."""
    return placed.parameter == "weight" and isinstance(module, QUANTIZABLE) and not isinstance(module, TABLES)


def _weight_quantizer(module: nn.Module, placed: PlacedLayer) -> LearnableFakeQuantize:
    spec, weight = placed.weight, tensor_of(module, placed.parameter)
    assert spec is not None
    axis = spec.axis
    if axis is None:
        axis = placed.axis if placed.axis is not None else int(isinstance(module, TRANSPOSED))
    channels = None
    if spec.granularity == "per_channel":
        channels = weight.shape[axis]
    elif spec.group_size is not None:
        channels = weight.shape[0] * math.ceil(weight.shape[1] / spec.group_size)
    made = LearnableFakeQuantize.from_spec(spec, channels, weight=True, axis=axis, device=weight.device)
    return made.start_off().train(module.training)


def _activation_quantizer(module: nn.Module, placed: PlacedLayer) -> LearnableFakeQuantize:
    spec, weight = placed.activation, tensor_of(module, placed.parameter)
    assert spec is not None
    size, axis = placed.inputs, placed.features
    if _is_layers(module, placed):
        size, axis = input_channels(module)
    return _of_activation(spec, size, axis, weight.device, module, placed.label)


def _operand_quantizer(module: nn.Module, placed: PlacedOperand) -> LearnableFakeQuantize:
    device = next((p.device for p in module.parameters()), None)
    if placed.role != "weight":
        return _of_activation(placed.spec, placed.size, placed.axis or -1, device, module, placed.label)
    channels = placed.size if placed.spec.granularity == "per_channel" else None
    if placed.spec.group_size is not None:
        raise ValueError(
            f"Groups need a weight that a layer has. Found 'per_group' for {placed.label}, which is computed in "
            "forward: use 'per_channel' there."
        )
    made = LearnableFakeQuantize.from_spec(placed.spec, channels, weight=True, axis=placed.axis, device=device)
    return made.start_off().train(module.training)


def _of_activation(
    spec: QuantSpec, size: int | None, axis: int, device: torch.device | None, module: nn.Module, label: str
) -> LearnableFakeQuantize:
    if spec.granularity == "per_channel" and size is None:
        raise ValueError(
            f"Scales per channel need to know how many there are. Found {spec!r} for {label}: use 'per_tensor' there."
        )
    if spec.granularity == "per_token" and axis != -1:
        raise ValueError(
            f"A token has its features in the last dimension. Found {spec!r} for {label}, which has them in dimension "
            f"{axis}: use 'per_tensor' there, with a Rule."
        )
    made = LearnableFakeQuantize.from_spec(
        spec,
        size if spec.granularity == "per_channel" else None,
        axis=axis,
        feature_dims=-axis,
        device=device,
    )
    return made.start_off().train(module.training)


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
    leave_operations(model)
    for module, name in _existing(model):
        _drop(module, name)
    for layer in quantized_layers(model).values():
        restore_layer(layer)
    for module in model.modules():
        let_fast_path(module)
        module.__dict__.pop("learns_alone", None)


def to_float(model: nn.Module) -> None:
    """Detach, and switch off the quantizers that the user has placed: the float model, as for a comparison."""
    detach(model)
    for quantizer in quantizers(model).values():
        quantizer.phase = "off"
