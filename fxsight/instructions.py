"""Where an instruction of a code object stands in the text, and whether it is something that has a name.

    code object, offset  →  ``Span`` of the text, ``Kind``

What CPython's versions do differently is known here alone. No torch.
"""

from __future__ import annotations

import dis
import types
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Kind = Literal["call", "operator", "subscript", "store", "attribute"]


@dataclass(frozen=True)
class Span:
    """A piece of a file as in ``co_positions()``: lines from 1, columns from 0 in bytes, end excluded."""

    line: int
    end_line: int
    col: int
    end_col: int

    @property
    def start(self) -> tuple[int, int]:
        return self.line, self.col

    @property
    def end(self) -> tuple[int, int]:
        return self.end_line, self.end_col

    def contains(self, other: Span) -> bool:
        return self.start <= other.start and other.end <= self.end


def located(position: tuple[int | None, ...]) -> Span | None:
    """The span of an instruction; None where the compiler gave none, or an empty one."""
    match position:
        case int(line), int(end_line), int(col), int(end_col) if (line, col) < (end_line, end_col):
            return Span(line, end_line, col, end_col)
        case _:
            return None


def site_table(code: types.CodeType) -> dict[int, tuple[Span, Kind]]:
    """Offset in the bytecode → span and kind, for the instructions that can be sites, inline caches included.

    While Python 3.11 runs a callee, the caller's ``f_lasti`` may be at a cache behind the instruction.
    """
    positions, instructions = list(code.co_positions()), list(dis.get_instructions(code))
    ends = [*(after.offset for _, after in pairwise(instructions)), len(code.co_code)]
    table: dict[int, tuple[Span, Kind]] = {}
    before: tuple[object, ...] = ()
    for instruction, end in zip(instructions, ends, strict=True):
        position, kind = positions[instruction.offset // 2], _kind(instruction)
        # ``with f():`` calls __enter__ and __exit__; from 3.12 on, these calls may have the span of ``f()``.
        by_with = before in (("LOAD_CONST", position), ("LOAD_SPECIAL", position))
        span = located(position) if kind and not (by_with and instruction.opname == "CALL") else None
        if span and kind:
            table.update(dict.fromkeys(range(instruction.offset, end, 2), (span, kind)))
        if instruction.opname != "PRECALL":
            before = (instruction.opname, position)
    return table


def _kind(instruction: dis.Instruction) -> Kind | None:
    """What an instruction does. Python 3.12 made ``+x`` an intrinsic, 3.14 ``x[0]`` a binary operator."""
    match instruction.opname, instruction.argrepr:
        case ("PRECALL" | "CALL" | "CALL_KW" | "CALL_FUNCTION_EX", _):
            return "call"
        case ("BINARY_SUBSCR" | "BINARY_SLICE", _) | ("BINARY_OP", "[]"):
            return "subscript"
        case ("BINARY_OP" | "COMPARE_OP" | "UNARY_NEGATIVE" | "UNARY_INVERT" | "UNARY_POSITIVE", _):
            return "operator"
        case ("CALL_INTRINSIC_1", "INTRINSIC_UNARY_POSITIVE"):
            return "operator"
        case ("STORE_SUBSCR" | "STORE_SLICE", _):
            return "store"
        case ("LOAD_ATTR" | "LOAD_METHOD" | "LOAD_SUPER_ATTR", _):
            return "attribute"
        case _:
            return None


def site_of_frame(code: types.CodeType, lasti: int) -> tuple[Span, Kind] | None:
    """Where in the file a frame is and what it does there, from its ``f_code`` and ``f_lasti``.

    None when it does nothing that is a site, or when Python runs without columns (``-X no_debug_ranges``).
    Disassembles all of ``code``: for many questions, ``SourceReader.locate``.
    """
    return site_table(code).get(lasti)
