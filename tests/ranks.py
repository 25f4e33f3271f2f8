"""What two processes do together; started by `start_two`, each scenario ends with equal qparams on both."""

from __future__ import annotations

import inspect
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import lfq_lightning as lfq
from lfq_lightning.placement.quantized_layer import FrozenLayers, qparams
from lfq_lightning.training.batch_norm import reestimate_batch_norm
from tests.processes import Program
from tests.runs import Net, fit, images, qat, trainer

SCHEDULE = lfq.PhaseSchedule(observe=0, estimate=1, learn=2)
TWO_BITS = [lfq.Rule("second", weight=2)]  # a weight whose steps are lengthened on every rank
STILL = partial(torch.optim.SGD, lr=0.0)


class NormFree(L.LightningModule):
    """A network whose whole-batch gradient is the mean of its ranks' gradients, in float64.

    In float32 the last digit of a sum, which depends on how a batch is split, can carry a value over a rounding
    boundary, and from there a network that rounds goes another way. In float64 that digit is lost in the quantizers'
    float32, and what is left is what ranks do with statistics and gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, stride=2)
        self.head = nn.Linear(36, 10)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x.double())))).flatten(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class WithAdam(NormFree):
    """Steps with momentum, which moves a parameter whose gradient is zero."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class ByHand(NormFree):
    """Accumulates two batches by hand, without synchronising the first."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        if batch_idx % 2 == 0:
            with getattr(self.trainer.model, "no_sync", nullcontext)():
                self.manual_backward(super().training_step(batch, batch_idx))
        else:
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            optimizer.zero_grad()


class FrozenBody(NormFree):
    """Trains its head alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)
        self.second.requires_grad_(False)


