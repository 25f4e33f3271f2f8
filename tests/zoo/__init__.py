"""Networks that others wrote, from configurations, with random weights: whether all of this works on each."""

from importlib.util import find_spec

import torch

if find_spec("torchvision"):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        # timm imports it, but no network here needs its extension, which fits another build of torch than the CPU's.
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor x) -> Tensor")
