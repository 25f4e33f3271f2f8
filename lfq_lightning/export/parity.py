"""The parity of an exported file with its model: what was compared, what is beyond a tolerance, and a table."""

from __future__ import annotations

from dataclasses import dataclass

from lfq_lightning.tables import Table


@dataclass(frozen=True)
class QuantizerParity:
    """One quantizer: the share of its integer codes that are equal, and the largest difference of any."""

    quantizer: str
    codes: int
    equal: float
    largest: int


@dataclass(frozen=True)
class OutputParity:
    """The outputs of one session of ONNX Runtime.

    `difference` is the largest of any output, `quanta` the same in units of the last layer's integer accumulator (input
    scale times weight scale); `noise` the mean square of the differences, in that of the output; `top1` the share of
    inputs whose largest output stands at the same place, in the first of the outputs.
    """

    difference: float
    quanta: float
    noise: float
    top1: float

    def problems(self, tolerance: float, session: str = "") -> list[str]:
        """What is beyond the tolerance, in words."""
        found = []
        if not self.top1 >= 1 - tolerance:
            found.append(f"{session}the largest output is elsewhere for {1 - self.top1:.2%} of the inputs")
        # A share p of codes that are one step off makes noise of about p steps squared.
        if not self.noise <= tolerance:
            found.append(f"{session}an output differs by up to {self.difference:.3g}, its noise is {self.noise:.2%}")
        return found

    def __str__(self) -> str:
        noise = f"noise {self.noise:.2g} of the output's power"
        return f"{self.difference:.3g} ({self.quanta:.3g} quanta), {noise}; same largest output {self.top1:.2%}"


@dataclass(frozen=True)
class Parity:
    """An exported file against the model it is of; prints as a table.

    `quantizers` holds inputs, whose codes were counted in ONNX Runtime without graph optimizations, and weights, whose
    codes are those in the file. `plain` and `optimized` are what it gives without and with all of its optimizations:
    the latter round biases to 32-bit integers, so they have a tolerance of their own. `float_file_bytes`
    is what the same file would take in float. `folded` names BatchNorms.
    """

    quantizers: tuple[QuantizerParity, ...]
    inputs: int
    plain: OutputParity
    optimized: OutputParity
    file_bytes: int
    float_file_bytes: int
    folded: tuple[str, ...] = ()
    tolerance: float = 0.01
    optimized_tolerance: float = 0.05

    @property
    def agrees(self) -> bool:
        """Whether nothing is beyond its tolerance."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """What is beyond the tolerances, in words."""
        found = [
            f"{row.quantizer}: {1 - row.equal:.2%} of the codes differ, by at most {row.largest}"
            for row in self.quantizers
            if 1 - row.equal > self.tolerance
        ]
        found += self.plain.problems(self.tolerance)
        return found + self.optimized.problems(self.optimized_tolerance, "with all optimizations, ")

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
        said = ["", *(f"{name:20}  {value}" for name, value in notes.items())]
        return str(Table({"quantizer": "<", "codes": ">", "equal": ">", "largest difference": ">"}, rows, said))
