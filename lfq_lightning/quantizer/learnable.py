"""The learnable fake quantizer: qparams, phase and observer around one operation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfq_lightning.checking import check_flags
from lfq_lightning.observers import OBSERVERS, check_observer
from lfq_lightning.ops import check_range, effective, in_graph_of, measure, nearest_power_of_two, quantize
from lfq_lightning.quantizer.description import Described
from lfq_lightning.quantizer.lsq_factor import lsq_factor
from lfq_lightning.quantizer.observing import Observing
from lfq_lightning.quantizer.start import check_start
from lfq_lightning.quantizer.tokens import quantize_tokens, token_qparams
from lfq_lightning.spec import QuantSpec


class LearnableFakeQuantize(Described, Observing):
    """Fake-quantizes its input with a scale and a zero point that backpropagation can learn.

    Learned Step Size Quantization (Esser et al. 2020) and LSQ+ (Bhalgat et al. 2020), with the states of PyTorch's
    `_LearnableFakeQuantize`. Used alone, the module observes its inputs and sets its qparams in `forward` while it is
    in training mode, as a module of your own is when it is made, whatever the mode of the model that it is put into;
    under `QuantizationAwareTraining` it only gathers statistics, which are merged after each batch.

    Args:
        observer: finds ranges; one of `lfq_lightning.observers`, or any module with `calculate_qparams()` such as
            those of `torch.ao.quantization`.
        quant_min: smallest integer code.
        quant_max: largest integer code.
        scale: first value of every scale.
        zero_point: first value of every zero point.
        channel_len: number of channels with a scale each, or -1 for one scale.
        grad_factor: multiplies the gradients of scale and zero point; "lsq" for LSQ's.
        learn_zero_point: False keeps an affine zero point as it was estimated.

    Attributes:
        scale: float32 parameter of shape (channels,), in units of x per integer step.
        zero_point: the same shape, in integer steps; a constant buffer where it does not learn.
        scale_reference: the scale on entering `learn`, in whose units it learns.
        feature_dims: how many of an input's last dimensions are features, of which LSQ's gradient factor counts the
            elements. None: all but the first, which is then the batch; for (time, batch, features) set it to 1.

    Raises:
        ValueError: if the range, `channel_len`, `scale` or `zero_point` is wrong.

    Example:
        >>> import torch
        >>> from lfq_lightning import LearnableFakeQuantize
        >>> from lfq_lightning.observers import MinMaxObserver
        >>> quantizer = LearnableFakeQuantize(MinMaxObserver(0, 15), quant_min=0, quant_max=15)
        >>> y = quantizer(torch.linspace(0, 3, 5))
        >>> quantizer.scale.item()
        0.20000000298023224
    """

    scale_reference: Tensor
    feature_dims: int | None = None

    def __init__(
        self,
        observer: nn.Module,
        quant_min: int = 0,
        quant_max: int = 255,
        scale: float = 1.0,
        zero_point: float = 0.0,
        channel_len: int = -1,
        grad_factor: float | str = 1.0,
        learn_zero_point: bool = True,
    ) -> None:
        super().__init__()
        check_range(quant_min, quant_max)
        check_flags(learn_zero_point=learn_zero_point)
        check_start(scale, zero_point, channel_len, grad_factor)
        check_observer(observer, quant_min, quant_max, channel_len)
        for name, value in (("quant_min", quant_min), ("quant_max", quant_max)):
            if hasattr(observer, name):
                setattr(observer, name, value)
        scheme = str(getattr(observer, "qscheme", ""))
        self.symmetric = bool(getattr(observer, "symmetric", "symmetric" in scheme))
        axis = getattr(observer, "axis", getattr(observer, "ch_axis", None))
        self.axis: int | None = axis if channel_len != -1 else None
        if channel_len != -1 and self.axis is None:
            self.axis = 0
        self.group_size: int | None = getattr(observer, "group_size", None)
        if self.group_size is not None:
            self.axis = None
        self.quant_min, self.quant_max = quant_min, quant_max
        self.grad_factor = grad_factor
        self.saturation_rule: str = "lsq"
        self.scale_domain: str = "linear"
        self.spec: QuantSpec | None = None

        self._start = float(scale), float(zero_point)
        start = torch.ones(max(channel_len, 1), dtype=torch.float32, device=_device_of(observer))
        self.scale = nn.Parameter(start * scale)
        if self.symmetric or not learn_zero_point:
            self.register_buffer("zero_point", start * zero_point)
        else:
            self.zero_point = nn.Parameter(start * zero_point)
        self.register_buffer("scale_reference", start * scale)
        self.observer = observer

    @classmethod
    def from_spec(
        cls,
        spec: QuantSpec,
        channels: int | None = None,
        *,
        weight: bool = False,
        axis: int | None = None,
        feature_dims: int | None = None,
        device: torch.device | str | None = None,
    ) -> LearnableFakeQuantize:
        """The quantizer that a specification describes.

        Args:
            spec: bits, range, granularity, observer and gradient settings.
            channels: number of scales per channel or per group; None for one.
            weight: whether it quantizes a weight, which is signed where the specification leaves it open, and whose
                gradient factor counts every dimension.
            axis: the dimension of the channels, where the specification leaves it open.
            feature_dims: see the attribute.
            device: where the qparams are made.
        """
        if (channels is None) != spec.has_one_scale:
            raise ValueError(
                f"`channels` must be the number of scales for {spec.granularity!r}, and None per tensor or token. "
                f"Found {channels}."
            )
        quant_min, quant_max = spec.code_range(signed=True)
        if spec.granularity == "per_channel":
            axis = spec.axis if spec.axis is not None else axis if axis is not None else int(not weight)
        else:
            axis = None
        ranges = (quant_min, quant_max, spec.symmetric, axis, spec.group_size, channels or 1, device)
        # What tokens bring is not observed, but whether any come is.
        finder = "minmax" if spec.granularity == "per_token" else spec.observer
        observer = OBSERVERS[finder](*ranges, whole=weight, power_of_two=spec.scale_domain == "power_of_two")
        made = cls(
            observer,
            quant_min,
            quant_max,
            channel_len=-1 if channels is None else channels,
            grad_factor=spec.grad_factor,
            learn_zero_point=spec.learn_zero_point,
        )
        made.spec, made.role, made.feature_dims = spec, "weight" if weight else None, feature_dims
        made.saturation_rule, made.scale_domain = str(spec.saturation), spec.scale_domain
        if made.per_token:
            made._hold_qparams()
        return made

    def _hold_qparams(self) -> None:
        """Make constants of scale and zero point."""
        for name in ("scale", "zero_point"):
            value = getattr(self, name).detach()
            delattr(self, name)
            self.register_buffer(name, value)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Return to the qparams that the module was made with and to no data, as after `to_empty` on a new device."""
        scale, zero_point = self._start
        self.scale.fill_(scale)
        self.scale_reference.fill_(scale)
        self.zero_point.fill_(zero_point)
        self.forget()

    # ---- qparams --------------------------------------------------------------------------------------------------

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest integer code."""
        return self.quant_min, self.quant_max

    def observe_quant_params(self) -> None:
        """Print scale and zero point."""
        print(f"LearnableFakeQuantize scale: {self.scale.detach()}")
        print(f"LearnableFakeQuantize zero_point: {self.zero_point.detach()}")

    @property
    def used_scale(self) -> Tensor:
        """The scale that forward computes with: the learned one, or the power of two nearest to it."""
        return nearest_power_of_two(self.scale) if self.scale_domain == "power_of_two" else self.scale

    @torch.no_grad()
    def used_qparams(self) -> tuple[Tensor, Tensor]:
        """The scale and the integer zero point that forward computes with, each of shape (channels,)."""
        s, z = effective(self.used_scale, self.zero_point, self.quant_min, self.quant_max)
        return s, z

    def begin_learning(self) -> None:
        """Remember the scale in whose units learning goes on; once only, so that a second fit continues."""
        if not self.learned:
            self.scale_reference.copy_(self.scale.detach())
            self.learned = True
            self.settle()
            self.mark_blank()

    @torch.no_grad()
    def project_(self) -> None:
        """Make the qparams legal in place: scales positive and finite, zero points within the range."""
        sound = self.scale.isfinite() & (self.scale > 0)
        self.scale.copy_(torch.where(sound, self.scale, self.scale_reference).clamp(min=torch.finfo(torch.float32).eps))
        self.zero_point.copy_(self.zero_point.nan_to_num(0.0).clamp(self.quant_min, self.quant_max))

    def saturation(self, x: Tensor) -> Tensor:
        """The share of x that is clamped to the range of codes, and 1 if any of it is not finite; shape (2,)."""
        return self.measured(x)[:2]

    @torch.no_grad()
    def measured(self, x: Tensor) -> Tensor:
        """What a record keeps of x: `saturation`, and from the third entry on x / scale of some elements."""
        if self.per_token:
            tokens = x.detach().reshape(-1, x.shape[-1])
            own = token_qparams(tokens, *self.code_range, self.symmetric)
            return measure(tokens, *own, *self.code_range, 0, None)
        return measure(x.detach(), self.used_scale, self.zero_point, *self.code_range, self.axis, self.group_size)

    # ---- forward --------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, learn: bool = True) -> Tensor:
        """Fake-quantize x, or what the phase says.

        Args:
            x: floating tensor of any shape whose dimension `axis` has as many entries as there are scales.
            learn: False keeps the qparams' gradients zero, as for a layer whose weight is frozen.

        Returns:
            A tensor of the shape and dtype of x.
        """
        if (self.static_enabled or self.fake_quant_enabled) and not x.is_floating_point():
            raise TypeError(f"`x` must be a floating tensor. Found {x.dtype}: pass integers around the quantizer.")
        if self.static_enabled:
            self._observe(x)
        if not self.quantizes:
            # In a run, one that the user calls must be in the graph too; a layer sees to its own.
            return x if self.gathering is None or self.site is not None else self.in_graph(x)
        scale = self.scale  # once: nn.Module finds a parameter last of all
        factor = self._gradient_factor(x, scale.numel()) if self.learning_enabled and learn else 0.0
        return self._quantized(x, scale, factor)

    def as_now(self) -> Callable[[Tensor], Tensor]:
        """What quantizes a tensor as the module does now, without gradients, whatever becomes of its qparams."""
        if self.per_token:
            own = (*self.code_range, self.symmetric, self.saturation_rule)
            return lambda x: quantize_tokens(x, *own)
        qparams = self.used_qparams()
        settings = (*self.code_range, self.axis, self.group_size, 0.0, self.saturation_rule)
        return lambda x: quantize(x, *qparams, settings)

    def in_graph(self, x: Tensor) -> Tensor:
        """x, with the qparams in its graph in every phase: DDP wants each parameter used in each backward."""
        if self.quantizes or not torch.is_grad_enabled():
            return x
        return in_graph_of(x, self.scale, self.zero_point)

    def quantized(self, x: Tensor, grad_factor: float = 0.0) -> Tensor:
        """X on the integer grid and back, whatever the phase; with a factor of 0 the qparams get no gradient."""
        return self._quantized(x, self.scale, grad_factor)

    def serves_rows_of(self, table: Tensor) -> bool:
        """Whether each row has a scale of its own, and what is quantized now depends on no other row."""
        by_row = self.axis == 0 and self.group_size is None and self.scale.numel() == len(table)
        return by_row and self.quantizes and not self.static_enabled and not self._forward_hooks

    def rows(self, table: Tensor, index: Tensor, padding_idx: int | None, learn: bool) -> Tensor:
        """The rows of a table that an index chooses, quantized as in the whole table, which is left alone.

        Args:
            table: a weight of shape (rows, width), for which `serves_rows_of` holds.
            index: integers of any shape.
            padding_idx: a row without gradients.
            learn: see `forward`.

        Returns:
            A tensor of the index's shape and one more dimension, the width.
        """
        scale = nearest_power_of_two(self.scale) if self.scale_domain == "power_of_two" else self.scale
        factor = self._gradient_factor(table, len(table)) if self.learning_enabled and learn else 0.0
        chosen = index.reshape(-1)
        own = [F.embedding(chosen, p.unsqueeze(1), padding_idx).squeeze(1) for p in (scale, self.zero_point)]
        settings = (self.quant_min, self.quant_max, 0, None, factor, self.saturation_rule)
        rows = quantize(F.embedding(chosen, table, padding_idx), own[0], own[1], settings)
        return rows.view(*index.shape, table.shape[1])

    def _quantized(self, x: Tensor, scale: Tensor, grad_factor: float) -> Tensor:
        if self.per_token:
            return quantize_tokens(x, *self.code_range, self.symmetric, self.saturation_rule)
        used = nearest_power_of_two(scale) if self.scale_domain == "power_of_two" else scale
        settings = (self.quant_min, self.quant_max, self.axis, self.group_size, grad_factor, self.saturation_rule)
        return quantize(x, used, self.zero_point, settings)

    def _gradient_factor(self, x: Tensor, scales: int) -> float:
        if self.grad_factor != "lsq":
            return float(self.grad_factor)
        whole = self.role == "weight"
        dims = self.feature_dims
        if not whole and dims is None:
            dims = max(x.ndim - 1, 1)
            scales = 1 if self.axis == 0 else scales  # with the batch as the channel axis, a channel is one sample
        return lsq_factor(x, None if whole else dims, scales, self.quant_min, self.quant_max)


def _device_of(module: nn.Module) -> torch.device | None:
    return next((buffer.device for buffer in module.buffers()), None)
