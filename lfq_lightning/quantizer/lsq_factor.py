"""LSQ's gradient factor, which makes a scale's steps as large, for its size, as a weight's."""

from __future__ import annotations

import math

from torch import Tensor


def lsq_factor(x: Tensor, dims: int | None, scales: int, quant_min: int, quant_max: int) -> float:
    """1 / sqrt(N * Q), Esser et al. 2020 (LSQ, arXiv 1902.08153), section 2.2.

    N is the number of weights or of a layer's features that share one scale; whatever else x holds (samples, the
    tokens that a Linear takes one by one) adds terms to the gradient as a larger batch does. Q is
    max(|quant_min|, |quant_max|): the paper's Q_P where codes are unsigned, and defined where a range ends at 0.

    Args:
        x: what is quantized.
        dims: how many of its last dimensions are weights or features.
        scales: how many scales share the features out.
        quant_min: smallest integer code.
        quant_max: largest integer code.
    """
    elements = x.numel() if dims is None or dims >= x.ndim else x.shape[-dims:].numel()
    return 1.0 / math.sqrt(max(elements // scales, 1) * max(abs(quant_min), abs(quant_max)))
