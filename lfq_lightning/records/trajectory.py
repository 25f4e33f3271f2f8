"""Each quantizer's scale, zero point and saturation as CSV, one row per quantizer and step."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

FILE_NAME = "trajectory.csv"


@dataclass(frozen=True)
class TrajectoryRow:
    """What one quantizer looked like at one step.

    Mean, minimum and maximum are taken over the channels (or groups) that have a scale of their own, and are
    equal for a per-tensor quantizer. NaN means that nothing was measured at this step.

    Args:
        step: Number of optimizer steps taken so far.
        epoch: Epoch of that step.
        phase: Phase that was in force: ``off``, ``observe``, ``estimate``, ``learn`` or ``freeze``.
        quantizer: Dotted name of the quantizer in the model.
        scale_mean: Mean scale.
        scale_min: Smallest scale.
        scale_max: Largest scale.
        zero_point_mean: Mean zero point, in integer steps.
        zero_point_min: Smallest zero point.
        zero_point_max: Largest zero point.
        saturation: Share of the elements that were clamped, between 0 and 1.
        gradient_norm: Euclidean norm of the gradient of the scale.

    Example:
        >>> TrajectoryRow(3, 0, "learn", "conv1.weight_quantizer", 0.1, 0.1, 0.1, 0, 0, 0, 0.01, 0.5).phase
        'learn'
    """

    step: int
    epoch: int
    phase: str
    quantizer: str
    scale_mean: float
    scale_min: float
    scale_max: float
    zero_point_mean: float
    zero_point_min: float
    zero_point_max: float
    saturation: float
    gradient_norm: float


COLUMNS = [field.name for field in fields(TrajectoryRow)]


def trajectory_in(directory: Path) -> Path | None:
    """The trajectory in a directory, or the only one below it; None where there is none.

    Raises:
        ValueError: There are several below it.
    """
    if (directory / FILE_NAME).is_file():
        return directory / FILE_NAME
    found = sorted(directory.rglob(FILE_NAME))
    if len(found) > 1:
        shown = ", ".join(f"`{path.parent}`" for path in found[:5])
        raise ValueError(f"A trajectory is of one run. Found {len(found)} in `{directory}`: choose one of {shown}.")
    return found[0] if found else None


def read_trajectory(path: Path | str) -> list[TrajectoryRow]:
    """Read the rows of a ``trajectory.csv``, leaving out a last line that a crash has torn.

    Args:
        path: The CSV file; its columns may stand in any order, among others.

    Returns:
        The rows in the order of the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing, or a line is not a row of a trajectory.

    Example:
        >>> import tempfile
        >>> from lfq_lightning.records.files import Trajectory
        >>> file = Trajectory(tempfile.mkdtemp())
        >>> file.append([TrajectoryRow(1, 0, "learn", "fc.weight_quantizer", 0.1, 0.1, 0.1, 0, 0, 0, 0.01, 0.5)])
        >>> read_trajectory(file.path)[0].scale_mean
        0.1
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"A trajectory is read from the `{FILE_NAME}` that a run has written. Found no file `{path}`: "
            "pass the path of the file, and check that the run has recorded its first step."
        )
    records = _records(path)
    _, header = next(records, (0, []))
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise ValueError(
            f"A trajectory has the columns {', '.join(COLUMNS)}. Found none named {', '.join(missing)} "
            f"in `{path}`: pass a file that the callback has written."
        )
    positions = [header.index(column) for column in COLUMNS]
    return [_row(path, line, [found[position] for position in positions]) for line, found in records]


def _row(path: Path, line: int, found: list[str]) -> TrajectoryRow:
    step, epoch, phase, quantizer, *numbers = found
    try:
        values = [float(number) if number else math.nan for number in numbers]
        return TrajectoryRow(int(step), int(epoch), phase, quantizer, *values)
    except ValueError as error:
        raise ValueError(f"{_not_a_row(path, line, found)} ({error})") from None


def rows_up_to(path: Path, step: int) -> list[list[str]]:
    """A file's rows up to a step, as their fields: text keeps its bytes, which a number would not.

    Raises:
        OSError, ValueError: it cannot be read, or is no trajectory.
    """
    records = _records(path)
    _, header = next(records, (0, []))
    if header != COLUMNS:
        raise ValueError(f"a trajectory starts with the columns {', '.join(COLUMNS)}; found {header}")
    # What could not be read later is not carried over.
    return [found for line, found in records if _row(path, line, found).step <= step]


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and fields of each complete record, the header first."""
    raw = path.read_bytes()
    # What follows the last line break is torn.
    complete = raw[: raw.rfind(b"\n") + 1]
    reader = csv.reader(io.StringIO(complete.decode(errors="replace"), newline=""))
    width = None
    try:
        for found in reader:
            if width is not None and len(found) != width:
                line = reader.line_num
                # A record whose quoted name holds a line break can be torn there.
                if next(reader, None) is None:
                    return
                raise ValueError(_not_a_row(path, line, found))
            width = len(found)
            yield reader.line_num, found
    except csv.Error as error:
        raise ValueError(f"`{path}` is not a CSV file ({error})") from None


def _not_a_row(path: Path, line: int, found: list[str]) -> str:
    return f"Every line of a trajectory holds one row. Found {found} in line {line} of `{path}`: remove it."


def as_fields(row: TrajectoryRow) -> list[str]:
    """A row as its fields; what was not measured is empty."""
    step, epoch, phase, quantizer, *numbers = vars(row).values()
    # Nine significant digits identify every float32.
    return [str(step), str(epoch), phase, quantizer] + ["" if math.isnan(n) else f"{n:.9g}" for n in numbers]


def as_csv(records: Iterable[list[str]]) -> bytes:
    """Lines of a file."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(records)
    return text.getvalue().encode()
