"""Low-rank adapters of peft as a part of the weights that they adapt, so that what is quantized is their sum."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """A weight and its adapter merged, W + s B A: what is quantized is what will be left when the adapter is gone."""

    def __init__(self, down: nn.Linear, up: nn.Linear, scaling: float) -> None:
        super().__init__()
        self.down, self.up, self.scaling = down, up, scaling

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scaling * (self.up.weight @ self.down.weight)


def adapted(network: nn.Module) -> Any:
    """The network with adapters of peft, each of which is part of the weight that it adapts."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    made = get_peft_model(network, LoraConfig(r=8, target_modules="all-linear"))
    trained = [p for p in made.parameters() if p.requires_grad]
    for layer in [module for module in made.modules() if isinstance(module, LoraLayer)]:
        low_rank = LowRank(layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"])
        parametrize.register_parametrization(layer.base_layer, "weight", low_rank)
    made.base_model.disable_adapter_layers()  # they would be added once more
    for parameter in trained:
        parameter.requires_grad_(True)
    return made
