"""The observers that add up batches, and leave out those that hold outliers."""

from __future__ import annotations

import torch
from torch import Tensor

from lfq_lightning.observers.base import Observer, Statistics
from lfq_lightning.observers.outliers import MAGNITUDES, bin_of_range, none_are_rare, rare_batches


class ByBatchObserver(Observer):
    """Keeps sums over batches apart by the greatest magnitude of each batch, as long as it observes."""

    def _add(self, statistics: Statistics, values: Tensor, before: Tensor, decay: Tensor | None = None) -> Tensor:
        """The sum over the batches that hold no outliers, after adding one.

        Args:
            statistics: the batch's.
            values: what to add, of shape (channels, values).
            before: the sum so far, for an observer that no longer keeps batches apart: these then count as one.
            decay: multiplies what was added before, of shape (channels,); None leaves it.
        """
        known = "by_batch" in self.passing
        width = values.shape[1]
        sums = self._kept("by_batch", width * MAGNITUDES, values.dtype).view(-1, width, MAGNITUDES)
        if not known:
            where = bin_of_range(self.minimum, self.maximum)
            sums.scatter_add_(2, where[:, None].expand(-1, width, -1), before[..., None])
        batches, where = self._count(statistics)
        if decay is not None:
            sums.mul_(decay[:, None, None])
        sums.scatter_add_(2, where[:, None].expand(-1, width, -1), values[..., None])
        if none_are_rare(batches):
            return sums.sum(2)
        return torch.where(rare_batches(batches)[:, None], 0.0, sums).sum(2)
