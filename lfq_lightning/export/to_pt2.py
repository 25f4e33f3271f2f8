"""Quantized models as `.pt2` programs with the quantize and dequantize operators that PyTorch's back ends lower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.export import ExportedProgram

from lfq_lightning.checking import check_choice, check_flags, check_model, check_path
from lfq_lightning.export.fold import fold_batch_norm
from lfq_lightning.export.inputs import arguments, program_of
from lfq_lightning.export.integers import integer_copy
from lfq_lightning.export.pt2_passes import FORMS, arrange, drop_unread


def export_pt2(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    path: str | Path | None = None,
    dynamic_shapes: Any = None,
    fold: bool = False,
    signed: bool = False,
    target: Literal["executorch", "x86", "litert"] | None = None,
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
        target: the runtime that is to compute the program in integers, which decides about `fold` and `signed`:
            "executorch" (XNNPACK), "x86" (torchao's lowering for Inductor) or "litert". A tensor is quantized once for
            all its readers, and before what only chooses among values, such as a pooling, as well as behind it. Layers
            whose result is not quantized, of which XNNPACK makes wrong numbers, are written in float for ExecuTorch,
            and a warning names them. Best for a model that was trained with the same `target`.

    Returns:
        The program.

    Raises:
        ValueError: if the model cannot be exported, by name, or `signed` contradicts `target`.

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
    if target is not None:
        check_choice("target", target, tuple(FORMS))
    form = None if target is None else FORMS[target]
    if form is not None and signed and not form.signed:
        raise ValueError(f"`target` {target!r} takes unsigned codes of inputs. Found signed=True: leave it out.")
    args, kwargs = arguments(model, example_inputs)
    integers = integer_copy(model, signed if form is None else form.signed)
    if fold or form is not None:
        fold_batch_norm(integers, args, kwargs, bytes_hold=True, mirrored=False)
    program = program_of(integers, args, kwargs, dynamic_shapes)
    if form is not None:
        module = program.run_decompositions({}).module()  # without changes in place
        in_float = arrange(module, form)
        if in_float:
            more = f" and {len(in_float) - 5} more" if len(in_float) > 5 else ""
            rank_zero_warn(
                f"`target` {target!r} computes a layer in integers where its input and its result are quantized. Found "
                f"{', '.join(in_float[:5])}{more}, which the program holds in float: train with `target={target!r}`, "
                "or quantize what they give, with `Rule(..., output=8)`."
            )
        program = program_of(module, args, kwargs, dynamic_shapes)
    drop_unread(program)
    if path is not None:
        torch.export.save(program, path)
    return program
