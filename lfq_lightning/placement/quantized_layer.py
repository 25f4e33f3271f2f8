"""A layer that computes with quantized weights and inputs, and is otherwise the layer it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from lfq_lightning.checking import check_model
from lfq_lightning.placement.compressing import Quantized, Saved, compressed
from lfq_lightning.placement.computing import Compute, computation
from lfq_lightning.placement.sharing import quantized_once
from lfq_lightning.private import is_compiled, plain_name
from lfq_lightning.quantizer import LearnableFakeQuantize

FrozenLayers = Literal["keep", "learn"]

WEIGHT, INPUT = "weight_quantizer", "input_quantizer"


class QuantizedLayer(nn.Module):
    """Mixed into a layer's class at run time, as FSDP2 does, so that the layer keeps its type, keys and behaviour.

    It computes with the fake-quantized weight; `weight` is the parameter to whoever reads it from outside (optimizers,
    initialisers, weight tying, pruning). A call writes nothing to the layer, so that threads may share a model.
    """

    of_float_type = True  # the class behind this one is that of the layer without quantization
    weight: Tensor
    weight_quantizer: LearnableFakeQuantize | None
    input_quantizer: LearnableFakeQuantize | None
    _compute: ClassVar[Compute]  # of the layer's kind
    _looks_up: ClassVar[bool] = False  # whether it is a table
    saved: Saved | None = None  # where `attach` was asked to compress what backward needs
    learns_alone: bool = False  # whether scales and zero points learn although the weight is frozen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # By what nn.Module holds: its own way to a child or a parameter takes as long as a small kernel.
        quantizer: Any = self._modules[INPUT]
        of_weight: Any = self._modules[WEIGHT]
        weight: Tensor | None = self._parameters.get("weight")
        if weight is None:  # it is computed
            weight = self.weight
        if self._looks_up:
            rows = self._rows(weight, *args, **kwargs)
            if rows is not None:
                return rows
        learn = weight.requires_grad or self.learns_alone
        given = (*args, *kwargs.values())
        if quantizer is not None:
            args = tuple([_quantize(quantizer, a, learn) for a in args])
            kwargs = {name: _quantize(quantizer, a, learn) for name, a in kwargs.items()} if kwargs else kwargs
        used = weight if of_weight is None else of_weight(weight, learn)
        # Both by the weight: the layer's own computation may change its input in place, and gets it as it was given.
        for each in (quantizer, of_weight):
            if each is not None:
                used = each.in_graph(used)
        if self.saved is None:
            return self._compute(self, used, *args, **kwargs)
        pairs = zip((*args, *kwargs.values(), used), (*given, weight), strict=True)
        makers = [quantizer] * len(given) + [of_weight]
        made = [
            Quantized(value, source, maker)
            for (value, source), maker in zip(pairs, makers, strict=True)
            if maker is not None and _is_floating(value)
        ]
        with compressed(made, self.saved):
            return self._compute(self, used, *args, **kwargs)

    def _rows(self, weight: Tensor, input: Tensor) -> Tensor | None:
        """What a table gives, where it is faster to quantize the rows that were looked up than all; None elsewhere."""
        quantizer, compiler = self.weight_quantizer, torch.compiler
        if not isinstance(quantizer, LearnableFakeQuantize) or compiler.is_compiling() or compiler.is_exporting():
            return None
        few = 2 * input.numel() < len(weight)
        plain = self.max_norm is None and not self.scale_grad_by_freq and not self.sparse and self.saved is None
        if not few or not plain or not quantizer.serves_rows_of(weight):
            return None
        return quantizer.rows(weight, input, self.padding_idx, weight.requires_grad or self.learns_alone)  # type: ignore[arg-type]

    @property
    def learns(self) -> bool:
        """Whether the phase may let scales and zero points learn."""
        return self.learns_alone or is_trained(self, "weight")

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (float_type(self),), self.__dict__


def _quantize(quantizer: LearnableFakeQuantize, value: Any, learn: bool) -> Any:
    return quantized_once(quantizer, value, learn) if _is_floating(value) else value


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@cache
def quantized_type(layer_type: type[nn.Module]) -> type[nn.Module]:
    """The class that a layer of this type takes while it is quantized."""
    members = {"__module__": __name__, "_compute": staticmethod(computation(layer_type))}
    members["_looks_up"] = layer_type.forward is nn.Embedding.forward
    return type(f"Quantized{layer_type.__name__}", (QuantizedLayer, layer_type), members)


def float_type(module: nn.Module) -> type[nn.Module]:
    """The type of a layer without quantization."""
    kinds = type(module).__mro__  # FSDP2 puts a class of its own in front
    mixed_in = next((place for place, kind in enumerate(kinds) if "of_float_type" in vars(kind)), None)
    return type(module) if mixed_in is None else kinds[mixed_in + 1]


def _rebuild(layer_type: type[nn.Module]) -> nn.Module:
    made = quantized_type(layer_type)  # type: ignore[arg-type]
    return made.__new__(made)


def whole(parameter: Tensor) -> Tensor:
    """A parameter, gathered from every rank where FSDP2 has sharded it; every rank takes part."""
    detached = parameter.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


class KeepSlowPath:
    """A hook that does nothing: nn.TransformerEncoderLayer's fused path reads weights directly unless one is there."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        return None


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """A module's parameter, or what it computes in its place; looking at it changes nothing, as a forward pass may."""
    own = module._parameters.get(name)
    if own is not None:
        return own
    computing = module.parametrizations.modules() if parametrize.is_parametrized(module, name) else ()  # type: ignore[union-attr]
    modes = {each: each.training for each in computing}
    for each in modes:
        each.training = False  # spectral_norm comes nearer to the norm with each look at the weight
    try:
        found: Tensor = getattr(module, name)
        return found
    finally:
        for each, mode in modes.items():
            each.training = mode


