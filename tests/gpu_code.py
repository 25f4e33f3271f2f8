"""What stands in the code that Triton compiles for a GPU: PTX and the GPU's own instructions."""

from __future__ import annotations

import re
from typing import NamedTuple


class Access(NamedTuple):
    """An instruction that loads from, or stores to, the memory of a kernel's argument."""

    argument: str
    stores: bool
    bits: int


class Instruction(NamedTuple):
    """One of a GPU's own; `conditional` with a predicate, `target` is the address that a branch or a call goes to."""

    address: int
    name: str
    conditional: bool = False
    target: int | None = None

    @property
    def operation(self) -> str:
        """The name without what modifies it."""
        return self.name.split(".")[0]


_REGISTER = r"%[a-z]+\d+"
_ACCESS = re.compile(rf"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[busf](\d+)\s[^\[]*\[\s*({_REGISTER})")
_PARAMETER = re.compile(rf"\s*ld\.param\.b64\s+({_REGISTER}),\s*\[\w+_param_(\d+)\]")
_COMPUTED = re.compile(rf"\s*(?:@!?%p\d+\s+)?[a-z][\w.:]*\s+({_REGISTER}),(.*);")


def accesses(ptx: str, arguments: list[str]) -> list[Access]:
    """Which argument's memory each load and store of global memory in a kernel's PTX meets, and how widely.

    An address is followed from the register that holds it to the argument that it was computed from.
    """
    origin: dict[str, str] = {}
    found = []
    for line in ptx.splitlines():
        if access := _ACCESS.search(line):
            kind, count, bits, address = access.groups()
            found.append(Access(origin.get(address, "unknown"), kind == "st", int(count or 1) * int(bits)))
        elif parameter := _PARAMETER.match(line):
            place = int(parameter[2])
            if place < len(arguments):  # Triton adds two of its own
                origin[parameter[1]] = arguments[place]
        elif computed := _COMPUTED.match(line):
            sources = {origin[register] for register in re.findall(_REGISTER, computed[2]) if register in origin}
            if len(sources) == 1:
                origin[computed[1]] = sources.pop()
    return found


_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)


def instructions(sass: str) -> list[Instruction]:
    """What cuobjdump prints of one kernel, less what fills the room behind it."""
    found = []
    for address, predicate, name, operands in _INSTRUCTION.findall(sass):
        jumps = name.split(".")[0] in ("BRA", "CALL")
        target = re.search(r"\b0x([0-9a-f]+)\s*$", operands) if jumps else None
        conditional = bool(predicate) or (jumps and "P" in operands) or name.startswith("BRA.DIV")
        found.append(Instruction(int(address, 16), name, conditional, int(target[1], 16) if target else None))
    last = max((place for place, instruction in enumerate(found) if instruction.name != "NOP"), default=-1)
    return found[: last + 1]
