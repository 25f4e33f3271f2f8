"""Other callbacks and plugins of a Trainer: which cannot share a run with quantizers, and what the others must meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.callbacks import BaseFinetuning, ModelSummary, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, TransformerEnginePrecision
from torch import nn

from lfq_lightning.checking import in_words
from lfq_lightning.phases import model_phase
from lfq_lightning.placement.host import INPUT, WEIGHT, hosts, qparams, quantizers
from lfq_lightning.training.optimizer import hidden_qparams
from lfq_lightning.training.package import change_of_import, check_package
from lfq_lightning.training.sharding import check_strategy
from lfq_lightning.training.wrapping import Wrappers

SomeCallback = TypeVar("SomeCallback", bound=L.Callback)

_AVERAGING = (WeightAveraging, StochasticWeightAveraging)


def check_neighbours(trainer: L.Trainer, own: L.Callback) -> None:
    """Refuse what cannot work.

    Raises:
        TypeError: if the Trainer is that of `pytorch_lightning`.
        ValueError: if a callback that copies the model stands before ours, the precision plugin swaps layers, or the
            strategy takes them apart.
    """
    check_package(trainer, own)
    check_strategy(trainer)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    ours = sum(isinstance(callback, type(own)) for callback in callbacks)
    if ours > 1:
        raise ValueError(
            f"A model is quantized by one {type(own).__name__}. Found {ours} among the Trainer's callbacks: leave one, "
            "and say what differs between layers by its `rules`."
        )
    for callback in callbacks[: callbacks.index(own)]:
        if isinstance(callback, _AVERAGING):
            name = type(callback).__name__
            raise ValueError(
                f"{name} copies the model when a fit begins, and must copy the quantizers too. Found it before "
                f"QuantizationAwareTraining: use the order `callbacks=[QuantizationAwareTraining(...), {name}(...)]`."
            )
    plugin = trainer.precision_plugin
    if isinstance(plugin, (BitsandbytesPrecision, TransformerEnginePrecision)):
        raise ValueError(
            f"{type(plugin).__name__} replaces Linear layers by ones that quantize by themselves. Found it together "
            'with QuantizationAwareTraining: choose one, for instance `precision="bf16-mixed"`.'
        )


def arrange(wrappers: Wrappers, trainer: L.Trainer, model: L.LightningModule) -> None:
    """Keep qparams out of what finetuning callbacks freeze and adopt, and quantizers out of pictures of the model."""

    def unseen(hide: Callable[[nn.Module], Any]) -> Callable[..., Any]:
        def wrapper(original: Any, *args: Any, **kwargs: Any) -> Any:
            with hide(model):
                return original(*args, **kwargs)

        return wrapper

    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, BaseFinetuning):
            wrappers.around(callback, "finetune_function", unseen(hidden_qparams))
        if isinstance(callback, ModelSummary):
            wrappers.around(callback, "on_fit_start", unseen(hidden_quantizers))
    for logger in trainer.loggers:
        wrappers.around(logger, "log_graph", unseen(hidden_quantizers))


@contextmanager
def hidden_quantizers(model: nn.Module) -> Iterator[None]:
    """Within it, the model has no quantizers but those that the user has placed, and computes in float."""
    layers = [(layer, dict(layer._modules)) for layer in hosts(model).values()]
    users = {q: q.switches for q in quantizers(model).values() if q.site is None}
    for layer, _ in layers:
        layer._modules[WEIGHT] = layer._modules[INPUT] = None
    for quantizer in users:
        quantizer.phase = "off"
    try:
        yield
    finally:
        for quantizer, switches in users.items():
            quantizer.fake_quant_enabled, quantizer.static_enabled, quantizer.learning_enabled = switches
        for layer, modules in layers:
            layer._modules.update(modules)


def require_gradients(model: nn.Module) -> None:
    """Undo what froze qparams along with their layer: DDP must know them from the start, and the layer decides."""
    for parameter in qparams(model):
        parameter.requires_grad_(True)


def share_with_averages(trainer: L.Trainer, model: nn.Module) -> None:
    """Give copies that other callbacks average the quantizers' present state: estimates are no weights to average."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None) if isinstance(callback, _AVERAGING) else None
        if average is not None:
            copies = quantizers(getattr(average, "module", average))
            for name, quantizer in quantizers(model).items():
                copies[name].load_state_dict(quantizer.state_dict())


class _OnlyWhileLearning:
    """One hook of a callback, called while the model's quantizers learn or are frozen."""

    def __init__(self, callback: L.Callback, hook: str) -> None:
        self.callback, self.hook = callback, hook

    def __call__(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        if model_phase(pl_module) in ("learn", "freeze"):
            getattr(type(self.callback), self.hook)(self.callback, trainer, pl_module, *args, **kwargs)


def while_learning(callback: SomeCallback) -> SomeCallback:
    """Let a callback see only what comes out of a quantized model that learns, so that "best" is the best of those.

    An epoch in float, before quantization, is often better than all that follow, and of no use.

    Args:
        callback: a ModelCheckpoint or EarlyStopping, for instance.

    Returns:
        The same callback: its hooks at the end of training batches, training epochs and validation wait for phase
        "learn" or "freeze".

    Example:
        >>> import lfq_lightning as lfq
        >>> from lightning.pytorch.callbacks import ModelCheckpoint
        >>> best = lfq.while_learning(ModelCheckpoint(monitor="val_loss"))
    """
    if not isinstance(callback, L.Callback):
        raise TypeError(
            f"`callback` must be a Lightning callback, for instance a ModelCheckpoint. Found {in_words(callback)}: "
            f"{change_of_import(callback) or 'pass what goes into the callbacks of a Trainer'}."
        )
    if any(kind.__module__.startswith("lfq_lightning.") for kind in type(callback).__mro__):
        raise TypeError(
            "`callback` must judge epochs, as a ModelCheckpoint or EarlyStopping does. Found "
            f"{type(callback).__name__}, which goes by the phases itself: pass it to the Trainer as it is."
        )
    for hook in ("on_train_batch_end", "on_train_epoch_end", "on_validation_end"):
        setattr(callback, hook, _OnlyWhileLearning(callback, hook))
    return callback