def is_trained(module: nn.Module, name: str) -> bool:
    """Whether a parameter, or any of those that it is computed from, has gradients."""
    own = module._parameters.get(name)  # asked for each of thousands: nn.Module's way takes ten times as long
    if own is not None:
        return own.requires_grad
    inner = (child for child in module.children() if not isinstance(child, LearnableFakeQuantize))
    sources = (*module.parameters(recurse=False), *(p for child in inner for p in child.parameters()))
    return any(p.requires_grad for p in sources)


def quantize_layer(
    layer: nn.Module, weight: LearnableFakeQuantize | None, activation: LearnableFakeQuantize | None
) -> None:
    """Turn a layer into a quantized one in place."""
    layer.__class__ = quantized_type(type(layer))  # type: ignore[arg-type]
    if weight is not None:
        weight.role, weight.site = "weight", ""
    if activation is not None:
        activation.role, activation.site = "input", ""
    layer.add_module(WEIGHT, weight)
    layer.add_module(INPUT, activation)


WITH_FAST_PATH = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


def keep_slow_path(module: nn.Module) -> None:
    """Have torch compute a module, and what holds it, by the calls that can be met."""
    if isinstance(module, nn.TransformerEncoder):  # which hands nested tensors on to layers that are fused
        module.__dict__.setdefault("_used_nested_tensor", module.__dict__.get("use_nested_tensor"))
        module.use_nested_tensor = False
    elif "_slow_path_hook" not in module.__dict__:
        module.__dict__["_slow_path_hook"] = module.register_forward_pre_hook(KeepSlowPath())


def let_fast_path(module: nn.Module) -> None:
    """Undo `keep_slow_path`."""
    if "_slow_path_hook" in module.__dict__:
        module.__dict__.pop("_slow_path_hook").remove()
    if "_used_nested_tensor" in module.__dict__:
        module.__dict__["use_nested_tensor"] = module.__dict__.pop("_used_nested_tensor")


def restore_layer(layer: nn.Module) -> None:
    """Undo `quantize_layer`."""
    let_fast_path(layer)
    layer.__dict__.pop("saved", None)
    layer.__dict__.pop("learns_alone", None)
    del layer._modules[INPUT], layer._modules[WEIGHT]
    layer.__class__ = float_type(layer)


def quantizers_of(layer: QuantizedLayer) -> list[LearnableFakeQuantize]:
    """What `attach` has put on a layer, whatever it serves there."""
    children = layer._modules.values()
    return [child for child in children if isinstance(child, LearnableFakeQuantize) and child.site is not None]


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a model by dotted name, in order of registration."""
    return {plain_name(name): module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def set_compressed(model: nn.Module, compress: bool) -> None:
    """Whether quantized layers rebuild in backward what they would otherwise keep for it."""
    check_compressible(model, compress)
    for layer in quantized_layers(model).values():
        layer.saved = Saved() if compress else None


def holders(model: nn.Module) -> list[nn.Module]:
    """The modules that `attach` has put quantizers on, in order of registration."""
    return [
        module
        for module in model.modules()
        if any(isinstance(c, LearnableFakeQuantize) and c.site is not None for c in module._modules.values())
    ]


def set_learning_alone(holders: Iterable[nn.Module], alone: bool) -> None:
    """Whether scales and zero points of these modules learn although the parameter that they serve is frozen."""
    for module in holders:
        module.__dict__["learns_alone"] = alone


def check_compressible(model: nn.Module, compress: bool) -> None:
    """Raise ValueError where nothing can be rebuilt, since a compiler decides what is kept."""
    if compress and any(is_compiled(module) for module in model.modules()):
        raise ValueError(
            "`compress_saved` goes with eager execution. Found a model compiled by torch.compile, which decides by "
            "itself what is kept for backward: leave one of the two out."
        )


def quantizers(model: nn.Module) -> dict[str, LearnableFakeQuantize]:
    """Every quantizer in a model by dotted name, in order of registration; a shared one once.

    Args:
        model: any module, attached or not.

    Returns:
        Names such as `layer1.conv.weight_quantizer` to the modules themselves.

    Example:
        >>> import lfq_lightning as lfq
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> _ = lfq.attach(model)
        >>> list(lfq.quantizers(model))
        ['0.weight_quantizer', '0.input_quantizer']
    """
    check_model(model)
    return {
        plain_name(name): module for name, module in model.named_modules() if isinstance(module, LearnableFakeQuantize)
    }


def placed_by_users(model: nn.Module) -> dict[str, LearnableFakeQuantize]:
    """The quantizers of a model that `attach` did not put on a layer."""
    return {name: quantizer for name, quantizer in quantizers(model).items() if quantizer.site is None}


def replace_placed(model: nn.Module, make: Callable[[str, LearnableFakeQuantize], nn.Module]) -> None:
    """Put other modules in place of the quantizers that the user has placed, under every name that each has."""
    made = {quantizer: make(name, quantizer) for name, quantizer in placed_by_users(model).items()}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if path and isinstance(module, LearnableFakeQuantize) and module in made:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made[module])


def first_quantizer(model: nn.Module) -> LearnableFakeQuantize | None:
    """A model's first quantizer, found without looking at the rest."""
    return next((module for module in model.modules() if isinstance(module, LearnableFakeQuantize)), None)


def qparams(model: nn.Module) -> list[nn.Parameter]:
    """The learnable scales and zero points of a model."""
    return [p for quantizer in quantizers(model).values() for p in quantizer.parameters(recurse=False)]
