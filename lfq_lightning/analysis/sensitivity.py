"""How much a metric loses when one layer or operation alone is quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from torch import nn

from lfq_lightning.analysis.evaluating import Forward, MetricLike, device_of, evaluation, is_higher_better
from lfq_lightning.analysis.units import Unit, seeing_weights, units
from lfq_lightning.checking import check_flags, check_model, check_number, check_rows, in_words
from lfq_lightning.flow.tracing import states_kept
from lfq_lightning.placement import attach, detach
from lfq_lightning.placement.quantized_layer import quantizers
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.spec import QuantSpec
from lfq_lightning.tables import Table


@dataclass(frozen=True)
class SensitivityRow:
    """One layer, several that share a weight, or one call in a module's code, quantized alone.

    Args:
        layers: dotted names, as rules match them; a call's is that of its module and the operation ("layer1.0/add").
        bits: of the weight; None where only inputs are quantized.
        weight_bytes: of the weight, packed, with its scales; 0 where there is none.
        metric: of the model with this layer quantized and all else in float.
        drop: what the metric lost against float, whichever direction is better; negative if it gained.
        spec: of the weight, as plain values.
    """

    layers: tuple[str, ...]
    bits: int | None
    weight_bytes: int
    metric: float
    drop: float
    spec: dict[str, Any] | None


@dataclass(frozen=True)
class Sensitivity:
    """Every layer's drop, and the metric with all of them in float; prints as a table."""

    float_metric: float
    higher_is_better: bool
    rows: tuple[SensitivityRow, ...]

    def __post_init__(self) -> None:
        check_number("float_metric", self.float_metric)
        check_flags(higher_is_better=self.higher_is_better)
        check_rows("rows", self.rows, SensitivityRow)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries."""
        return [asdict(row) for row in self.rows]

    def __str__(self) -> str:
        cells = [
            (", ".join(r.layers), str(r.bits or ""), f"{r.weight_bytes:,}", f"{r.metric:.6g}", f"{r.drop:.3g}")
            for r in self.rows
        ]
        notes = [f"in float: {self.float_metric:.6g}"]
        return str(Table({"layer": "<", "bits": ">", "bytes": ">", "metric": ">", "drop": ">"}, cells, notes))


def sensitivity(
    model: nn.Module,
    dataloader: Iterable[Any],
    metric: MetricLike,
    bits: Sequence[int] | None = None,
    *,
    higher_is_better: bool | None = None,
    forward: Forward | None = None,
) -> Sensitivity:
    """Measure what each layer and operation loses alone: that one quantized, every other in float.

    The model is run over all batches once in float and once for each layer (and width), in eval mode and with the same
    random numbers each time. Afterwards it is as it was, also if an error ends the measurement.

    Args:
        model: without `bits`, a model whose quantizers know their ranges (calibrated, trained or loaded): each layer's
            weight and inputs are quantized as they are. With `bits`, any model, quantized or not.
        dataloader: held-out batches, read once for each measurement: a DataLoader or a list of batches.
        metric: a torchmetrics.Metric; a function of outputs and targets, averaged over samples; or the name of what a
            LightningModule logs in `validation_step`. A loss tells more than an accuracy, which moves in steps.
        bits: widths to try for each layer's weight, for `propose_bits`; ranges are estimated from the weight, and
            inputs stay in float.
        higher_is_better: where the metric does not say it itself.
        forward: from model and batch to outputs and targets; by default a batch is a pair of inputs and targets.

    Returns:
        A row for each layer, and for each width where `bits` are given.

    Raises:
        TypeError, ValueError: if an argument is wrong, nothing can be quantized, or a range is not known.

    Example:
        >>> import torch, lfq_lightning as lfq
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> batches = [(torch.randn(8, 4), torch.randn(8, 2))]
        >>> loss = torch.nn.functional.mse_loss
        >>> found = lfq.sensitivity(model, batches, loss, bits=(2, 8), higher_is_better=False)
        >>> [(row.layers, row.bits) for row in found.rows]
        [(('0',), 8), (('0',), 2), (('2',), 8), (('2',), 2)]
    """
    check_model(model)
    evaluate = evaluation(model, dataloader, metric, forward)
    better = is_higher_better(metric, higher_is_better)
    if bits is not None and not isinstance(bits, Iterable):
        raise TypeError(f"`bits` must be a list of widths. Found {in_words(bits)}: put it in brackets.")
    widths = None if bits is None else sorted({QuantSpec(bits=width).bits for width in bits}, reverse=True)
    if widths == []:
        raise ValueError("`bits` must name at least one width. Found none: use (2, 3, 4, 8), or leave it out.")
    known = forward is None and not isinstance(metric, str)  # by `forward` or a step of their own, nothing is known
    with _attached(model, widths is not None, dataloader if known else ()), _restored(model):
        _check_ranges(model, widths)
        for quantizer in quantizers(model).values():
            quantizer.phase = "off"
        found = units(model)
        with seeing_weights(found):
            in_float = evaluate()
        rows = []
        for unit in found:
            for spec, width in _choices(unit, widths):
                with unit.quantized(spec):
                    value, size = evaluate(), unit.weight_bytes()
                drop = in_float - value if better else value - in_float
                plain = None if spec is None else spec.to_dict()
                rows.append(SensitivityRow(unit.names, width, size, value, drop, plain))
    return Sensitivity(in_float, better, tuple(rows))


def _choices(unit: Unit, widths: Sequence[int] | None) -> list[tuple[QuantSpec | None, int | None]]:
    """The specifications to try for a unit's weight, None for its own."""
    quantizer = unit.weight
    if widths is None:
        return [(None, None if quantizer is None else quantizer.bitwidth)]
    if quantizer is None or unit.parameter is None:
        return []
    return [(_with_bits(unit.names, quantizer, width), width) for width in widths]


