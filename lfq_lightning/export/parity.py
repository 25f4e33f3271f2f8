"""The parity of an exported file with its model: what was compared, what is beyond a tolerance, and a table."""

from __future__ import annotations

from dataclasses import dataclass

from lfq_lightning.tables import Table


@dataclass(frozen=True)
class QuantizerParity:
    """One quantizer: how many integer codes, the share that is equal, and the largest difference of any.

    `weight` says that they are stored in the file, and not made from sums.
    """

    quantizer: str
    codes: int
    equal: float
    largest: int
    weight: bool = False

    def problem(self, tolerance: float) -> str:
        """What is beyond the tolerance, in words; empty for nothing."""
        differing = round((1 - self.equal) * self.codes)
        allowed = 0.0 if self.weight else max(tolerance * self.codes, 1.0)  # one value may lie between two codes
        if differing > allowed or (differing and self.largest != 1):
            return f"{self.quantizer}: {1 - self.equal:.2%} of the codes differ, by at most {self.largest}"
        return ""


@dataclass(frozen=True)
class OutputParity:
    """The outputs of one session of ONNX Runtime.

    `difference` is the largest of any output, `quanta` the same in units of the last layer's integer accumulator (input
    scale times weight scale), `relative` the same in the largest magnitude of its output; `noise` the mean square of
    the differences, in that of the output. `distance` is what a user's own measure gave, or None.
    """

    difference: float
    quanta: float
    noise: float
    relative: float
    distance: float | None = None

    def problems(self, tolerance: float, found: float, session: str = "") -> list[str]:
        """What is beyond the tolerance, in words."""
        measured = found if self.distance is None else self.distance
        if measured <= tolerance:
            return []
        return [
            f"{session}an output differs by up to {self.difference:.3g}, {measured:.2g} with {tolerance:.2g} allowed"
        ]

    def __str__(self) -> str:
        own = "" if self.distance is None else f"; distance {self.distance:.3g}"
        shares = f"{self.relative:.2g} of the largest output, noise {self.noise:.2g} of its power"
        return f"{self.difference:.3g} ({self.quanta:.3g} quanta), {shares}{own}"


@dataclass(frozen=True)
class Parity:
    """An exported file against the model it is of; prints as a table.

    `quantizers` holds activations, whose codes were counted in ONNX Runtime without graph optimizations, and weights,
    whose codes are those in the file. Each layer of the model was given the codes that ONNX Runtime had come to before
    it: sums in another order put a value on the edge between two codes to the other side, and through many layers such
    differences would add up to what hides a fault. `plain` and `optimized` are what the file gives without and with all
    optimizations: these run on by themselves and round biases to 32-bit integers, so they are compared by `noise`.
    `float_file_bytes` is what the same file would take in float. `folded` names BatchNorms, `in_float` the weights
    of which ONNX Runtime makes floats at each run, as it has no integer kernels for how they are stored and read, and
    `by_runtime` the inputs that it quantizes itself as they come, which the codes and `plain` say nothing of.
    """

    quantizers: tuple[QuantizerParity, ...]
    inputs: int
    plain: OutputParity
    optimized: OutputParity
    file_bytes: int
    float_file_bytes: int
    folded: tuple[str, ...] = ()
    in_float: tuple[str, ...] = ()
    by_runtime: tuple[str, ...] = ()
    tolerance: float = 0.0005
    output_tolerance: float = 1e-4
    optimized_tolerance: float = 0.05

    @property
    def agrees(self) -> bool:
        """Whether nothing is beyond its tolerance."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """What is beyond the tolerances, in words."""
        found = [problem for row in self.quantizers if (problem := row.problem(self.tolerance))]
        found += self.plain.problems(self.output_tolerance, self.plain.relative)
        return found + self.optimized.problems(
            self.optimized_tolerance, self.optimized.noise, "with all optimizations, "
        )

    @property
    def size(self) -> float:
        """Bytes of the file per byte of the float file."""
        return self.file_bytes / self.float_file_bytes

    def __str__(self) -> str:
        rows = [(r.quantizer, f"{r.codes:,}", f"{r.equal:.4%}", str(r.largest)) for r in self.quantizers]
        notes = {
            "inputs compared": f"{self.inputs:,}",
            "output differs by": str(self.plain),
            "with optimizations": str(self.optimized),
            "BatchNorms folded": str(len(self.folded)),
            "file": f"{self.file_bytes:,} bytes, {self.size:.3f} of the float file",
            "agrees": "yes" if self.agrees else f"no: {'; '.join(self.problems)}",
        }
        if self.in_float:
            notes["runs in float"] = (
                f"{len(self.in_float)} weights, made floats at each run; quantized inputs, a `target` and "
                "`optimize_for='speed'` have integers"
            )
        if self.by_runtime:
            notes["left to the runtime"] = f"{len(self.by_runtime)} inputs, whose scales come with each token"
        said = ["", *(f"{name:20}  {value}" for name, value in notes.items())]
        return str(Table({"quantizer": "<", "codes": ">", "equal": ">", "largest difference": ">"}, rows, said))
