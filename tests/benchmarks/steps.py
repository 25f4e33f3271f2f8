"""One training step of a network, in float and quantized by us and by others; as a program, its peak memory."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import lfq_lightning as lfq
from lfq_lightning.training.optimizer import QParamOptimizer, hidden_qparams
from tests.benchmarks.measuring import Call
from tests.benchmarks.networks import make

Prepare = Callable[[nn.Module, Tensor], None]


def keep_float(model: nn.Module, x: Tensor) -> None:
    """Nothing."""


def with_ours(model: nn.Module, x: Tensor, compress_saved: bool = False) -> None:
    options = {"compress_saved": True} if compress_saved else {}
    lfq.attach(model, weight=4, activation=4, **options)
    lfq.calibrate(model, [x])
    lfq.set_phase(model, "learn")


def with_ours_compressed(model: nn.Module, x: Tensor) -> None:
    with_ours(model, x, compress_saved=True)


def with_torch_ao(model: nn.Module, x: Tensor) -> None:
    """`_LearnableFakeQuantize` on the same tensors: weights per channel, inputs per tensor, learning."""
    from torch.ao.quantization import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

    def weight(bits: int, channels: int) -> nn.Module:
        return _LearnableFakeQuantize(
            MovingAveragePerChannelMinMaxObserver,
            -(2 ** (bits - 1)),
            2 ** (bits - 1) - 1,
            channel_len=channels,
            use_grad_scaling=True,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )

    def activation(bits: int) -> nn.Module:
        return _LearnableFakeQuantize(
            MovingAverageMinMaxObserver, 0, 2**bits - 1, use_grad_scaling=True, dtype=torch.quint8
        )

    _around_layers(model, weight, activation)
    model(x)
    for module in model.modules():
        if isinstance(module, _LearnableFakeQuantize):
            module.enable_param_learning()


def with_brevitas(model: nn.Module, x: Tensor) -> None:
    """Learned scales in the logarithmic domain for weights, learned from statistics for inputs."""
    from brevitas.inject.enum import ScalingImplType
    from brevitas.nn import QuantIdentity
    from brevitas.proxy import WeightQuantProxyFromInjector
    from brevitas.quant import Int8WeightPerChannelFloat, ShiftedUint8ActPerTensorFloat

    class Weight(nn.Module):
        def __init__(self, bits: int, layer: nn.Module) -> None:
            super().__init__()
            quantizer = Int8WeightPerChannelFloat.let(
                bit_width=bits, scaling_impl_type=ScalingImplType.PARAMETER_FROM_STATS
            )
            self.proxy = WeightQuantProxyFromInjector(layer, quantizer)

        def forward(self, weight: Tensor) -> Tensor:
            return self.proxy(weight).value

    def activation(bits: int) -> nn.Module:
        return QuantIdentity(act_quant=ShiftedUint8ActPerTensorFloat, bit_width=bits, return_quant_tensor=False)

    _around_layers(model, lambda bits, channels, layer: Weight(bits, layer), activation)
    model(x)


def with_torchao(model: nn.Module, x: Tensor) -> None:
    """Its fake quantizers compute ranges anew at each step and learn nothing; 4-bit inputs are per token."""
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    def weight(bits: int, channels: int) -> nn.Module:
        dtype = torch.int4 if bits == 4 else torch.int8
        return IntxFakeQuantizer(IntxFakeQuantizeConfig(dtype, "per_channel", is_symmetric=True))

    def activation(bits: int) -> nn.Module:
        dtype = torch.uint4 if bits == 4 else torch.uint8
        return IntxFakeQuantizer(IntxFakeQuantizeConfig(dtype, "per_token", is_symmetric=False))

    _around_layers(model, weight, activation)


def _around_layers(model: nn.Module, weight: Callable[..., nn.Module], activation: Callable[..., nn.Module]) -> None:
    """Quantize inputs and weights of the layers that `attach` takes, the first and the last with 8 bits as it does."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for layer in layers:
        bits = 8 if layer in (layers[0], layers[-1]) else 4
        arguments = (bits, layer.weight.shape[0])
        try:
            quantizers = weight(*arguments, layer), activation(bits)
        except TypeError:
            quantizers = weight(*arguments), activation(bits)
        layer.add_module("weight_quantizer", quantizers[0])
        layer.add_module("input_quantizer", quantizers[1])
        layer.forward = _Forward(layer)  # type: ignore[method-assign]


class _Forward:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        x, weight = layer.input_quantizer(x), layer.weight_quantizer(layer.weight)
        if isinstance(layer, nn.Conv2d):
            return layer._conv_forward(x, weight, layer.bias)
        return nn.functional.linear(x, weight, layer.bias)


PREPARATIONS: dict[str, Prepare] = {
    "float": keep_float,
    "ours": with_ours,
    "ours, compress_saved": with_ours_compressed,
    "torch.ao": with_torch_ao,
}
PEERS = {"brevitas": with_brevitas, "torchao": with_torchao}
MISSING = [name for name in PEERS if find_spec(name) is None]
PREPARATIONS |= {name: prepare for name, prepare in PEERS.items() if name not in MISSING}


def training_step(network: str, preparation: str) -> Call:
    """A function that takes one step of SGD with momentum; the qparams are stepped by the optimizer that is theirs."""
    model, x, labels = make(network)
    PREPARATIONS[preparation](model, x)
    with hidden_qparams(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if preparation.startswith("ours"):
        QParamOptimizer(model, [optimizer])

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, -2), labels.flatten()).backward()
        optimizer.step()

    return step


def peak_memory(network: str, preparation: str) -> float:
    """MB by which three steps raise the most memory that this process ever held, above its idle state."""
    idle = _most_held()
    step = training_step(network, preparation)
    for _ in range(3):
        step()
    return _most_held() - idle


def _most_held() -> float:
    # getrusage's ru_maxrss would begin at what the parent process held.
    status = Path("/proc/self/status").read_text()
    return float(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(peak_memory(*sys.argv[1:]))
