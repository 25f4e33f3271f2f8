"""timm's image networks, small where their configuration lets them be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.zoo.case import Case, Sample


def _case(name: str, size: int = 32, settings: Mapping[str, Any] | None = None, **more: Any) -> Case:
    def make() -> nn.Module:
        import timm

        made: nn.Module = timm.create_model(name, pretrained=False, num_classes=10, **(settings or {}))
        return made

    def sample() -> Sample:
        return {"x": torch.randn(3, size, size)}

    return Case(f"timm {name}", make, sample, **more)


_FLAT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
_WINDOWS = {"img_size": 64, "patch_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
_ADDED: dict[str, Any] = {"share": 0.98, "why": "positions are added, and the token of the class is put in front"}

CASES = [
    _case("resnet18"),
    _case("resnetv2_50", settings={"layers": (1, 1, 1, 1), "channels": (32, 64, 96, 128)}),
    _case("regnetx_002"),
    _case("regnety_002"),
    _case("densenet121", settings={"block_config": (2, 2, 2, 2)}),
    _case("repvgg_a0"),
    _case("mobilenetv2_050"),
    _case("mobilenetv3_small_050"),
    _case("efficientnet_b0"),
    _case("efficientnet_lite0"),
    _case("tf_efficientnet_b0"),
    _case("ghostnet_050"),
    _case("nfnet_l0", settings={"depths": (1, 1, 1, 1)}),
    _case("convnext_atto"),
    _case("convnextv2_atto"),
    _case("vit_tiny_patch16_224", settings=_FLAT, **_ADDED),
    _case("deit3_small_patch16_224", settings=_FLAT, **_ADDED),
    _case("beit_base_patch16_224", settings=_FLAT),
    _case("eva02_tiny_patch14_224", settings=_FLAT, **_ADDED),
    _case("swin_tiny_patch4_window7_224", 64, _WINDOWS),
    _case(
        "swinv2_tiny_window8_256",
        64,
        _WINDOWS,
        share=0.85,
        why="a network gives the bias of each relative position, which is the same for every batch",
    ),
    _case("mobilevit_xxs", 64),
    _case("poolformer_s12", 64),
    _case("levit_128s", 224, {"embed_dim": (32, 48, 64), "num_heads": (2, 3, 4), "depth": (1, 1, 1)}),
]
