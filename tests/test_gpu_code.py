"""What is read from compiled kernels, and what follows from it about the GPUs that are not here."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.benchmarks.cuda_processors import PROCESSORS, clocks, executed, resident_programs
from tests.gpu_code import Access, Instruction, accesses, instructions

PTX = """
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	ld.param.b32 	%r1, [kernel_param_2];
	ld.param.b64 	%rd3, [kernel_param_3];
	mad.wide.s32 	%rd4, %r1, 4, %rd1;
	@%p1 add.s64 	%rd5, %rd4, %rd9;
	@%p2 ld.global.v4.b32 { %r9, %r10, %r11, %r12 }, [ %rd5 + 0 ];
	ld.global.L1::evict_last.b16 { %rs9 }, [ %rd4 + 32 ];
	ld.shared.v4.b32 	{ %r5, %r6, %r7, %r8 }, [ %rd2 ];
	@%p2 st.global.v2.b64 [ %rd2 + 0 ], { %rd7, %rd8 };
	st.global.b32 [ %rd3 + 0 ], { %r8 };
"""


def test_accesses_are_those_of_global_memory_with_the_argument_that_each_address_comes_from() -> None:
    assert accesses(PTX, ["x", "y", "count"]) == [
        Access("x", stores=False, bits=128),
        Access("x", stores=False, bits=16),
        Access("y", stores=True, bits=128),
        Access("unknown", stores=True, bits=32),
    ]


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                          /* 0x00000a00ff017b82 */
                                                                                   /* 0x000fe20000000f00 */
        /*0010*/              @!P0 LDG.E.128 R20, desc[UR6][R8.64+0x800] ;         /* 0x00000a00ff017b82 */
        /*0020*/              @!P2 BRA !P3, 0x40 ;                                 /* 0x00000a00ff017b82 */
        /*0030*/                   CALL.REL.NOINC 0x1fc0 ;                         /* 0x00000a00ff017b82 */
        /*0040*/                   EXIT ;                                          /* 0x00000a00ff017b82 */
        /*0050*/                   NOP;                                            /* 0x00000a00ff017b82 */
"""


def test_instructions_are_read_with_their_predicates_and_targets() -> None:
    assert instructions(SASS) == [
        Instruction(0x00, "LDC"),
        Instruction(0x10, "LDG.E.128", conditional=True),
        Instruction(0x20, "BRA", conditional=True, target=0x40),
        Instruction(0x30, "CALL.REL.NOINC", target=0x1FC0),
        Instruction(0x40, "EXIT"),
    ]


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "resident"),
    [(32, 8, 0, 8), (33, 8, 0, 6), (64, 8, 1024, 4), (62, 4, 0, 8), (255, 8, 0, 1), (16, 1, 0, 32), (32, 4, 60_000, 3)],
)
def test_as_many_programs_are_resident_as_registers_warps_and_shared_memory_allow(
    registers: int, warps: int, shared: int, resident: int
) -> None:
    assert resident_programs(PROCESSORS["H100"], registers, warps, shared) == resident


def code(*lines: str) -> list[Instruction]:
    """Instructions at addresses 0, 1, 2...; `?` marks a predicate, `>4` a target."""
    found = []
    for address, line in enumerate(lines):
        name, _, target = line.removeprefix("?").partition(">")
        found.append(Instruction(address, name, line.startswith("?"), int(target) if target else None))
    return found


def test_the_likely_path_divides_and_calls_nothing() -> None:
    first_programs_go_another_way = code("?BRA>5", "FCHK", "?BRA>4", "CALL>7", "EXIT", "LDG", "EXIT", "MUFU", "RET")
    assert executed(first_programs_go_another_way) == Counter(BRA=2, FCHK=1, EXIT=1)
    both_divide = code("?BRA>4", "FCHK", "MUFU", "EXIT", "FCHK", "EXIT")
    assert executed(both_divide) == Counter(BRA=1, FCHK=1, MUFU=1, EXIT=1)


def test_loops_go_round_as_often_as_the_divisions_ask_for() -> None:
    loop = code("LDG", "FCHK", "FADD", "FCHK", "?BRA>1", "STG", "EXIT")
    assert executed(loop, divisions=6) == Counter(LDG=1, FCHK=6, FADD=3, BRA=3, STG=1, EXIT=1)
    left_by_a_call = code("LDG", "FCHK", "?CALL>4", "BRA>1", "EXIT")
    assert executed(left_by_a_call, divisions=3) == Counter(LDG=1, FCHK=3, CALL=3, BRA=3, EXIT=1)
    assert executed(loop) == Counter(LDG=1, FCHK=2, FADD=1, BRA=1, STG=1, EXIT=1)


def test_the_rarest_unit_bounds_the_time() -> None:
    needed = clocks(PROCESSORS["H100"], Counter(MUFU=1, FFMA=3, FSETP=3))
    assert max(needed, key=lambda kind: needed[kind]) == "special"
    assert needed == {"issue": 7 / 128, "comparisons": 3 / 64, "additions": 3 / 128, "special": 1 / 16}
