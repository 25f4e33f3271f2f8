"""How the accuracy benchmark quantizes: by us with each rule, and by other libraries with the same budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import nn

import lfq_lightning as lfq
from tests.benchmarks import peers


@dataclass(frozen=True)
class Cell:
    """Bits of weights and inputs, 0 for float, the group size of weights, and whether tokens bring inputs' scales."""

    weight: int
    activation: int
    group_size: int | None = None
    per_token: bool = False

    @property
    def name(self) -> str:
        group = f" g{self.group_size}" if self.group_size else ""
        tokens = " tokens" if self.per_token else ""
        return f"W{self.weight}{group}" + (f"A{self.activation}" if self.activation else "") + tokens


CELLS = {
    cell.name: cell
    for cell in (
        *(Cell(8, 8), Cell(4, 8), Cell(4, 4), Cell(3, 3), Cell(2, 2)),
        *(Cell(4, 0, 32), Cell(4, 8, 32, per_token=True)),
    )
}

# Makes the callbacks that quantize a network in this cell; None where the method has nothing for it.
Method = Callable[[Cell, nn.Module, lfq.PhaseSchedule], list[L.Callback] | None]


def ours(
    cell: Cell,
    network: nn.Module,
    derived: lfq.PhaseSchedule,
    weight: dict[str, Any] | None = None,
    activation: dict[str, Any] | None = None,
    narrow: bool = False,
    **options: Any,
) -> list[L.Callback] | None:
    """The defaults, but for the fields given; the schedule is the one that the run derives."""
    specs: dict[str, Any] = {"weight": cell.weight, "activation": cell.activation or None}
    if cell.per_token:
        if any(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.RNNBase)) for m in network.modules()):
            return None  # it has no tokens
        specs["activation"] = lfq.QuantSpec(bits=cell.activation, symmetric=False, granularity="per_token")
    if cell.group_size:
        specs["weight"] = lfq.QuantSpec(bits=cell.weight, granularity="per_group", group_size=cell.group_size)
    if narrow:
        largest = 2 ** (cell.weight - 1) - 1
        weight = {"quant_min": -largest, "quant_max": largest}
    if weight:
        base = specs["weight"] if cell.group_size else lfq.QuantSpec(bits=cell.weight, granularity="per_channel")
        specs["weight"] = base.replace(**weight)
    if activation and cell.activation:
        base = lfq.QuantSpec(bits=cell.activation, symmetric=False)
        specs["activation"] = base.replace(**activation)
    return [lfq.QuantizationAwareTraining(**specs, record_every_n_steps=10**9, **options)]


class Peer(L.Callback):
    """Another library's quantizers, in its phases, at the steps at which ours change theirs."""

    def __init__(self, phase: Callable[[nn.Module, str], None], schedule: lfq.PhaseSchedule) -> None:
        self.phase, self.schedule, self.now = phase, schedule, ""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        due = self.schedule.phase(trainer.current_epoch, trainer.global_step)
        if due != self.now:
            self.phase(pl_module, due)
        self.now = due


def _recurrent(network: nn.Module) -> bool:
    """Whether peers would leave most of it in float: they have no fake quantizers for the weights of an LSTM."""
    return any(isinstance(m, nn.RNNBase) for m in network.modules())


def torch_ao(cell: Cell, network: nn.Module, schedule: lfq.PhaseSchedule) -> list[L.Callback] | None:
    if cell.group_size or _recurrent(network):
        return None  # it has scales per tensor and per channel
    peers.quantized_by(network, peers.torch_ao_weight, peers.torch_ao_activation, cell.weight, cell.activation)
    return [Peer(peers.torch_ao_phase, schedule)]


def brevitas(cell: Cell, network: nn.Module, schedule: lfq.PhaseSchedule) -> list[L.Callback] | None:
    if cell.group_size or _recurrent(network):
        return None  # groups of Linear alone, and not below a quantized convolution
    activation = peers.brevitas_activation(schedule.learn)
    peers.quantized_by(network, peers.BrevitasWeight, activation, cell.weight, cell.activation)
    return []


