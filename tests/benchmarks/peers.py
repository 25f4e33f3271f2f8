"""Other libraries' fake quantizers on the layers that `attach` quantizes, at the bits that it would give them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

# Makes a layer's weight quantizer and its input quantizer, of so many bits; None leaves either in float.
Make = Callable[[int, nn.Module], nn.Module | None]

INSTALLED = {name: find_spec(name.replace(".", "_")) is not None for name in ("brevitas", "torchao")}


def quantized_by(model: nn.Module, weight: Make, activation: Make, weight_bits: int, activation_bits: int) -> None:
    """Quantize weights and inputs of every convolution, Linear and Embedding, the first and last with 8 bits at least.

    Bits of 0 mean float. The quantizers are children of their layers, named as ours are.
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear, nn.Embedding))]
    for layer in layers:
        least = 8 if layer in (layers[0], layers[-1]) else 0
        wide = [max(bits, least) if bits else 0 for bits in (weight_bits, activation_bits)]
        takes_floats = not isinstance(layer, nn.Embedding)
        layer.add_module("weight_quantizer", weight(wide[0], layer) if wide[0] else None)
        layer.add_module("input_quantizer", activation(wide[1], layer) if wide[1] and takes_floats else None)
        layer.forward = _Forward(layer)  # type: ignore[method-assign]


class _Forward:
    """The layer's own forward, which reads the quantized weight in place of the parameter."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.own = layer, layer.forward

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if layer.input_quantizer is not None:
            x = layer.input_quantizer(x)
        if layer.weight_quantizer is None:
            return self.own(x)
        object.__setattr__(layer, "weight", layer.weight_quantizer(layer.weight))
        try:
            return self.own(x)
        finally:
            object.__delattr__(layer, "weight")


# ---- torch.ao -----------------------------------------------------------------------------------------------------


def torch_ao_weight(bits: int, layer: nn.Module) -> nn.Module:
    """`_LearnableFakeQuantize`, symmetric, one scale per output channel, with its own gradient scaling."""
    from torch.ao.quantization import MovingAveragePerChannelMinMaxObserver
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

    return _LearnableFakeQuantize(
        MovingAveragePerChannelMinMaxObserver,
        -(2 ** (bits - 1)),
        2 ** (bits - 1) - 1,
        channel_len=layer.weight.shape[0],
        use_grad_scaling=True,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


def torch_ao_activation(bits: int, layer: nn.Module) -> nn.Module:
    """`_LearnableFakeQuantize`, affine, one scale."""
    from torch.ao.quantization import MovingAverageMinMaxObserver
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

    return _LearnableFakeQuantize(
        MovingAverageMinMaxObserver, 0, 2**bits - 1, use_grad_scaling=True, dtype=torch.quint8
    )


def torch_ao_phase(model: nn.Module, phase: str) -> None:
    """Its three states, under our names."""
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

    for module in model.modules():
        if isinstance(module, _LearnableFakeQuantize):
            if phase == "observe":
                module.enable_static_observation()
            elif phase == "estimate":
                module.enable_static_estimate()
            else:
                module.enable_param_learning()


# ---- Brevitas -----------------------------------------------------------------------------------------------------


class BrevitasWeight(nn.Module):
    """A learned scale per output channel, begun with the weights' statistics; kernels are flattened."""

    def __init__(self, bits: int, layer: nn.Module) -> None:
        super().__init__()
        from brevitas.inject.enum import ScalingImplType
        from brevitas.nn import QuantLinear
        from brevitas.quant import Int8WeightPerChannelFloat

        learned = ScalingImplType.PARAMETER_FROM_STATS
        quantizer = Int8WeightPerChannelFloat.let(bit_width=bits, scaling_impl_type=learned)
        matrix = layer.weight.detach().flatten(1).clone()
        like = QuantLinear(matrix.shape[1], matrix.shape[0], bias=False, weight_quant=quantizer)
        like.weight.data = matrix
        like.weight_quant.init_tensor_quant()
        self.proxy = like.weight_quant
        self.statistics_of = [like]  # kept alive without being registered

    def forward(self, weight: Tensor) -> Tensor:
        return self.proxy(weight.flatten(1)).value.view_as(weight)


def brevitas_activation(steps: int) -> Make:
    """A learned scale, begun with the statistics of the first `steps` batches, and their zero point."""
    from brevitas.nn import QuantIdentity
    from brevitas.quant import ShiftedUint8ActPerTensorFloat

    quantizer = ShiftedUint8ActPerTensorFloat.let(collect_stats_steps=steps)
    return lambda bits, layer: QuantIdentity(act_quant=quantizer, bit_width=bits, return_quant_tensor=False)


# ---- torchao ------------------------------------------------------------------------------------------------------


class TorchaoWeight(nn.Module):
    """Range learning per output channel or per group of inputs; it takes matrices, so kernels are flattened."""

    def __init__(self, bits: int, group_size: int | None = None) -> None:
        super().__init__()
        from torchao.quantization.qat import IntxFakeQuantizeConfig
        from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

        granularity = {"granularity": "per_channel"} if group_size is None else {"group_size": group_size}
        settings = {"is_symmetric": True, "is_dynamic": False, "range_learning": True, **granularity}
        self.quantizer = IntxFakeQuantizer(IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), **settings))
        self.quantizer._initialized = True

    def forward(self, weight: Tensor) -> Tensor:
        return self.quantizer(weight.flatten(1)).view_as(weight)


def torchao_activation(bits: int, layer: nn.Module) -> nn.Module:
    """Ranges anew for each token: it learns none for inputs."""
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    return IntxFakeQuantizer(IntxFakeQuantizeConfig(getattr(torch, f"uint{bits}"), "per_token", is_symmetric=False))
