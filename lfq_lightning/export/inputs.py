"""The inputs that a model is traced with, and what to do where it cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lfq_lightning.checking import in_words
from lfq_lightning.private import tree_leaves, tree_map, tree_map_only
from lfq_lightning.running import example_of


def arguments(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs from an example or a batch, of which `torch.export` can make an input each."""
    args, kwargs = _told_apart(example_of(model, example_inputs))
    return args, kwargs


def _told_apart(inputs: Any) -> Any:
    """A tensor that is given twice as two: `torch.export` would make one input of them."""
    seen: set[int] = set()

    def own(x: Tensor) -> Tensor:
        known = id(x) in seen
        seen.add(id(x))
        return x.clone() if known else x

    return tree_map_only(Tensor, own, inputs)


def on_cpu(inputs: Any) -> Any:
    """The same inputs where ONNX Runtime computes, whichever device the model is on."""
    return tree_map_only(Tensor, lambda x: x.detach().cpu(), inputs)


def check_dynamic_axes(axes: object) -> None:
    """Raise TypeError unless it says whether dimensions may vary, or names those that may."""
    names = axes.items() if isinstance(axes, Mapping) else ()
    sound = all(
        isinstance(name, str)
        and isinstance(dimensions, Mapping)
        and all(isinstance(index, int) and isinstance(word, str) for index, word in dimensions.items())
        for name, dimensions in names
    )
    if not isinstance(axes, (bool, Mapping)) or not sound:
        raise TypeError(
            "`dynamic_axes` must be True, False, or names of dimensions by number, by argument. Found "
            f'{in_words(axes)}: {{"x": {{0: "batch"}}}} is an example.'
        )


def traced(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_axes: Mapping[str, Mapping[int, str]] | bool = True,
) -> ExportedProgram:
    """What `torch.export` makes of a model.

    Raises:
        ValueError: if it cannot trace the model, with the reason and what can be done.
    """
    dynamic: Any = None
    if dynamic_axes is True:
        args, kwargs = _at_least_two((args, kwargs))
        dynamic = _batch_shapes(args, kwargs)
    elif dynamic_axes:
        dynamic = {
            name: {index: torch.export.Dim(dimension) for index, dimension in axes.items()}
            for name, axes in dynamic_axes.items()
        }
    with torch.no_grad():
        return program_of(model, args, kwargs, dynamic)


def program_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    """`torch.export.export`, whose errors say what can be done.

    Raises:
        ValueError: if it cannot trace the model.
    """
    try:
        with warnings.catch_warnings():
            # What a hook or a recurrent layer puts together anew in every forward, as it does in float.
            warnings.filterwarnings("ignore", "The tensor attribute")
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    except Exception as error:  # of torch's, of many types; and the model's own
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ValueError(
            "A model is exported by `torch.export`, which traces `forward` with the example inputs. Found that "
            f"{type(model).__name__} cannot be traced: {type(error).__name__}: {reason[:300]} Let no value of a tensor "
            "decide what is computed, and give inputs as `forward` takes them; where the size of a batch decides, "
            "`dynamic_axes=False` fixes it."
        ) from error


def _at_least_two(inputs: Any) -> Any:
    """Twice a batch of one: torch takes a dimension of one for constant."""
    if _length(inputs) != 1:
        return inputs
    return tree_map(lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim and len(x) == 1 else x, inputs)


def _batch_shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first dimension may vary in every tensor in which it is as long as in the first."""
    length = _length((args, kwargs))
    batch = torch.export.Dim("batch")
    return tree_map(
        lambda x: {0: batch} if isinstance(x, Tensor) and x.ndim and len(x) == length else None, kwargs or args
    )


def _length(inputs: Any) -> int:
    return next((len(x) for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.ndim), 0)
