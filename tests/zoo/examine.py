"""Everything that a user does with a network, done once: what holds, and in words what does not."""

from __future__ import annotations

import copy
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

import lfq_lightning as lfq
from tests.zoo.case import Case, Sample

PASSES = "yes"


@dataclass
class Result:
    """One row: for each check "yes", what float itself cannot do, or what went wrong."""

    name: str
    share: float = 0.0
    checks: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """The checks that neither hold nor are refused for a reason that float has too."""
        return [f"{name}: {found}" for name, found in self.checks.items() if found != PASSES and found[:5] != "float"]


class Wrapped(L.LightningModule):
    """A network of the zoo, trained towards small outputs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = by_name(name).make()

    def forward(self, **batch: Tensor) -> Tensor:
        return first_tensor(self.network(**batch))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(**batch).float().square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class SameNoise(L.Callback):
    """Dropout draws alike in a run and in one that is resumed: a checkpoint has no random state."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        torch.manual_seed(trainer.global_step)


def by_name(name: str) -> Case:
    """The case that is listed by this name."""
    from tests.zoo.listing import CASES

    return next(case for case in CASES if case.name == name)


def first_tensor(output: Any) -> Tensor:
    """The first floating tensor in what a network gives."""
    output = getattr(output, "logits", output)
    found = next(x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point())
    assert isinstance(found, Tensor)
    return found


