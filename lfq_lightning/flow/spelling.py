"""Attention that torch computes in one call, spelled as the operations that it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.functional.multi_head_attention_forward` as projections, products and a softmax.

    What it is given is torch's own: `query` of shape (L, N, E) or (L, E), `key` and `value` of (S, N, E) or (S, E).

    Returns:
        The output, of the shape of `query`, and the attention weights or None.
    """
    batched = query.dim() == 3
    if not batched:
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    target, batch, width = query.shape
    if width != embed_dim_to_check:
        raise ValueError(f"`query` must have {embed_dim_to_check} features, as the layer has. Found {width}.")
    size = width // num_heads
    key_padding_mask = _added(key_padding_mask, query.dtype)
    if is_causal and key_padding_mask is None and not need_weights and bias_k is None and not add_zero_attn:
        attn_mask, causal = None, True  # as torch does: the mask is then the one that it knows
    else:
        attn_mask, causal = _added(attn_mask, query.dtype), False
    q, k, v = _projected(
        (query, key, value),
        in_proj_weight if not use_separate_proj_weight else None,
        (q_proj_weight, k_proj_weight, v_proj_weight),
        in_proj_bias,
    )
    if attn_mask is not None and attn_mask.dim() == 2:
        attn_mask = attn_mask.unsqueeze(0)
    if bias_k is not None and bias_v is not None:
        k, v = torch.cat([k, bias_k.repeat(1, batch, 1)]), torch.cat([v, bias_v.repeat(1, batch, 1)])
        attn_mask, key_padding_mask = _longer(attn_mask), _longer(key_padding_mask)
    q = q.reshape(target, batch * num_heads, size).transpose(0, 1)
    k = static_k if static_k is not None else k.reshape(k.shape[0], batch * num_heads, size).transpose(0, 1)
    v = static_v if static_v is not None else v.reshape(v.shape[0], batch * num_heads, size).transpose(0, 1)
    if add_zero_attn:
        zeros = k.new_zeros(batch * num_heads, 1, size)
        k, v = torch.cat([k, zeros], dim=1), torch.cat([v, zeros], dim=1)
        attn_mask, key_padding_mask = _longer(attn_mask), _longer(key_padding_mask)
    source = k.shape[1]
    if key_padding_mask is not None:
        wide = key_padding_mask.view(batch, 1, 1, source).expand(-1, num_heads, -1, -1)
        wide = wide.reshape(batch * num_heads, 1, source)
        attn_mask = wide if attn_mask is None else attn_mask + wide
    dropout = dropout_p if training else 0.0
    if need_weights:
        scores = torch.bmm(q * math.sqrt(1.0 / size), k.transpose(-2, -1))
        weights = torch.softmax(scores if attn_mask is None else scores + attn_mask, dim=-1)
        attended = torch.bmm(F.dropout(weights, dropout) if dropout > 0.0 else weights, v)
        attended = attended.transpose(0, 1).reshape(target * batch, width)
    else:
        weights = None
        if attn_mask is not None:
            heads = attn_mask.shape[0] == batch * num_heads
            attn_mask = attn_mask.view(batch, num_heads, -1, source) if heads else attn_mask.unsqueeze(0)
        q, k, v = (each.view(batch, num_heads, -1, size) for each in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, causal)
        attended = attended.permute(2, 0, 1, 3).reshape(target * batch, width)
    output = F.linear(attended, out_proj_weight, out_proj_bias).view(target, batch, -1)
    if weights is not None:
        weights = weights.view(batch, num_heads, target, source)
        weights = weights.mean(dim=1) if average_attn_weights else weights
    if not batched:
        return output.squeeze(1), None if weights is None else weights.squeeze(0)
    return output, weights


def _projected(
    inputs: tuple[Tensor, Tensor, Tensor],
    packed: Tensor | None,
    separate: tuple[Tensor | None, Tensor | None, Tensor | None],
    bias: Tensor | None,
) -> list[Tensor]:
    biases = (None, None, None) if bias is None else bias.chunk(3)
    weights = separate if packed is None else packed.chunk(3)
    if packed is not None and inputs[0] is inputs[1] and inputs[1] is inputs[2]:
        return list(F.linear(inputs[0], packed, bias).chunk(3, dim=-1))
    return [F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]  # type: ignore[arg-type]


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask that is added to scores."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _longer(mask: Tensor | None) -> Tensor | None:
    """With one more place that everybody sees."""
    return None if mask is None else F.pad(mask, (0, 1))


SPELLED: dict[Any, Callable[..., Any]] = {F.multi_head_attention_forward: multi_head_attention}
