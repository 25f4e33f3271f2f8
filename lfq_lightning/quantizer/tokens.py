"""Scales that each token brings itself: the range of its own features, of which nothing is learned."""

from __future__ import annotations

import torch
from torch import Tensor

from lfq_lightning.ops import quantize

_EPS = torch.finfo(torch.float32).eps


@torch.no_grad()
def token_qparams(tokens: Tensor, low: int, high: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The scale and the whole zero point of each token, which cover its values and zero.

    Affine ones are those of `torch.ops.quantized_decomposed.choose_qparams_per_token_asymmetric`, whose codes are -128
    to 127: the zero point is rounded at the end of the range where less is lost.

    Args:
        tokens: shape (tokens, features), in any floating dtype.
        low: the smallest integer code, below 0 where they are symmetric.
        high: the largest, above 0.
        symmetric: whether the zero point is 0.

    Returns:
        float32, each of shape (tokens,). A token that is not finite has a scale of 1.
    """
    least, most = tokens.float().aminmax(dim=1)
    least, most = least.clamp(max=0.0), most.clamp(min=0.0)
    if symmetric:
        scale = torch.maximum(most / high, least / low)
        scale = torch.where(scale.isfinite(), scale, 1.0).clamp(min=_EPS)
        return scale, torch.zeros_like(scale)
    scale = (most - least) / float(high - low)
    sound = scale.isfinite()
    scale = torch.where(sound, scale, 1.0).clamp(min=_EPS)
    below, above = (torch.where(sound, end, 0.0) / scale for end in (least, most))
    middle = (low + high + 1) // 2  # the errors are compared as for codes on both sides of zero
    z = torch.where((low - middle + below) + (high - middle + above) > 0, low - middle - below, high - middle - above)
    return scale, z.clamp(low - middle, high - middle).round() + middle


def quantize_tokens(x: Tensor, low: int, high: int, symmetric: bool, saturation: str) -> Tensor:
    """X with each of its tokens, which are its last dimension, on the grid of its own codes; gradients pass to x."""
    tokens = x.reshape(-1, x.shape[-1])
    settings = (low, high, 0, None, 0.0, saturation)
    return quantize(tokens, *token_qparams(tokens, low, high, symmetric), settings).view(x.shape)