def torchao(cell: Cell, network: nn.Module, schedule: lfq.PhaseSchedule) -> list[L.Callback] | None:
    kernels = any(isinstance(m, (nn.Conv1d, nn.Conv2d)) for m in network.modules())
    if kernels or _recurrent(network):
        return None  # it quantizes matrices
    make = partial(_torchao_weight, group_size=cell.group_size)
    peers.quantized_by(network, make, peers.torchao_activation, cell.weight, cell.activation)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, peers.TorchaoWeight):
                module(next(m for m in network.modules() if getattr(m, "weight_quantizer", None) is module).weight)
    return []


def _torchao_weight(bits: int, layer: nn.Module, group_size: int | None) -> nn.Module:
    return peers.TorchaoWeight(bits, group_size)


METHODS: dict[str, Method] = {"ours": ours, "torch.ao": torch_ao}
METHODS |= {name: make for name, make in {"brevitas": brevitas, "torchao": torchao}.items() if peers.INSTALLED[name]}


def adam(lr: float) -> Callable[..., torch.optim.Optimizer]:
    """The default optimizer of scales at another learning rate."""
    return partial(torch.optim.Adam, lr=lr)


EXCLUSIVE = {"saturation": "exclusive"}


def scales_in(domain: str) -> dict[str, dict[str, str]]:
    """The specifications of a learning rule of scales."""
    return {"weight": {"scale_domain": domain}, "activation": {"scale_domain": domain}}


def ours_with(technique: Callable[[], L.Callback]) -> Method:
    """The defaults, and a technique that is a callback of its own."""
    return lambda cell, network, schedule: [*(ours(cell, network, schedule) or []), technique()]


EPOCHS = {"schedule": lfq.PhaseSchedule(observe=0, estimate=1, learn=2)}

# What the defaults were chosen from: each differs from them in what its name says.
VARIANTS: dict[str, Method] = {
    "ours, log domain": partial(ours, **scales_in("log")),
    "ours, powers of two": partial(ours, **scales_in("power_of_two")),
    "ours, BatchNorm as training leaves it": partial(ours, batch_norm="keep"),
    "ours, BatchNorm frozen from epoch 6": ours_with(partial(lfq.BatchNormStatistics, freeze=6)),
    "ours, distilled": ours_with(partial(lfq.Distillation, weight=0.5)),
    "ours, zero points fixed": partial(ours, activation={"learn_zero_point": False}),
    "ours, an epoch to observe and one to estimate": partial(ours, **EPOCHS),
    "ours, Adam 3e-3": partial(ours, optimizer=adam(3e-3)),
    "ours, Adam 3e-4": partial(ours, optimizer=adam(3e-4)),
    "ours, weights lsq": partial(ours, weight={"observer": "lsq"}),
    "ours, weights lsq+": partial(ours, weight={"observer": "lsq+"}),
    "ours, inputs lsq": partial(ours, activation={"observer": "lsq"}),
    "ours, inputs moving average": partial(ours, activation={"observer": "moving_average"}),
    "ours, inputs percentile": partial(ours, activation={"observer": "percentile"}),
    "ours, ranges min-max": partial(ours, weight={"observer": "minmax"}, activation={"observer": "moving_average"}),
    "ours, narrow weights": partial(ours, narrow=True),
    "ours, steps not lengthened": partial(ours, weight={"lr_factor": 1.0}),
    "ours, steps by bits": partial(ours, weight={"lr_factor": "bits"}),
    "ours, steps half as long": lambda cell, network, schedule: ours(
        cell, network, schedule, weight={"lr_factor": max(2.0 ** (4 - cell.weight), 1.0)}
    ),
    "ours, exclusive saturation": partial(ours, weight=EXCLUSIVE, activation=EXCLUSIVE),
}
