"""Bits for each layer that fit a size, from what each layer loses alone."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lfq_lightning.analysis.sensitivity import Sensitivity, SensitivityRow
from lfq_lightning.checking import check_path, check_whole, in_words
from lfq_lightning.rules import Rule, as_rules
from lfq_lightning.spec import QuantSpec, weight_spec


def propose_bits(sensitivity: Sensitivity, budget_bytes: int) -> list[Rule]:
    """Choose each layer's bits so that the weights fit a budget and the sum of what the layers lose is small.

    Every layer begins at its most bits. As long as the weights are too large, the change to fewer bits of one layer
    that loses least per byte saved is made: the greedy walk along the lower convex hull of Shoham & Gersho (1988),
    "Efficient bit allocation for an arbitrary set of quantizers", whose result is optimal up to the last change. Then
    what the last change saved beyond need is given back to the layer that wins most by it. As in HAWQ-V2 (Dong et al.
    2020), what layers lose alone is taken to add up. A layer that seems to gain from fewer bits counts as losing
    nothing by them: that is noise of the metric.

    Args:
        sensitivity: what `lfq_lightning.sensitivity` gave for several `bits`.
        budget_bytes: of all these layers' weights together, packed, with their scales; as `summarize` counts.

    Returns:
        A rule for each layer in order, for `rules` of the callback or `attach`; `save_rules` writes them.

    Raises:
        ValueError: if widths were not measured, or the least of them are too large for the budget.

    Example:
        >>> import torch, lfq_lightning as lfq
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 64))
        >>> batches = [(torch.randn(8, 64), torch.randn(8, 64))]
        >>> loss = torch.nn.functional.mse_loss
        >>> found = lfq.sensitivity(model, batches, loss, bits=(4, 8), higher_is_better=False)
        >>> len(lfq.propose_bits(found, budget_bytes=1000))
        2
    """
    if not isinstance(sensitivity, Sensitivity):
        raise TypeError(
            "`sensitivity` must be what `lfq_lightning.sensitivity` gave. Found "
            f"{in_words(sensitivity)}: call that function with `bits` first."
        )
    check_whole("budget_bytes", budget_bytes)
    layers: dict[tuple[str, ...], list[SensitivityRow]] = {}
    for row in sensitivity.rows:
        if row.spec is None:
            raise ValueError(
                "A proposal needs what each layer loses at several widths. Found its own quantizers alone: call "
                "`sensitivity` with `bits`, for instance (2, 3, 4, 8)."
            )
        layers.setdefault(row.layers, []).append(row)
    options = {names: _worth_it(rows) for names, rows in layers.items()}
    chosen = dict.fromkeys(options, 0)

    def size() -> int:
        return sum(options[names][at].row.weight_bytes for names, at in chosen.items())

    least = sum(rows[-1].row.weight_bytes for rows in options.values())
    if least > budget_bytes:
        raise ValueError(
            f"The weights must fit `budget_bytes`. Found {budget_bytes:,}, and {least:,} at the fewest bits: allow "
            "more, or measure fewer bits."
        )
    while size() > budget_bytes:
        candidates = [(names, at) for names in options for at in range(chosen[names] + 1, len(options[names]))]
        names, at = min(candidates, key=lambda move: _price(options[move[0]], chosen[move[0]], move[1]))
        chosen[names] = at
    while True:
        room = budget_bytes - size()
        better = [
            (names, at)
            for names in options
            for at in range(chosen[names])
            if 0 < options[names][at].row.weight_bytes - options[names][chosen[names]].row.weight_bytes <= room
        ]
        if not better:
            break
        names, at = max(better, key=lambda move: _gain(options[move[0]], chosen[move[0]], move[1]))
        chosen[names] = at
    return [_rule(name, options[names][at].row) for names, at in chosen.items() for name in names]


class _Option:
    """A row with a loss that never falls with fewer bits."""

    def __init__(self, row: SensitivityRow, loss: float) -> None:
        self.row, self.loss = row, loss


def _worth_it(rows: Iterable[SensitivityRow]) -> list[_Option]:
    options, loss = [], 0.0
    for row in sorted(rows, key=lambda row: -row.weight_bytes):
        loss = max(loss, math.inf if math.isnan(row.drop) else row.drop)
        options.append(_Option(row, loss))
    return options


def _price(options: list[_Option], at: int, to: int) -> tuple[float, int]:
    """What is lost per byte saved; of equal prices, the change that saves least goes first."""
    saved = options[at].row.weight_bytes - options[to].row.weight_bytes
    lost = 0.0 if options[to].loss == options[at].loss else options[to].loss - options[at].loss
    return (lost / saved if saved else math.inf), saved


def _gain(options: list[_Option], at: int, to: int) -> tuple[float, int]:
    lost, saved = _price(options, to, at)
    return lost, saved


def _rule(name: str, row: SensitivityRow) -> Rule:
    assert row.spec is not None
    spec = QuantSpec(**row.spec)
    return Rule(glob.escape(name), weight=spec.bits if weight_spec(spec.bits) == spec else spec)


def save_rules(rules: Iterable[Rule], path: Path | str) -> None:
    """Write rules as YAML under the key `rules`, as a Hydra or LightningCLI configuration holds them.

    Args:
        rules: rules by name.
        path: the file to write.

    Raises:
        ValueError: if a rule goes by a type, for which YAML has no words.

    Example:
        >>> import tempfile, lfq_lightning as lfq
        >>> path = tempfile.mkdtemp() + "/rules.yaml"
        >>> lfq.save_rules([lfq.Rule("head", weight=8)], path)
        >>> lfq.load_rules(path)
        [Rule('head', weight=8)]
    """
    check_path("path", path, written=True)
    path = Path(path)
    values = [rule.to_dict() for rule in as_rules(rules)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OmegaConf.to_yaml({"rules": values}))


def load_rules(path: Path | str) -> list[Rule]:
    """Read what `save_rules` wrote; in Hydra, `rules: {_target_: lfq_lightning.load_rules, path: rules.yaml}`.

    Args:
        path: a YAML file with the key `rules`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it does not hold rules.
    """
    check_path("path", path)
    if not Path(path).exists():
        raise FileNotFoundError(f"`path` must be a file of rules. Found nothing at `{path}`: `save_rules` writes one.")
    try:
        found = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"`{path}` must be YAML with the key `rules`. Found a file that is none ({error}).") from error
    rules = found.get("rules") if isinstance(found, Mapping) else None
    if not isinstance(rules, list) or not all(isinstance(rule, Mapping) for rule in rules):
        raise ValueError(f"`{path}` must hold a list under the key `rules`. Found {in_words(found)}.")
    try:
        return list(as_rules(rules))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`{path}` must hold rules with match, weight and activation. Found another ({error})."
        ) from None
