"""A launch of a Triton kernel of which all but the tensors and a few numbers is settled."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from lfq_lightning.private_triton import ALIGNED, compiled_launch, current_device, launches_are_hooked


class Launch:
    """One kernel for tensors of the same dtypes on one device, launched on that device's current stream.

    What Triton compiles into a kernel is thereby the same in each call but for one thing: whether every tensor is
    aligned. The kernel that the first call with aligned tensors was given is that of every other one.

    Args:
        kernel: takes tensors, then floating numbers, then `integers`, then what is constant to it.
        programs: how many of them run.
        integers: the values of these arguments.
        options: the constants by name, and what else Triton is told.
        device: where the tensors are; -1 for none, as they are in an interpreter.
    """

    def __init__(
        self, kernel: Any, programs: int, integers: tuple[int, ...], options: dict[str, Any], device: int
    ) -> None:
        self.kernel, self.programs, self.device = kernel, programs, device
        self._one_of_several = device >= 0 and torch.cuda.device_count() > 1
        self._integers, self._options = integers, {**options, "enable_fp_fusion": False}
        self._settled = (*integers, *(options[name] for name in kernel.arg_names if name in options))
        self._launch: Callable[..., None] | None = None

    def __call__(self, tensors: tuple[Tensor, ...], *numbers: float) -> None:
        if self._one_of_several and self.device != current_device():
            with torch.cuda.device(self.device):
                return self(tensors, *numbers)
        addresses = [tensor.data_ptr() for tensor in tensors]
        aligned = reduce(or_, addresses) % ALIGNED == 0
        if self._launch is not None and aligned and not launches_are_hooked():
            return self._launch(*addresses, *numbers, *self._settled)
        compiled = self.kernel[(self.programs,)](*tensors, *numbers, *self._integers, **self._options)
        if self.device >= 0 and aligned:
            self._launch = compiled_launch(compiled, self.programs, self.device)
        return None
