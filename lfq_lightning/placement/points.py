"""Where a model is quantized: each place with its quantizer, what that serves, and whose it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lfq_lightning.placement.quantized_layer import is_trained, tensor_of, whole
from lfq_lightning.private import plain_name
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.quantizer.saved import Role, site_in_model


@dataclass(frozen=True, slots=True)
class Point:
    """One place where a network is quantized.

    Args:
        name: by which records and checkpoints know the quantizer, such as `conv1.weight_quantizer`.
        quantizer: the module itself.
        site: dotted name of the module in whose forward the tensor is read, such as `conv1`.
        owner: the module that `attach` put the quantizer on; None for one that the user has placed.
    """

    name: str
    quantizer: LearnableFakeQuantize
    site: str
    owner: nn.Module | None

    @property
    def role(self) -> Role | None:
        """What the quantizer serves; None where only the user knows."""
        return self.quantizer.role

    @property
    def has_parameter(self) -> bool:
        """Whether what is quantized is the owner's own, and not what a forward pass brings."""
        return self.owner is not None and self.quantizer.role == "weight" and not self.quantizer.place.call

    @property
    def parameter(self) -> Tensor | None:
        """What is quantized, where that is the owner's own."""
        return (
            tensor_of(self.owner, self.quantizer.place.parameter)
            if self.owner is not None and self.has_parameter
            else None
        )

    @property
    def learns(self) -> bool:
        """Whether the phase may let scale and zero point learn."""
        owner, place = self.owner, self.quantizer.place
        if owner is None or place.call or self.quantizer.role == "output" or owner.__dict__.get("learns_alone"):
            return True
        return is_trained(owner, place.parameter)

    @property
    def followed(self) -> list[nn.Parameter]:
        """The parameters whose optimizer scale and zero point go with; none where there is no choice."""
        if self.owner is None:
            return []
        own = list(self.owner.parameters(recurse=False))
        if own:
            return own
        quantizers = (m for m in self.owner.modules() if isinstance(m, LearnableFakeQuantize))
        qparams = {p for quantizer in quantizers for p in quantizer.parameters()}
        return [p for p in self.owner.parameters() if p not in qparams]

    def whole_parameter(self) -> Tensor:
        """The parameter, gathered from every rank where FSDP2 has sharded it; every rank takes part."""
        parameter = self.parameter
        assert parameter is not None
        return whole(parameter)


Points = Mapping[str, Point]


def points(model: nn.Module) -> dict[str, Point]:
    """Every place where a model is quantized, by name, in order of registration; a shared quantizer once.

    A walk through a model of thousands of layers takes a good part of a step. Nothing is remembered behind anybody's
    back: who keeps this knows when quantizers may come and go, as a run does, which attaches before it begins.
    """
    found: dict[str, Point] = {}
    modules: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        modules[path] = module
        if isinstance(module, LearnableFakeQuantize):
            name, holder = plain_name(path), modules[path.rpartition(".")[0]]
            owner = holder if module.site is not None else None
            found[name] = Point(name, module, site_in_model(name, module.site), owner)
    return found


def weights(points: Points) -> Iterator[Point]:
    """Those whose tensor is a parameter, which can be looked at where it is."""
    return (point for point in points.values() if point.has_parameter)


def activations(points: Points) -> Iterator[Point]:
    """Those that see their tensor in a forward pass alone; a weight that the user hands to a quantizer is one."""
    return (point for point in points.values() if not point.has_parameter)