class FromZero(WithAdam):
    """One channel of a weight begins at zero, and its scale has to follow as it grows, a little each step."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.second.weight[1].detach())
        nn.init.constant_(self.second.bias, 0.1)  # its ReLU lets something through


class Sharded(NormFree):
    """Each layer a unit of FSDP2."""

    def configure_model(self) -> None:
        for layer in (self.first, self.second, self.head, self):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])


class ShardedFromZero(FromZero, Sharded):
    """The same, with each layer a unit of FSDP2."""


class Operations(NormFree):
    """Attention, a recurrent layer, a weight that is read with a transpose, a parameter of its own, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        del self.first, self.second, self.head
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.GRU(8, 6, batch_first=True)
        self.own = nn.Parameter(torch.randn(6, 8) / 3)
        self.tied = nn.Linear(8, 10)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.double().squeeze(1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.recurrent(x)[0].mean(1) @ self.own
        return self.tied(x + nn.functional.linear(self.tied(x), self.tied.weight.t()))


class ShardedOperations(Operations):
    """The same under FSDP2, where one unit holds what its own code reads."""

    def configure_model(self) -> None:
        for layer in (self.attention, self.recurrent, self):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Branches(NormFree):
    """Has a layer that the second rank's batches alone reach, one from the third epoch on, and one that is both."""

    def __init__(self) -> None:
        super().__init__()
        self.lone, self.later, self.lone_later = (nn.Conv2d(1, 1, 1).double() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.double()
        lone, later = self.global_rank == 1, self.current_epoch >= 2
        for layer, reached in ((self.lone, lone), (self.later, later), (self.lone_later, lone and later)):
            if reached:
                x = x + layer(x)
        return super().forward(x)


class Collapses(L.Callback):
    """Spoils one scale on both ranks while learning."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 18:
            pl_module.second.input_quantizer.scale.data.div_(1e4)


class Equal(L.Callback):
    """Compares scales and zero points of all ranks after every batch."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert_ranks_agree(pl_module)


def assert_ranks_agree(model: L.LightningModule) -> None:
    mine = torch.cat([p.detach().flatten() for p in qparams(model)])
    every = model.all_gather(mine).view(-1, len(mine))
    assert (every == every[0]).all(), "ranks differ"


class Wanders(L.Callback):
    """Changes one scale on one rank while learning."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 20:
            pl_module.second.input_quantizer.scale.data.mul_(1.5)


def apart(directory: Path) -> None:
    """Freeze qparams that are not equal: both ranks must end."""
    schedule = lfq.PhaseSchedule(observe=0, estimate=1, learn=2, freeze=3)
    try:
        run(directory, callback=qat(schedule=schedule), callbacks=[Wanders()], max_epochs=4)
    except RuntimeError as error:
        (directory / f"rank{os.environ['RANK']}.txt").write_text(str(error))


class LoudOnOne(NormFree):
    """From a step on, clamps nearly all of its first input on rank zero alone."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loud = self.global_rank == 0 and self.global_step >= 18
        return super().training_step([1e4 * batch[0] if loud else batch[0], batch[1]], batch_idx)


def raised(directory: Path) -> None:
    """End a run because of what one rank sees: both must."""
    callback = qat(schedule=SCHEDULE, record_every_n_steps=1, on_collapse="raise", optimizer=STILL)
    try:
        run(directory, LoudOnOne, callback=callback)
    except RuntimeError as error:
        (directory / f"rank{os.environ['RANK']}.txt").write_text(str(error))


def data(ranks: int, uneven: bool = False, batches: int = 8) -> DataLoader[Any]:
    """Batches of eight in all, dealt out to the ranks; uneven: six to the first."""
    first = 8 if ranks == 1 else 6 if uneven else 4
    own = range(first, 8) if ranks == 2 and os.environ["RANK"] == "1" else range(first)
    return DataLoader(images(8 * batches), batch_sampler=[[8 * batch + i for i in own] for batch in range(batches)])


def run(directory: Path, model: type[L.LightningModule] = NormFree, ranks: int = 2, **options: Any) -> Any:
    callback = options.pop("callback", None) or qat(schedule=SCHEDULE, record_every_n_steps=1, rules=TWO_BITS)
    options = {
        "devices": ranks,
        "strategy": "ddp" if ranks > 1 else "auto",
        "data": data(ranks),
        **options,
        "use_distributed_sampler": False,
    }
    L.seed_everything(3, verbose=False)
    fitted, made, _ = fit(directory, model(), callback=callback, **options)
    assert_ranks_agree(fitted)
    if made.is_global_zero:
        torch.save(quantizer_state(fitted), directory / "quantizers.pt")
    return made


def fifty(directory: Path, ranks: int, **options: Any) -> Any:
    """Fifty steps, through observing and estimating to learning."""
    schedule = lfq.PhaseSchedule(observe=0, estimate=10, learn=20, unit="step")
    options = {"data": data(ranks, batches=50), "callbacks": [Equal()], **options}
    return run(directory, ranks=ranks, callback=qat(schedule=schedule, rules=TWO_BITS), max_epochs=1, **options)


def alone(directory: Path, ranks: int, model: type[L.LightningModule] = Net, **options: Any) -> Any:
    """Scales and zero points learn alone, and BatchNorm, which ranks would each count for themselves, keeps still."""
    callback = qat(schedule=SCHEDULE, record_every_n_steps=1, rules=TWO_BITS, learn="scales")
    return run(directory, model, ranks, callback=callback, limit_val_batches=0, **options)


def from_zero(directory: Path, ranks: int) -> Any:
    """Learn from the second step on, when the weight is still next to nothing."""
    callback = qat(schedule=lfq.PhaseSchedule(observe=0, estimate=0, learn=1, unit="step"))
    return run(directory, FromZero, ranks, callback=callback, callbacks=[Equal()])


def quantizer_state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if "quantizer" in k and not k.endswith("_extra_state")}


def kept(directory: Path) -> list[L.Callback]:
    return [ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1)]


