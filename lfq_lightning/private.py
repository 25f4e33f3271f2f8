"""What torch, Lightning, onnxruntime and Python do not promise to keep, and this package needs: all in one place.

Each entry says why no public name will do, and has a test that fails when it moves (tests/test_private.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.weak import TensorWeakRef

if TYPE_CHECKING:
    import lightning as L

__all__ = ["FakeTensor", "FakeTensorMode"]  # what torch.export runs a model by, without values
__all__ += ["tree_leaves", "tree_map", "tree_map_only"]  # nested inputs as torch.export itself takes them apart
__all__ += ["TensorWeakRef"]  # knows when autograd still holds a tensor that Python has let go

# What `torch.nn.functional.grouped_mm` calls, and models call by themselves where torch has no public name yet.
GROUPED_PRODUCT: Callable[..., Tensor] | None = getattr(torch, "_grouped_mm", None)

# ---- torch: tensors and autograd ------------------------------------------------------------------------------------

# Whether vmap, grad and their like are at work, and on which tensors; torch asks itself so. Called for each operation.
transforms_active = torch._C._are_functorch_transforms_active
is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor

# One call for a list of tensors, where a call for each would cost more than what it computes; torch.optim is made of
# these, and offers no other way to them.
copy_each_ = torch._foreach_copy_
add_each_ = torch._foreach_add_
subtract_each_ = torch._foreach_sub_
zero_each_ = torch._foreach_zero_
minimum_each_ = torch._foreach_minimum_
maximum_each_ = torch._foreach_maximum_


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; autograd checks what it has saved by it."""
    return tensor._version


def saved_tensors_are_hooked() -> bool:
    """Whether somebody looks after what autograd saves (activation checkpointing, `save_on_cpu`)."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


# ---- torch: modules -------------------------------------------------------------------------------------------------

BatchNorm = _BatchNorm  # what the public BatchNorms have in common: a subclass of it may be none of these
COMPILED = "_orig_mod"  # where `torch.compile` keeps the module that it was given, and what it so puts into keys


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` has made this module."""
    return COMPILED in module._modules


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given, or the module itself."""
    return getattr(module, COMPILED, module)


def plain_name(name: str) -> str:
    """A module's name without what torch.compile puts into it."""
    return name.replace(f"{COMPILED}.", "").removesuffix(f".{COMPILED}")


def converts_when_loading(model: nn.Module) -> bool:
    """Whether a module changes state dicts before they are loaded."""
    return any(module._load_state_dict_pre_hooks for module in model.modules())


# ---- torch: optimizers ----------------------------------------------------------------------------------------------


def takes_step_hooks(optimizer: Any) -> bool:
    """Whether hooks of an optimizer's steps can be registered: wrappers often leave `Optimizer.__init__` out."""
    return hasattr(optimizer, "_optimizer_step_post_hooks")


@contextmanager
def each_optimizer_made(see: Callable[[Optimizer], None]) -> Iterator[None]:
    """Within it, every optimizer is shown when it has been made, before a scheduler can look at it."""
    init = Optimizer.__init__

    def init_and_show(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        see(self)

    Optimizer.__init__ = init_and_show  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.__init__ = init  # type: ignore[method-assign]


# ---- torch: export --------------------------------------------------------------------------------------------------


def quantized_decomposed() -> Any:
    """The operators that PT2E back ends look for; torch registers them only where this is imported."""
    import torch.ao.quantization.fx._decomposed

    return torch.ops.quantized_decomposed


MODULES_OF_NODE = "pkg.torch.onnx.name_scopes"  # the exporter's note on an ONNX node of the modules that it comes from

_PART_OF_LIST = re.compile(r"slice\((\w+), \S+, (\w+)\)\.(\d+)")


def whole_name(scope: str) -> str:
    """The dotted name of a module in a note, which calls what a part of a list has by its place in that part."""

    def place(found: re.Match[str]) -> str:
        start, step = (0 if n == "None" else int(n) for n in found.group(1, 2))
        return str(start + (step or 1) * int(found.group(3)))

    return _PART_OF_LIST.sub(place, scope)


def session_failure() -> type[Exception]:
    """What onnxruntime raises where it cannot make a session of a sound file."""
    import onnxruntime

    return onnxruntime.capi.onnxruntime_pybind11_state.Fail


# ---- Lightning ------------------------------------------------------------------------------------------------------


def trainer_of(module: L.LightningModule) -> L.Trainer | None:
    """The Trainer that a module is attached to; `module.trainer` raises where there is none."""
    return module._trainer


def load_file(path: Any, **options: Any) -> Any:
    """`torch.load` from wherever Lightning loads: paths, URLs, what fsspec knows, open files."""
    from lightning.fabric.utilities.cloud_io import _load

    return _load(path, **options)


def training_loaders(trainer: L.Trainer) -> Any:
    """The CombinedLoader of the training loop; `trainer.train_dataloader` gives what the user gave."""
    return trainer.fit_loop._combined_loader


def on_its_device(trainer: L.Trainer, batch: Any) -> Any:
    """A batch of a training loader as `training_step` gets it: in the run's precision, through all transfer hooks."""
    model: Any = trainer.lightning_module
    batch = model._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))  # also a datamodule's
    return trainer.strategy.batch_to_device(batch)


def training_source(trainer: L.Trainer) -> Any:
    """Where the training loop takes its loaders from: the user's own, or a hook; known before the loop begins."""
    return trainer.fit_loop._data_source


def request_loaders(source: Any) -> Any:
    """The loaders of a source, made as Lightning makes them, so that it can make them anew for several ranks."""
    from lightning.pytorch.trainer.connectors.data_connector import _request_dataloader

    return _request_dataloader(source)


def averaged_model(callback: L.Callback) -> nn.Module | None:
    """The copy that a callback of Lightning's averages weights into."""
    return getattr(callback, "_average_model", None)


def ddp_options(strategy: Any) -> dict[str, Any]:
    """What DDPStrategy hands on to DistributedDataParallel."""
    return strategy._ddp_kwargs


def tensor_parallel_size(strategy: Any) -> int | str:
    """Over how many devices ModelParallelStrategy splits single weights."""
    return strategy._tensor_parallel_size


# ---- Python ---------------------------------------------------------------------------------------------------------

# os.environ looks a missing variable up by raising and catching, which costs more than a kernel on a small tensor; the
# dictionary behind it does not.
ENVIRONMENT: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)


def environment_key(name: str) -> Any:
    """Under which `ENVIRONMENT` knows a variable."""
    return os.environ.encodekey(name) if ENVIRONMENT is not os.environ else name
