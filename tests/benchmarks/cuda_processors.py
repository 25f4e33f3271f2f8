"""GPUs by their data sheets, and the time that they cannot do without for the instructions of a kernel."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tests.gpu_code import Instruction

WARPS = 64  # that a multiprocessor holds at most
_REGISTERS, _PROGRAMS = 65536, 32
_COPIED = 0.9  # of the data sheet's bandwidth: as far as a copy gets
# From a request to its bytes, under load: an H200 reached 0.91 of a copy with 32 KiB in flight, and 0.52 with 16. It
# would be 1.6 for the 40 KiB that an H100 is often said to need.
_MICROSECONDS = 1.1


@dataclass(frozen=True)
class Processor:
    """A GPU, from its maker's data sheet and the CUDA programming guide's table of throughputs.

    Args:
        capability: the compute capability, in tenths.
        multiprocessors: how many it has.
        terabytes: of memory bandwidth, per second.
        gigahertz: the clock that it boosts to.
        shared: KiB of shared memory that a multiprocessor lends to programs.
        additions: float32 additions, multiplications and FMAs of a multiprocessor per clock.
    """

    capability: int
    multiprocessors: int
    terabytes: float
    gigahertz: float
    shared: int
    additions: int

    @property
    def copied(self) -> float:
        """Bytes of memory that a multiprocessor's share of a copy moves per clock."""
        return _COPIED * self.terabytes * 1e3 / self.gigahertz / self.multiprocessors

    @property
    def asked_in_flight(self) -> float:
        """Bytes that a multiprocessor must have asked for to fill that: latency times bandwidth."""
        return self.copied * self.gigahertz * 1e3 * _MICROSECONDS


PROCESSORS = {
    "A100": Processor(80, 108, 2.04, 1.41, 164, 64),
    "H100": Processor(90, 132, 3.35, 1.98, 227, 128),
    "H200": Processor(90, 132, 4.8, 1.98, 227, 128),
    "B200": Processor(100, 148, 8.0, 1.96, 227, 128),
}

# What a multiprocessor starts 64 or 16 of per clock; of all together it issues 128.
_COMPARISONS = {"FSEL", "FSETP", "FSET", "FMNMX", "FCHK", "ISETP", "IMNMX", "VIMNMX", "IABS", "SEL", "F2FP", "PRMT"}
_COMPARISONS |= {"IADD3", "VIADD", "LOP3", "PLOP3", "SHF", "LEA", "MOV", "CS2R"}
_ADDITIONS = {"FADD", "FMUL", "FFMA", "IMAD", "HADD2", "HFMA2"}
_SPECIAL = {"MUFU", "I2F", "F2I", "F2F", "I2I"}


def resident_programs(processor: Processor, registers: int, warps: int, shared: int) -> int:
    """How many programs of so many warps a multiprocessor holds at once.

    Args:
        processor: whose.
        registers: of a thread.
        warps: of a program.
        shared: bytes of shared memory of a program.
    """
    each_warp = math.ceil(registers * 32 / 256) * 256
    by_registers = 4 * (_REGISTERS // 4 // each_warp) // warps  # each quarter of it has registers of its own
    by_shared = processor.shared // math.ceil((shared + 1024) / 1024)  # 1 KiB is the system's
    return min(_PROGRAMS, WARPS // warps, by_registers, by_shared)


def clocks(processor: Processor, operations: Counter[str]) -> dict[str, float]:
    """Clocks of a multiprocessor that one thread with these operations takes at least, by what bounds them."""
    kinds = {
        "issue": (operations.total(), 128),
        "comparisons": (sum(operations[name] for name in _COMPARISONS), 64),
        "additions": (sum(operations[name] for name in _ADDITIONS), processor.additions),
        "special": (sum(operations[name] for name in _SPECIAL), 16),
    }
    return {kind: count / rate for kind, (count, rate) in kinds.items()}


def executed(instructions: Sequence[Instruction], divisions: float = 0) -> Counter[str]:
    """How often a thread executes each operation on its likely path.

    That is the path with the most divisions, and of these the longest, on which nothing is called: only what divides
    numbers out of the ordinary is a call. A loop goes round until there are `divisions`.
    """
    place = {instruction.address: index for index, instruction in enumerate(instructions)}
    nowhere = (-1, 0)  # divisions and instructions that are still to come
    ahead = [nowhere] * (len(instructions) + 1)
    following: dict[int, int] = {}
    inner: set[int] = set()
    for index in reversed(range(len(instructions))):
        instruction = instructions[index]
        target = place.get(instruction.target) if instruction.target is not None else None
        ends, jumps = instruction.operation in ("EXIT", "RET"), instruction.operation == "BRA"
        ways = []
        if jumps and target is not None and target > index:
            ways.append(target)
        elif jumps and target is not None:  # a loop; the path leaves it below
            inner.update(range(target, index + 1))
            ways.append(index + 1)
        if instruction.conditional or not (ends or jumps or instruction.operation == "CALL"):
            ways.append(index + 1)
        best = max(ways, key=lambda way: ahead[way], default=len(instructions))
        if ahead[best] != nowhere:
            following[index] = best
        elif not ends:
            continue
        divided, length = max(ahead[best], (0, 0))
        ahead[index] = (divided + (instruction.operation == "FCHK"), length + 1)
    path = [0]
    while path[-1] in following:
        path.append(following[path[-1]])
    checks = Counter(index in inner for index in path if instructions[index].operation == "FCHK")
    rounds = max(1, round((divisions - checks[False]) / checks[True])) if checks[True] else 1
    found: Counter[str] = Counter()
    for index in path:
        found[instructions[index].operation] += rounds if index in inner else 1
    return found