def unused(directory: Path) -> None:
    """Observe one huge value on the second rank alone, by minimum and maximum, and keep what each rank says."""
    x, labels = (tensor.clone() for tensor in images().tensors)
    x[12, 0, 0, 0] = 1000.0
    own = range(4) if os.environ["RANK"] == "0" else range(4, 8)
    batches = DataLoader(TensorDataset(x, labels), batch_sampler=[[8 * batch + i for i in own] for batch in range(8)])
    inputs = lfq.QuantSpec(bits=8, symmetric=False, observer="minmax")
    callback = qat(activation=inputs, schedule=SCHEDULE, record_every_n_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(directory, data=batches, callback=callback, callbacks=[Equal()])
    said = [str(warning.message) for warning in caught if "unused" in str(warning.message)]
    (directory / f"rank{os.environ['RANK']}.txt").write_text("\n".join(said))


def frozen_body(directory: Path, choice: FrozenLayers) -> None:
    callback = qat(schedule=SCHEDULE, record_every_n_steps=1, frozen_layers=choice)
    run(directory, FrozenBody, callback=callback, callbacks=[Equal()])


def operations(directory: Path, ranks: int, model: type[L.LightningModule] = Operations, **options: Any) -> Any:
    """Weights of 4 bits wherever they are read, and the operands of sums and of attention's products in 8."""
    rules = [lfq.Rule("/add*", activation=8), lfq.Rule("attention/scaled*", activation=8)]
    callback = qat(schedule=SCHEDULE, record_every_n_steps=1, activation=8, rules=rules)
    return run(directory, model, ranks, callback=callback, callbacks=[Equal()], **options)


DDP: dict[str, Callable[[Path], Any]] = {
    "plain": lambda d: run(d),
    "alone": lambda d: alone(d, 2),
    "fifty": lambda d: fifty(d, 2),
    "fifty accumulated": lambda d: fifty(d, 2, accumulate_grad_batches=2),
    "saved": lambda d: run(d, callbacks=kept(d), max_epochs=4),
    "resumed": lambda d: run(d, callbacks=kept(d), max_epochs=4, ckpt_path=d.parent / "one/epoch=2.ckpt"),
    "static graph false": lambda d: run(d, strategy=DDPStrategy(static_graph=False, gradient_as_bucket_view=True)),
    "uneven": lambda d: run(d, data=data(2, uneven=True)),
    "no sync": lambda d: run(d, ByHand),
    "accumulated": lambda d: run(d, accumulate_grad_batches=2),
    "user": lambda d: run(d, WithAdam, callback=qat(schedule=SCHEDULE, optimizer="user")),
    "user frozen": lambda d: run(
        d, WithAdam, callback=qat(schedule=lfq.PhaseSchedule(0, 1, 2, 3), optimizer="user"), max_epochs=4
    ),
    "frozen body": lambda d: frozen_body(d, "keep"),
    "frozen body learns": lambda d: frozen_body(d, "learn"),
    "branches": lambda d: run(
        d,
        Branches,
        strategy=DDPStrategy(find_unused_parameters=True),
        callbacks=[Equal()],
        callback=qat(rules=[lfq.Rule("lone*"), lfq.Rule("later")]),  # no batch before the run need reach them
    ),
    "from zero": lambda d: from_zero(d, 2),
    "operations": lambda d: operations(d, 2),
    "unused": unused,
    "averaged": lambda d: run(d, callbacks=[EMAWeightAveraging(decay=0.5)]),
    "reinit": lambda d: run(
        d,
        callbacks=[Collapses()],
        callback=qat(schedule=SCHEDULE, on_collapse="reinit", record_every_n_steps=1),
    ),
    "batch norm": lambda d: run(d, Net, limit_val_batches=1),
}
ENDED = {"apart": apart, "raised": raised}


class Dies(L.Callback):
    """Kills one rank in the middle of a run."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


# Each in processes of its own, which it ends.
DYING = {f"rank {rank} dies": partial(run, callbacks=[Dies(rank)]) for rank in (0, 1)}


def parallel(**options: Any) -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, **options)


def sharded(directory: Path, ckpt_path: str | None = None, distributed: bool = True, **options: Any) -> Any:
    """Four epochs, each with its checkpoint; two observe."""
    path = None if ckpt_path is None else directory.parent / ckpt_path
    strategy = parallel(save_distributed_checkpoint=distributed)
    options |= {"strategy": strategy, "callbacks": kept(directory), "max_epochs": 4, "ckpt_path": path}
    return run(directory, ShardedFromZero, **options)


def in_users_optimizer() -> lfq.QuantizationAwareTraining:
    return qat(schedule=SCHEDULE, record_every_n_steps=1, optimizer="user")


def predicted(directory: Path) -> None:
    """Predict from the last checkpoint of either kind, in a fit's place."""
    for kind in ("saved", "whole"):
        made = trainer(directory, [qat()], devices=2, strategy=parallel(), use_distributed_sampler=False)
        path = directory.parent / kind / "epoch=3.ckpt"
        found = made.predict(ShardedFromZero(), DataLoader(images(8)), ckpt_path=path, weights_only=True)
        torch.save(found, directory / f"{kind}.pt")


FSDP: dict[str, Callable[[Path], Any]] = {
    "sharded": lambda d: run(d, Sharded, strategy=parallel()),
    "alone": lambda d: alone(d, 2, Sharded, strategy=parallel()),
    "operations": lambda d: operations(d, 2, ShardedOperations, strategy=parallel()),
    "whole": lambda d: sharded(d, distributed=False),
    "saved": sharded,
    "resumed": lambda d: sharded(d, "saved/epoch=2.ckpt"),
    "resumed while observing": lambda d: sharded(d, "saved/epoch=0.ckpt"),
    "resumed from whole": lambda d: sharded(d, "whole/epoch=2.ckpt"),
    "resumed from whole while observing": lambda d: sharded(d, "whole/epoch=0.ckpt"),
    "predicted": predicted,
    "user by DDP": lambda d: run(d, FromZero, callback=in_users_optimizer(), max_epochs=4),
    "user": lambda d: sharded(d, callback=in_users_optimizer()),
    "user resumed": lambda d: sharded(d, "user/epoch=2.ckpt", callback=in_users_optimizer()),
    "user resumed while observing": lambda d: sharded(d, "user/epoch=0.ckpt", callback=in_users_optimizer()),
}


def reestimated(directory: Path) -> None:
    """Estimate BatchNorm at the end: each rank's statistics, and the mean of what each would find alone."""
    technique = lfq.BatchNormStatistics(reestimate="end", batches=5)
    made = run(directory, Net, callbacks=[technique], limit_val_batches=1)
    norm = made.lightning_module.norm
    torch.save({k: v.clone() for k, v in norm.state_dict().items()}, directory / f"rank{made.global_rank}.pt")
    reestimate_batch_norm(made.lightning_module, [batch for batch, _ in zip(data(2), range(5), strict=False)])
    mean = {k: v.float() for k, v in norm.state_dict().items()}
    for value in mean.values():
        torch.distributed.all_reduce(value)
        value /= 2
    torch.save(mean, directory / "mean.pt")


class Stumbles(Net):
    """Cannot be run on a batch on one of the ranks, but by its training."""

    def forward(self, x: Tensor) -> Tensor:
        if self.trainer.global_rank == 1 and not self.training:
            raise RuntimeError("stumbled")
        return super().forward(x)

    validation_step = L.LightningModule.validation_step


def few_bits(directory: Path) -> None:
    """Below 4 bits both ranks end with statistics of both; what one cannot estimate none does, and none waits."""

    def mean(model: type[Net], choice: Any) -> Tensor:
        inside = directory / f"{model.__name__} {choice}"
        inside.mkdir(exist_ok=True)
        callback = qat(schedule=SCHEDULE, rules=TWO_BITS, batch_norm=choice, example=False)
        return run(inside, model, callback=callback, limit_val_batches=1).lightning_module.norm.running_mean

    estimated, kept = mean(Net, "auto"), mean(Net, "keep")
    assert not torch.equal(estimated, kept)
    both = [torch.empty_like(estimated) for _ in range(2)]
    torch.distributed.all_gather(both, estimated)
    assert torch.equal(*both)
    assert torch.equal(mean(Stumbles, "auto"), mean(Stumbles, "keep"))


TECHNIQUES: dict[str, Callable[[Path], Any]] = {
    "batch norm": reestimated,
    "few bits": few_bits,
    "distilled": lambda d: run(d, Net, callbacks=[lfq.Distillation()], limit_val_batches=1),
    "frozen weights": lambda d: run(
        d,
        Net,
        callbacks=[lfq.BitAnnealing({0: 8, 3: 2}), lfq.OscillationControl(dampen=0.1, freeze=0.02)],
        max_epochs=5,
        limit_val_batches=1,
    ),
}


def every_argument(directory: Path) -> None:
    """Train with every argument of the callback and every technique, export, and go on together afterwards."""
    settings: dict[str, Any] = dict(
        weight=4,
        activation=4,
        rules=[*TWO_BITS, lfq.Rule("head", weight=8, activation=8)],
        schedule=lfq.PhaseSchedule(observe=0, estimate=4, learn=8, freeze=36, unit="step"),
        optimizer=partial(torch.optim.Adam, lr=1e-3),
        lr_schedule=partial(torch.optim.lr_scheduler.StepLR, step_size=20),
        reobserve=True,
        compress_saved=True,
        record_every_n_steps=1,
        on_collapse="reinit",
        learn="all",
        batch_norm="auto",
        frozen_layers="learn",
        example=None,
        target="onnxruntime",
        write_files=True,
        export="model.onnx",
    )
    assert settings.keys() == inspect.signature(lfq.QuantizationAwareTraining).parameters.keys()
    callback = lfq.QuantizationAwareTraining(**settings)
    techniques = [
        lfq.BatchNormStatistics(freeze=4, reestimate="learn", batches=2),
        lfq.BitAnnealing({0: 8, 2: 2}),
        lfq.OscillationControl(dampen=0.1, freeze=0.02),
        lfq.Distillation(0.5),
    ]
    more = [lfq.while_learning(ModelCheckpoint(directory, save_last=True)), Collapses(), Equal(), *techniques]
    made = run(directory, Net, callback=callback, callbacks=more, max_epochs=5, limit_val_batches=1)
    made.test(made.lightning_module, data(2), verbose=False)
    assert_ranks_agree(made.lightning_module)
    assert (callback.parity is not None) == made.is_global_zero
    assert (directory / "model.onnx").is_file()


def start_two(directory: Path, kind: str, timeout: float = 280) -> dict[str, str]:
    """Run every scenario of a kind in two processes; the error of each that failed, or that one waited for ever."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1"}
    started = []
    for rank in "01":
        environment, log = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}, directory / f"log{rank}"
        started.append(Program(["-m", "tests.ranks", directory, kind], log, log, environment=environment))
    end, waited = time.monotonic() + timeout, {}
    for number, process in enumerate(started):
        code = process.wait(end - time.monotonic())
        if code:
            log = (directory / f"log{number}").read_text()[-3000:]
            waited[f"rank {number}"] = f"ended with {code}, or was ended after {timeout:g} s:\n{log}"
    return waited | {path.stem: path.read_text() for path in directory.glob("*.failed")}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    kinds = {"ddp": DDP | ENDED, "fsdp": FSDP, "techniques": TECHNIQUES, "everything": {"everything": every_argument}}
    kinds |= {name: {name: scenario} for name, scenario in DYING.items()}
    for name, scenario in kinds[sys.argv[2]].items():
        (out / name).mkdir(exist_ok=True)
        try:
            scenario(out / name)
        except Exception:
            (out / f"{name}.failed").write_text(traceback.format_exc()[-3000:])
            os._exit(1)  # the other process would wait