def _with_bits(names: tuple[str, ...], quantizer: LearnableFakeQuantize, bits: int) -> QuantSpec:
    spec = quantizer.spec
    assert spec is not None
    if spec.quant_min is None:
        return spec.replace(bits=bits)
    if (spec.quant_min, spec.quant_max) == (1 - 2 ** (spec.bits - 1), 2 ** (spec.bits - 1) - 1):  # the narrow range
        return spec.replace(bits=bits, quant_min=1 - 2 ** (bits - 1), quant_max=2 ** (bits - 1) - 1)
    raise ValueError(
        f"Other bits need a range that follows from them. Found quant_min={spec.quant_min} and quant_max="
        f"{spec.quant_max} for {', '.join(names)}: leave them out of the specification."
    )


@contextmanager
def _attached(model: nn.Module, needed: bool, batches: Iterable[Any]) -> Iterator[None]:
    """Within it a float model has quantizers on its weights, if they are needed."""
    ours = needed and not quantizers(model)
    if ours:
        with states_kept():
            batch = next(iter(batches), None)
        attach(
            model,
            weight=8,
            activation=None,
            example=None if batch is None else move_data_to_device(batch, device_of(model)),
        )
    try:
        yield
    finally:
        if ours:
            detach(model)


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Afterwards every quantizer's switches are as before."""
    before = {quantizer: quantizer.switches for quantizer in quantizers(model).values()}
    try:
        yield
    finally:
        for quantizer, switches in before.items():
            quantizer.fake_quant_enabled, quantizer.static_enabled, quantizer.learning_enabled = switches


def _check_ranges(model: nn.Module, widths: Sequence[int] | None) -> None:
    found = quantizers(model)
    if not found:
        raise ValueError(
            "The model must have quantizers, or layers to try `bits` on. Found none: call `lfq_lightning.attach` first."
        )
    unknown = [n for n, q in found.items() if not (q.estimated or q.learned)]
    if widths is None and unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ValueError(
            f"Quantizers must know their ranges. Found none for {', '.join(unknown[:5])}{more}: train, load a trained "
            "model, or call `lfq_lightning.calibrate`; or give `bits` to try widths on the weights alone."
        )
