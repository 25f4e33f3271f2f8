"""A table of every quantizer, with how well it represents what it is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.audio import signal_noise_ratio

from lfq_lightning.checking import check_model, check_rows, check_whole
from lfq_lightning.placement.points import Points, points, weights
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.running import in_eval_mode, run_by
from lfq_lightning.tables import Table


@dataclass(frozen=True)
class SummaryRow:
    """One quantizer: saturation is a share from 0 to 1, SQNR is in dB; NaN where nothing was measured."""

    quantizer: str
    bits: int
    kind: str
    scale: float
    zero_point: float
    saturation: float
    sqnr: float


@dataclass(frozen=True, repr=False)
class Summary:
    """Every quantizer of a model, and the bytes of the quantized layers' weights and of all parameters, as a table.

    `weight_bytes` counts packed integer codes with a float32 scale, and a zero point where it is affine;
    `float_weight_bytes` the same weights in float32. `parameter_bytes` and `float_parameter_bytes` count the model's
    other parameters too (biases, norms, layers left in float), in float32; buffers are in neither.
    """

    rows: tuple[SummaryRow, ...]
    weight_bytes: int
    float_weight_bytes: int
    parameter_bytes: int
    float_parameter_bytes: int

    def __post_init__(self) -> None:
        check_rows("rows", self.rows, SummaryRow)
        for name in ("weight_bytes", "float_weight_bytes", "parameter_bytes", "float_parameter_bytes"):
            check_whole(name, getattr(self, name), most=2**63)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries."""
        return [asdict(row) for row in self.rows]

    def table(self) -> Table:
        """What is printed."""
        cells: list[tuple[str, ...]] = []
        for r in self.rows:
            share = "" if math.isnan(r.saturation) else f"{r.saturation:.2%}"
            sqnr = "" if math.isnan(r.sqnr) else f"{r.sqnr:.1f}"
            cells.append((r.quantizer, str(r.bits), r.kind, f"{r.scale:.4g}", f"{r.zero_point:.1f}", share, sqnr))
        return Table(_COLUMNS, cells, [self._size])

    @property
    def _size(self) -> str:
        weights = f"weights of quantized layers: {self.float_weight_bytes:,} -> {self.weight_bytes:,} bytes"
        return f"{weights}; all parameters: {self.float_parameter_bytes:,} -> {self.parameter_bytes:,} bytes"

    def __str__(self) -> str:
        return str(self.table())

    def __repr__(self) -> str:  # a notebook shows what a call returns, and the table stands above it already
        return f"<Summary of {len(self.rows)} quantizers, {self._size}>"

    def show(self) -> None:
        """Print the table, in colour where rich is installed and the output is a terminal."""
        self.table().show()


_COLUMNS = {"quantizer": "<", "bits": ">", "kind": "<"}
_COLUMNS |= dict.fromkeys(("scale", "zero point", "saturation", "SQNR dB"), ">")


def packed_bytes(weight: Tensor, quantizer: LearnableFakeQuantize) -> int:
    """Bytes of a weight's packed integer codes with a float32 scale, and one byte of zero point where it is affine."""
    qparams = quantizer.scale.numel() * (4 if quantizer.symmetric else 5)
    return math.ceil(weight.numel() * quantizer.bitwidth / 8) + qparams


class _Capture:
    """A hook that compares a quantizer's input with its quantized self."""

    def __init__(self) -> None:
        self.saturation = self.sqnr = math.nan

    def __call__(self, quantizer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(quantizer, LearnableFakeQuantize)
        self.measure(quantizer, args[0])

    @torch.no_grad()
    def measure(self, quantizer: LearnableFakeQuantize, x: Tensor) -> None:
        """Saturation and signal-to-quantization-noise ratio, whatever the phase."""
        self.saturation = float(quantizer.saturation(x)[0])
        self.sqnr = float(signal_noise_ratio(quantizer.quantized(x).float().flatten(), x.float().flatten()))


def summarize(model: nn.Module, batch: Any = None) -> Summary:
    """Print a table of every quantizer of a model, and return what it says.

    Args:
        model: a model that `attach` was called on; it is run in eval mode on `batch`, and its modes are restored.
        batch: one input for the model, or a batch as a DataLoader gives it: a mapping is passed as keywords, of a tuple
            or list as many entries as `forward` must be given. Without one, nothing is measured about the layers'
            inputs.

    Returns:
        The rows as plain values; `to_dicts()` gives dictionaries.

    Raises:
        ValueError: if the model has no quantizers.

    Example:
        >>> import torch, lfq_lightning as lfq
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> _ = lfq.attach(model)
        >>> lfq.calibrate(model, [torch.linspace(0, 1, 8).view(2, 4)])
        >>> summary = lfq.summarize(model)  # doctest: +SKIP
        quantizer           bits  kind                      scale  zero point  saturation  SQNR dB
        ------------------------------------------------------------------------------------------
        0.weight_quantizer     8  symmetric per_channel(0)  0.004         0.0       0.00%     50.0
        0.input_quantizer      8  affine per_tensor         0.004         0.0
        weights of quantized layers: 32 -> 16 bytes; all parameters: 40 -> 24 bytes
    """
    check_model(model)
    summary = describe(model, batch)
    summary.show()
    return summary


def describe(model: nn.Module, batch: Any = None, forward: Callable[[nn.Module, Any], Any] | None = None) -> Summary:
    """What `summarize` prints; `forward` runs the model on the batch where that is not obvious."""
    found = points(model)
    if not found:
        raise ValueError(
            f"The model has no quantizers to describe. Found {type(model).__name__} in float: call "
            "`lfq_lightning.attach` first."
        )
    captures = {name: _Capture() for name in found}
    if batch is not None:
        _run(model, batch, forward, {found[name].quantizer: capture for name, capture in captures.items()})
    packed = full = 0
    for name, point in found.items():
        weight = point.parameter
        if weight is not None:
            captures[name].measure(point.quantizer, weight)
            packed += packed_bytes(weight, point.quantizer)
            full += weight.numel() * 4
    rows = tuple(
        SummaryRow(
            name,
            q.bitwidth,
            q.kind,
            float(q.used_scale.detach().mean()),
            float(q.zero_point.detach().mean()),
            captures[name].saturation,
            captures[name].sqnr,
        )
        for name, q in ((name, point.quantizer) for name, point in found.items())
    )
    others = _other_parameters(model, found)
    return Summary(rows, packed, full, packed + others, full + others)


def _other_parameters(model: nn.Module, found: Points) -> int:
    """Bytes in float32 of every parameter that is neither a quantized weight nor a quantizer's."""
    quantized = {id(point.parameter) for point in weights(found)}
    quantized |= {id(p) for point in found.values() for p in point.quantizer.parameters()}
    return sum(4 * p.numel() for p in model.parameters() if id(p) not in quantized)


def _run(model: nn.Module, batch: Any, forward: Any, captures: dict[LearnableFakeQuantize, _Capture]) -> None:
    handles = [quantizer.register_forward_hook(capture) for quantizer, capture in captures.items()]
    try:
        with in_eval_mode(model), torch.no_grad():
            run_by(forward, model, batch)
    finally:
        for handle in handles:
            handle.remove()
