"""How a quantizer comes by its qparams before it learns: what it sees, and when that counts."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lfq_lightning.observers import Observer, Statistics
from lfq_lightning.quantizer.saved import Place, Role
from lfq_lightning.spec import QuantSpec

_GROWN = 1.25


class Observing(nn.Module):
    """The part of a fake quantizer that observes and estimates.

    Attributes:
        observer: finds the range.
        gathering: None lets `forward` observe by itself while training. Otherwise statistics are gathered while it is
            True, in any mode, and a caller merges them after the batch: over uses, and over ranks.
        batch_statistics: what was gathered and not merged yet.
        estimated: whether the qparams were ever set from the observer.
        learned: whether the qparams have begun to learn; estimates then leave them alone.
        late: whether there was no range to learn from when the others began: it observes on until there is one.
        keeps_observations: keep all that was observed when learning begins, for whoever estimates again after that.
    """

    scale: Tensor
    zero_point: Tensor
    scale_reference: Tensor
    observer: nn.Module
    spec: QuantSpec | None
    role: Role | None
    site: str | None
    place: Place
    quant_min: int
    quant_max: int
    fake_quant_enabled: bool
    static_enabled: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gathering: bool | None = None
        self.batch_statistics: Statistics | None = None
        self.estimated = self.learned = self.late = False
        self._warned_non_finite = False
        self.keeps_observations = False
        self.register_load_state_dict_post_hook(_settle_loaded)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The observer's scale and zero point; the module's own are unchanged."""
        qparams: tuple[Tensor, Tensor] = self.observer.calculate_qparams()  # type: ignore[operator]
        return qparams

    def saw_data(self) -> bool:
        """Whether the observer knows any range (copies to the host)."""
        return self.observer.saw_data() if isinstance(self.observer, Observer) else True

    def knows_range(self) -> bool:
        """Whether the observer saw anything but zeros, whose range is no place to learn from (copies to the host)."""
        if not isinstance(self.observer, Observer):
            return True
        return bool(((self.observer.maximum > 0) | (self.observer.minimum < 0)).any())

    @property
    def costly(self) -> bool:
        """Whether finding the qparams costs much more than looking at the data once."""
        return isinstance(self.observer, Observer) and self.observer.costly

    @torch.no_grad()
    def estimate(self, sign: bool = True) -> None:
        """Set scale, zero point and, where it is open, the sign of the codes from the observer.

        Args:
            sign: False leaves the sign as it was decided before, and so need not wait for the device.
        """
        observer = self.observer
        spec = None if self.role == "weight" or not sign else self.spec
        if spec is not None and spec.granularity == "per_token":
            spec = None  # what tokens are yet to come may have either sign
        if isinstance(observer, Observer) and spec is not None and spec.symmetric and spec.signed is None:
            self.quant_min, self.quant_max = spec.code_range(signed=bool((observer.minimum < 0).any()))
            observer.quant_min, observer.quant_max = self.quant_min, self.quant_max
        scale, zero_point = self.calculate_qparams()
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.estimated = True

    @property
    def quantizes(self) -> bool:
        """Whether the output is quantized now: not before a first estimate."""
        # What a specification made has no scale of its own; one that a caller gave is used from the start.
        known = self.estimated or self.learned or (self.gathering is None and self.spec is None)
        return bool(self.fake_quant_enabled) and (known or not self.static_enabled)

    @torch.no_grad()
    def estimate_from(self, x: Tensor) -> None:
        """Set the qparams from this tensor alone, as for a weight."""
        observer, blank = self.observer, self.blank
        if isinstance(observer, Observer):
            observer.reset()
            if blank is not None:
                observer.passing["blank"] = blank
        observer(x.detach())
        self.estimate()
        self.mark_blank()

    @property
    def blank(self) -> Tensor | None:
        """Which channels of a weight were all zeros when their scale was set, of shape (channels,); None for none."""
        return self.observer.passing.get("blank") if isinstance(self.observer, Observer) else None

    def mark_blank(self, weight: Tensor | None = None) -> None:
        """Note which channels are all zeros, beside those that were before (copies to the host).

        Args:
            weight: the whole weight; None for what the observer saw of it last.
        """
        observer = self.observer
        if not (self.role == "weight" and isinstance(observer, Observer)) or observer.minimum.is_meta:
            return
        blank = torch.maximum(-observer.minimum, observer.maximum) if weight is None else _size(observer, weight)
        blank = blank == 0 if self.blank is None else (blank == 0) | self.blank
        if bool(blank.any()):
            observer.passing["blank"] = blank

    @torch.no_grad()
    def follow(self, weight: Tensor) -> bool:
        """Estimate anew the scales of channels that were blank and have outgrown what they were estimated from.

        A weight of zeros says nothing of its scale. Steps are relative, and elements beyond the range have no gradient:
        from next to nothing neither gets away. So each such channel is estimated again whenever its largest magnitude
        is a quarter above what it last was estimated from; between two times its scale learns.

        Args:
            weight: the whole weight.

        Returns:
            Whether any scale was set (copies to the host).
        """
        observer, blank = self.observer, self.blank
        if blank is None or not isinstance(observer, Observer):
            return False
        low, high = observer.minimum.clone(), observer.maximum.clone()
        grown = blank & (_size(observer, weight) > _GROWN * torch.maximum(-low, high))
        if not bool(grown.any()):
            return False
        observer.reset()
        observer(weight)
        observer.passing["blank"] = blank
        for own, new in zip((self.scale, self.zero_point), self.calculate_qparams(), strict=True):
            own.copy_(torch.where(grown, new, own))
        for end, before in ((observer.minimum, low), (observer.maximum, high)):
            end.copy_(torch.where(grown, end, before))
        if self.learned:
            self.scale_reference.copy_(torch.where(grown, self.scale, self.scale_reference))
        return True

    def settle(self) -> None:
        """Keep of what was observed the range alone, unless it is to be kept: a histogram is large."""
        if isinstance(self.observer, Observer) and not self.keeps_observations:
            self.observer.settle()

    def forget(self) -> None:
        """Return to the state before any data: nothing observed, nothing learned."""
        self.estimated = self.learned = self.late = False
        self.batch_statistics = None
        if isinstance(self.observer, Observer):
            self.observer.reset()

    def _observe(self, x: Tensor) -> None:
        if x.is_meta:
            return  # a shape, without values to see
        if self.gathering is None:
            if self.training:
                self._observe_alone(x)
        elif self.gathering and self.role != "weight" and isinstance(self.observer, Observer):
            statistics = self.observer.statistics(x)
            if self.batch_statistics is not None:
                statistics = self.observer.merge(self.batch_statistics, statistics)
            self.batch_statistics = statistics
        elif self.gathering and (self.site is None or self.place.call):
            # A weight that is made in forward is the same on every rank; other libraries' observers cannot be merged.
            self._observe_alone(x)

    def _observe_alone(self, x: Tensor) -> None:
        if isinstance(self.observer, Observer):
            if self.role == "weight":
                self.observer.reset()
            at_fault = self.observer.observe(x)
            if not torch.compiler.is_compiling() and bool(at_fault.any()):
                self.warn_non_finite()
        else:
            self.observer(x.detach())
        if self.fake_quant_enabled and not self.learned:
            self.estimate()

    def warn_non_finite(self, name: str = "A quantizer used alone") -> None:
        """Warn once that values were met that are not finite."""
        if not self._warned_non_finite:
            self._warned_non_finite = True
            warnings.warn(
                f"{name} was given NaN or infinite values. They pass through (infinities saturate) and are left out of "
                "its range and gradients: look for a diverging loss or a faulty input.",
                stacklevel=3,
            )


@torch.no_grad()
def _size(observer: Observer, weight: Tensor) -> Tensor:
    """The largest magnitude of each channel of a weight."""
    return observer.statistics(weight.detach()).extremes[:2].amax(0)


def _settle_loaded(quantizer: nn.Module, _: Any) -> None:
    """Let go of a histogram that a file of an earlier version holds of a quantizer which has learned or is frozen."""
    assert isinstance(quantizer, Observing)
    done = quantizer.learned or (quantizer.fake_quant_enabled and not quantizer.static_enabled)
    passing = quantizer.observer.passing if isinstance(quantizer.observer, Observer) else {}
    if done and "histogram" in passing and "batches" not in passing:
        quantizer.settle()
