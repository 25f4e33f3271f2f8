"""Running a model on a batch as it would be used, and leaving its modes as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it every module is in eval mode; afterwards each has its own mode again, whatever happened."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def run(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: of a mapping as keywords, of the first of a tuple or list, or of it as it is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)
