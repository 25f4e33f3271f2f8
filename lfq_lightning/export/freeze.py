"""A quantized model in torch's own modules and operations, with constant scales and zero points."""

from __future__ import annotations

import copy
import inspect

import torch
from torch import Tensor, nn

from lfq_lightning.checking import check_model
from lfq_lightning.export.exportable import own_copy
from lfq_lightning.placement.layers import TRANSPOSED
from lfq_lightning.placement.meeting import weight_name
from lfq_lightning.placement.points import points
from lfq_lightning.placement.quantized_layer import (
    QuantizedLayer,
    keep_slow_path,
    quantized_layers,
    replace_placed,
    restore_layer,
    whole,
)
from lfq_lightning.quantizer import LearnableFakeQuantize


def freeze(model: nn.Module) -> nn.Module:
    """A copy of a quantized model that computes the same with constants, and needs only torch to run.

    Layers are of their float types again. Each computes by its child `constant`, a layer whose weight holds the
    fake-quantized values, behind plain operations (a `torch.fx.GraphModule`) that fake-quantize its input; `weight` is
    the float weight, as whoever reads it beside the layer (a tied output projection) needs it. Where a module's own
    code reads a parameter by a function, as attention does, the parameter itself has its quantized values; if inputs
    are quantized there too, the module needs this package to run. The copy goes through `torch.export`,
    `torch.jit.trace` and pickle. It computes in eval mode whatever the model's phase was.

    Args:
        model: a model with quantizers whose qparams are set; it is not changed.

    Returns:
        The copy, in eval mode, without quantizers.

    Raises:
        ValueError: if there are no quantizers, one has never seen data, or a subclass of a layer takes several inputs.

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
    check_model(model)
    frozen = own_copy(model)
    read_elsewhere = _write_weights(frozen)
    weights: dict[int, nn.Parameter] = {}  # layers that share a quantizer share its weight
    for name, layer in quantized_layers(frozen).items():
        if layer in read_elsewhere:
            continue
        weight, activation = layer.weight_quantizer, layer.input_quantizer
        used = layer.weight
        if weight is not None:
            if id(weight) not in weights:
                made = weight.quantized(whole(layer.weight)).detach()
                weights[id(weight)] = nn.Parameter(made, requires_grad=False)
            used = weights[id(weight)]
        restore_layer(layer)
        constant = _with_weight(layer, used)
        if activation is not None:
            constant = _after(_InputQuantizer(activation), constant, name)
        layer.add_module("constant", constant)
        layer.__dict__["forward"] = constant  # nn.Module calls what the instance has, before what its type has
    _keep_constants(frozen)
    for module in frozen.modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.MultiheadAttention)):
            keep_slow_path(module)  # the fused path would read weights past the quantized inputs
    replace_placed(frozen, _constant)
    return frozen


def _write_weights(frozen: nn.Module) -> set[nn.Module]:
    """Where the code of a module reads a parameter by a function, the parameter itself takes its quantized values.

    Returns:
        The modules that have such parameters.
    """
    owners: set[nn.Module] = set()
    written: dict[int, nn.Parameter] = {}
    for point in points(frozen).values():
        place, owner = point.quantizer.place, point.owner
        if not point.has_parameter or owner is None or not place.readers:
            continue
        owners.add(owner)
        before = point.parameter
        assert before is not None
        after = nn.Parameter(point.quantizer.quantized(point.whole_parameter()).detach(), requires_grad=False)
        written[id(before)] = after
        del owner._modules[weight_name(place.parameter)]
        if isinstance(owner, QuantizedLayer):
            owner._modules[weight_name(place.parameter)] = None
    for module in frozen.modules():  # tied parameters stay tied
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in written:
                module._parameters[name] = written[id(parameter)]
    return owners


def _keep_constants(frozen: nn.Module) -> None:
    """Constants in place of what else quantizes operands and outputs in the code of modules."""
    made = {point.quantizer: Constant(point.quantizer) for point in points(frozen).values() if point.owner is not None}
    for module in frozen.modules():
        module._modules.update({name: made[child] for name, child in module._modules.items() if child in made})


def _constant(name: str, quantizer: LearnableFakeQuantize) -> nn.Module:
    """What the user calls in place of a quantizer of their own."""
    if quantizer.group_size is not None:
        raise ValueError(
            f"`freeze` gives a tensor one scale, or one for each channel. Found groups in {name!r}: use "
            "granularity 'per_channel' there."
        )
    return torch.fx.symbolic_trace(_InputQuantizer(quantizer)).eval()


def _with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """The layer without its hooks and with another weight; everything else is the layer's own."""
    made = copy.copy(layer)
    nn.Module.__init__(made)
    made.__dict__.pop("weight", None)  # a pruned one
    made._parameters.update(layer._parameters)
    made._parameters["weight"] = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    made._buffers.update(layer._buffers)
    made._modules.update(layer._modules)
    return made.eval()


def _after(quantize: nn.Module, layer: nn.Module, name: str) -> nn.Module:
    """A layer whose first input is quantized, with the arguments of its forward; a graph, so that torch can run it."""
    parameters = list(inspect.signature(type(layer).forward).parameters.values())[1:]
    if not isinstance(layer, TRANSPOSED) and len(parameters) != 1:
        raise ValueError(
            f"`freeze` quantizes the one input of a layer. Found {', '.join(map(str, parameters))} for {name!r}: use "
            "`export_pt2` or `export_onnx`, which see what it is given."
        )
    graph = torch.fx.Graph()
    first, *others = [graph.placeholder(p.name, default_value=p.default) for p in parameters]
    quantized = graph.call_module("quantize_input", (first,))
    graph.output(graph.call_module("layer", (quantized, *others)))
    return torch.fx.GraphModule({"quantize_input": torch.fx.symbolic_trace(quantize), "layer": layer}, graph).eval()


class Constant(nn.Module):
    """Stands for a quantizer that a module's own code meets."""

    def __init__(self, quantizer: LearnableFakeQuantize) -> None:
        super().__init__()
        self.quantize = _InputQuantizer(quantizer)

    def forward(self, x: Tensor, learn: bool = True) -> Tensor:
        """X on the grid."""
        made: Tensor = self.quantize(x)
        return made

    def in_graph(self, x: Tensor) -> Tensor:
        """Nothing more."""
        return x


class _InputQuantizer(nn.Module):
    """Fake-quantizes the input of a layer in plain operations."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: LearnableFakeQuantize) -> None:
        super().__init__()
        scale, zero_point = quantizer.used_qparams()
        self.register_buffer("scale", scale.clone())
        self.register_buffer("zero_point", zero_point.clone())
        self.axis, self.codes = quantizer.axis, quantizer.code_range

    # torch.fx would keep the annotations, as text, and its graph then not pickle.
    def forward(self, x):  # type: ignore[no-untyped-def]
        moved = x if self.axis is None else x.movedim(self.axis, -1)
        codes = torch.clamp((moved.float() / self.scale).round() + self.zero_point, *self.codes)
        y = (codes - self.zero_point) * self.scale
        return (y if self.axis is None else y.movedim(-1, self.axis)).to(x.dtype)
