"""What becomes of scales and zero points whose layer's weight is frozen: they keep still, or learn alone."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lfq_lightning.placement.host import FrozenLayers, hosts, set_learning_alone


def settle_frozen_layers(model: nn.Module, optimizers: Sequence[Optimizer], choice: FrozenLayers) -> None:
    """Decide for each quantized layer, as a fit begins, whether its scales learn without its weight, and say so.

    Frozen is a layer whose weight has `requires_grad=False` now. Of several optimizers, one that holds such a weight
    will take turns with the others (a GAN's): that layer is not frozen but waits, and its scales wait with it.

    Args:
        model: a model with quantizers.
        optimizers: the user's.
        choice: "keep" leaves scales and zero points of frozen layers as they were estimated, "learn" lets them learn.
    """
    layers = hosts(model)
    held = {id(p) for o in optimizers for g in o.param_groups for p in g["params"]} if len(optimizers) > 1 else set()
    frozen = [layer for layer in layers.values() if not layer.weight.requires_grad and id(layer.weight) not in held]
    set_learning_alone(layers.values(), False)
    if choice == "learn":
        set_learning_alone(frozen, True)
    if not frozen:
        return
    count = f"{len(frozen)} of {len(layers)} quantized layers have frozen weights"
    if choice == "learn":
        rank_zero_info(f"{count}: their scales and zero points learn alone (frozen_layers='learn').")
    elif len(frozen) == len(layers):
        rank_zero_warn(
            f"{count}, and with frozen_layers='keep' their scales and zero points keep their estimates: nothing that "
            "is quantized will learn. Use frozen_layers='learn' to train scales and zero points alone."
        )
    else:
        rank_zero_info(f"{count}: their scales and zero points keep their estimates (frozen_layers='keep').")
