"""What a quantizer may start with."""

from __future__ import annotations

import math

from lfq_lightning.checking import check_number


def check_start(scale: float, zero_point: float, channel_len: int, grad_factor: float | str) -> None:
    """Raise unless a quantizer can be made of these; see `LearnableFakeQuantize`."""
    whole = isinstance(channel_len, int) and not isinstance(channel_len, bool)
    if not whole or not (channel_len == -1 or 1 <= channel_len < 2**31):
        raise ValueError(
            f"`channel_len` must be the number of channels, or -1 for one scale in all. Found {channel_len!r}."
        )
    for name, value in (("scale", scale), ("zero_point", zero_point)):
        check_number(name, value)
    if not isinstance(grad_factor, str):
        check_number("grad_factor", grad_factor)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"`scale` must be positive and finite. Found {scale}.")
    if not math.isfinite(zero_point):
        raise ValueError(f"`zero_point` must be finite. Found {zero_point}.")
    if isinstance(grad_factor, str) and grad_factor != "lsq":
        raise ValueError(f'`grad_factor` must be a number or "lsq". Found {grad_factor!r}.')