def batches_of(case: Case) -> list[Sample]:
    """The same batches each time, of two samples."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if case.batched:
            return [case.sample() for _ in range(4)]
        drawn = [[case.sample() for _ in range(2)] for _ in range(4)]
        return [{key: torch.stack([each[key] for each in pair]) for key in pair[0]} for pair in drawn]


def loader(case: Case) -> DataLoader[Any]:
    return DataLoader(batches_of(case), batch_size=None)  # type: ignore[arg-type]


def examine(case: Case) -> Result:
    """Do all that a user does with one network."""
    result = Result(case.name)
    with tempfile.TemporaryDirectory() as directory, _quiet():
        try:
            model, callback = fit(case, Path(directory))
        except Exception as error:
            result.checks["fit"] = _shown(error)
            return result
        result.checks["fit"] = _phases(model)
        placement = callback.placement
        assert placement is not None
        result.share, result.left = placement.share, placement.account[1:]
        batch = batches_of(case)[0]
        model.eval()
        with torch.no_grad():
            expected = model(**batch)
        state = copy.deepcopy(model.state_dict())
        checks: dict[str, Callable[[], str]] = {
            "resume": lambda: resumes(case, Path(directory), state),
            "load": lambda: loads(case, Path(directory), state),
            "compile": lambda: compiles(case, model, batch),
            "frozen": lambda: _alike(lfq.freeze(model)(**batch), expected),
            "pt2": lambda: programs(case, model, batch),
            "ONNX": lambda: files(case, model, batch, Path(directory)),
            "detach": lambda: detaches(case, model, batch),
        }
        for name, check in checks.items():
            try:
                with torch.no_grad():
                    result.checks[name] = check()
            except Exception as error:
                result.checks[name] = _shown(error)
    return result


def fit(case: Case, directory: Path, ckpt_path: Path | None = None) -> tuple[Wrapped, lfq.QuantizationAwareTraining]:
    """Three epochs through all phases."""
    L.seed_everything(0, verbose=False)
    model = Wrapped(case.name)
    callback = lfq.QuantizationAwareTraining(
        4, 8, rules=case.rules, schedule=lfq.PhaseSchedule(0, 1, 2), write_files=False
    )
    with torch.enable_grad():
        trainer = L.Trainer(
            default_root_dir=directory,
            accelerator="cpu",
            max_epochs=3,
            callbacks=[callback, SameNoise(), ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, loader(case), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return model, callback


def _phases(model: nn.Module) -> str:
    late = [name for name, q in lfq.quantizers(model).items() if q.phase != "learn"]
    return PASSES if not late else f"not learning: {', '.join(late[:3])}"


def resumes(case: Case, directory: Path, state: dict[str, Any]) -> str:
    (directory / "again").mkdir()
    model, _ = fit(case, directory / "again", directory / "epoch=1.ckpt")
    return _equal(model.state_dict(), state)


def loads(case: Case, directory: Path, state: dict[str, Any]) -> str:
    L.seed_everything(1, verbose=False)
    model = lfq.load_from_checkpoint(Wrapped, directory / "epoch=2.ckpt", strict=True)
    return _equal(model.state_dict(), state)


def compiles(case: Case, model: Wrapped, batch: Sample) -> str:
    def compiled(network: nn.Module, whole: bool) -> Tensor:
        torch.compiler.reset()
        return first_tensor(torch.compile(network, fullgraph=whole, backend="aot_eager")(**batch))

    floating = copy.deepcopy(model.network)
    lfq.detach(floating)
    whole = True
    try:
        compiled(floating, True)
    except Exception:
        whole = False
        try:
            compiled(floating, False)
        except Exception:
            return "float does not compile"
    with torch.enable_grad():
        found = compiled(model.network, whole)
    return _alike(found, model(**batch))


def programs(case: Case, model: Wrapped, batch: Sample) -> str:
    floating = copy.deepcopy(model.network)
    lfq.detach(floating)
    try:
        torch.export.export(floating, (), dict(batch))
    except Exception:
        return "float does not export"
    program = lfq.export_pt2(model.network, dict(batch))
    # The operators multiply by 1 / scale where we divide: a value on a tie may go to the other side.
    return _alike(first_tensor(program.module()(**batch)), model(**batch), noise=1e-2)


def files(case: Case, model: Wrapped, batch: Sample, directory: Path) -> str:
    floating = copy.deepcopy(model.network)
    lfq.detach(floating)
    try:
        import onnxruntime

        made = torch.onnx.export(floating, (), kwargs=dict(batch), dynamo=True, verbose=False)
        assert made is not None
        made.save(str(directory / "float.onnx"))
        onnxruntime.InferenceSession(directory / "float.onnx")
    except Exception:
        return "float does not export"
    parity = lfq.export_onnx(model.network, dict(batch), directory / "m.onnx", dynamic_axes=False, on_mismatch="warn")
    return PASSES if parity.agrees else "; ".join(parity.problems)[:200]


def detaches(case: Case, model: Wrapped, batch: Sample) -> str:
    L.seed_everything(0, verbose=False)
    floating = Wrapped(case.name)
    lfq.detach(model)
    if [type(m).__name__ for m in model.modules()] != [type(m).__name__ for m in floating.modules()]:
        return "other types"
    floating.load_state_dict(model.state_dict())
    return _alike(model(**batch), floating.eval()(**batch), noise=0.0)


def _equal(found: dict[str, Any], expected: dict[str, Any]) -> str:
    if list(found) != list(expected):
        return f"other keys: {sorted(set(found) ^ set(expected))[:3]}"
    differ = [k for k, v in expected.items() if isinstance(v, Tensor) and not _same(found[k], v)]
    return PASSES if not differ else f"differ: {', '.join(differ[:3])}"


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def _alike(found: Any, expected: Tensor, noise: float = 1e-9) -> str:
    """Whether the power of the difference is at most this share of the output's."""
    found = first_tensor(found).detach()
    expected = expected.detach()
    if found.shape != expected.shape:
        return f"another shape: {tuple(found.shape)}"
    apart = float((found - expected).square().sum() / expected.square().sum().clamp(min=1e-30))
    return PASSES if apart <= noise else f"differs by {apart**0.5:.2g} of the output"


def _shown(error: Exception) -> str:
    text = " ".join(str(error).split())
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} ({Path(place.filename).name}:{place.lineno}): {text[:300]}"


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
