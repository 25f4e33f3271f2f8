"""Quantized models as `.pt2` programs with the quantize and dequantize operators that PyTorch's back ends lower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lfq_lightning.checking import check_flags, check_model, check_path
from lfq_lightning.export.fold import fold_batch_norm
from lfq_lightning.export.inputs import arguments, program_of
from lfq_lightning.export.integers import integer_copy


def export_pt2(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    path: str | Path | None = None,
    dynamic_shapes: Any = None,
    fold: bool = False,
    signed: bool = False,
) -> ExportedProgram:
    """A quantized model as a program of `torch.ops.quantized_decomposed` and float operations.

    These are the operators that PT2E back ends and ExecuTorch look for. Weights are int8 or uint8 constants; to load
    a program, import `torch.ao.quantization.fx._decomposed`, which registers the operators.

    Args:
        model: a model with quantizers whose qparams are set; it is not changed.
        example_inputs: one input, a tuple of positional inputs, a mapping of keyword inputs, or a batch of inputs and
            targets as a DataLoader gives it, of which as many entries are taken as `forward` must be given.
        path: where to save the program, by convention `.pt2`; None saves nothing.
        dynamic_shapes: as `torch.export.export` takes them.
        fold: fold BatchNorms into weights; exact in the integers, but no longer equal to eager in the last float bits.
        signed: store the codes of affine inputs 128 lower, as int8, which stand for the same values: XNNPACK takes no
            others; torchao's lowering for x86 takes uint8.

    Returns:
        The program.

    Raises:
        ValueError: if the model cannot be exported, by name.

    Example:
        >>> import torch, lfq_lightning as lfq
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> _ = lfq.attach(model)
        >>> lfq.calibrate(model, [torch.randn(8, 4)])
        >>> x = torch.randn(8, 4)
        >>> program = lfq.export_pt2(model, x)
        >>> torch.equal(program.module()(x), model.eval()(x))
        True
    """
    check_model(model)
    check_path("path", path, written=True, needed=False)
    check_flags(fold=fold, signed=signed)
    args, kwargs = arguments(model, example_inputs)
    integers = integer_copy(model, signed)
    if fold:
        fold_batch_norm(integers, args, kwargs)
    program = program_of(integers, args, kwargs, dynamic_shapes)
    if path is not None:
        torch.export.save(program, path)
    return program
