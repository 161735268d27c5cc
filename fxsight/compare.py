"""What differs between two programs: operations added, removed and rewired, and what that costs.

Operations are paired by where they come from, the call of the model, the operator and its number there, and not by
their names: so programs of two versions of a model, or of a library, can be compared, too. ``save_program`` keeps one
in a file, for a process that has another version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx

from fxsight.cost import Cost, bytes_of, cost_of
from fxsight.errors import TextError
from fxsight.node import binding_of, origin_of
from fxsight.passes.erase_boundaries import EraseBoundaries
from fxsight.program import Program
from fxsight.store import decode, encode
from fxsight.targets import argument_text, target_name
from fxsight.text import spec_text

Kind = Literal["added", "removed", "rewired"]
_SIGN: Mapping[Kind, str] = {"added": "+", "removed": "-", "rewired": "~"}
_FILE = "a program to compare"
_EXAMPLE = 16  # of a free size that is not given
Key = tuple[str, str, int]


@dataclass(frozen=True)
class Change:
    """One operation that differs.

    address: of the call of the model that it is in; empty for an edit's.  call, type: what it is now, or was if it was
    removed.  before: what a rewired operation was.  line: of the model's code, or of the edit's.
    """

    kind: Kind
    address: str
    call: str
    type: str
    line: str
    before: str = ""

    def __str__(self) -> str:
        note = "  ".join(part for part in (self.type, self.address, self.line) if part)
        was = f"\n      was {self.before}" if self.before else ""
        return f"{_SIGN[self.kind]} {self.call}    # {note}{was}"


@dataclass(frozen=True)
class Diff:
    """All changes, in the order of the second program, and the cost of both at some sizes.

    bytes_before, bytes_after: of all values that are made.
    """

    changes: tuple[Change, ...]
    before: Cost
    after: Cost
    bytes_before: int
    bytes_after: int
    sizes: Mapping[str, int]

    def of(self, kind: Kind) -> tuple[Change, ...]:
        """The changes of one kind."""
        return tuple(change for change in self.changes if change.kind == kind)

    def __bool__(self) -> bool:
        return bool(self.changes)

    def __str__(self) -> str:
        if not self.changes:
            return "no difference"
        at = ", ".join(f"{name} = {size}" for name, size in self.sizes.items())
        counts = ", ".join(f"{len(self.of(kind))} {kind}" for kind in _SIGN)
        cost = (
            f"{_signed(self.after.operators - self.before.operators)} operators, "
            f"{_signed(self.after.flops - self.before.flops)} FLOPs of {self.before.flops:,}, "
            f"{_signed(self.bytes_after - self.bytes_before)} bytes of {self.bytes_before:,}"
        )
        return "\n".join([f"# {counts}", f"# {cost}{f', at {at}' if at else ''}", *map(str, self.changes)])

    __repr__ = __str__


def diff(before: Any, after: Any, sizes: Mapping[str, int] | None = None) -> Diff:
    """What differs between two programs.

    before, after: each a ``Program``, or what has one: a finished program, a trace that has ended, a model (that of its
    last forward), a file that ``save_program`` has written.
    sizes: for the cost; 16 for those that are not given.

    Raises: TypeError for what has no program; TextError for a file that cannot be read; OSError.
    """
    a, b = (EraseBoundaries()(program_of(each)) for each in (before, after))
    free = {size.name: max(size.low, _EXAMPLE) for p in (a, b) for size in p.sizes}
    at = {name: (sizes or {}).get(name, number) for name, number in free.items()}
    changes = tuple(_changes(a, b))
    return Diff(
        changes, cost_of(a.graph.nodes, at), cost_of(b.graph.nodes, at), _made_bytes(a, at), _made_bytes(b, at), at
    )


def _made_bytes(program: Program, sizes: Mapping[str, int]) -> int:
    return sum(bytes_of(n.meta.get("spec"), sizes) for n in program.graph.nodes if n.op == "call_function")


def program_of(thing: Any) -> Program:
    """The program that something is or has.

    Raises: as ``diff``.
    """
    if isinstance(thing, (str, Path)):
        return _read(Path(thing))
    while not isinstance(thing, Program):
        captures = vars(thing).get("_captures") if hasattr(thing, "__dict__") else None
        found = getattr(thing, "program", None) if captures is None else captures.latest
        if found is None:
            what = "nothing has been captured of this model yet: model.capture(x)" if captures is not None else ""
            raise TypeError(what or f"a program, a file of one, a model or a trace that has ended, not {_kind(thing)}")
        thing = found
    return thing


def _kind(thing: Any) -> str:
    return f"a {type(thing).__name__}"


def save_program(thing: Any, path: str | Path) -> Path:
    """Write a program to a file, to be compared where there is another version of the model's code or of a library.

    thing: as in ``diff``.  Returns: the path.

    Raises: TypeError for what has no program; OSError.
    """
    path = Path(path)
    path.write_bytes(encode(program_of(thing), _FILE, of_code=False))
    return path


def _read(path: Path) -> Program:
    data = path.read_bytes()
    try:
        return decode(data, _FILE)
    except Exception as error:  # whatever a foreign file makes zipfile, json, torch or the parser raise
        raise TextError(
            f"{path}: no file of a program, or of one that torch {torch.__version__} lacks: {error}"
        ) from None


def _changes(a: Program, b: Program) -> list[Change]:
    old, new = _keys(a), _keys(b)
    was = {key: node for node, key in old.items()}
    now = {key: node for node, key in new.items()}
    found: list[Change] = []
    for key, node in was.items():
        if key not in now and node.op == "call_function":
            found.append(_change("removed", a, node))
    for key, node in now.items():
        before = was.get(key)
        if node.op == "placeholder":
            continue
        if before is None:
            found.append(_change("added", b, node))
        elif _said(node, new) != _said(before, old):
            found.append(_change("rewired", b, node, _call(before)))
    return found


def _keys(program: Program) -> dict[fx.Node, Key]:
    """Where each node comes from: equal in two programs for nodes that are the same."""
    counts: Counter[tuple[str, str]] = Counter()
    keys: dict[fx.Node, Key] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            where, what = "", str(binding_of(node))
        elif node.op == "output":
            where, what = "", "return"
        else:
            where, what = _address(program, node) or origin_of(node).user, target_name(node.target)
        keys[node] = (where, what, counts[where, what])
        counts[where, what] += 1
    return keys


def _said(node: fx.Node, keys: Mapping[fx.Node, Key]) -> tuple[str, str]:
    """The arguments, with nodes by where they come from, and the type."""

    def show(value: Any) -> Any:
        return fx.map_arg(value, lambda n: repr(keys[n]))

    return argument_text((show(node.args), show(dict(node.kwargs)))), spec_text(node.meta.get("spec"))


def _change(kind: Kind, program: Program, node: fx.Node, before: str = "") -> Change:
    origin = origin_of(node)
    line = origin.user or origin.line
    return Change(kind, _address(program, node), _call(node), spec_text(node.meta.get("spec")), line, before)


def _call(node: fx.Node) -> str:
    arguments = [argument_text(a) for a in node.args] + [f"{k}={argument_text(v)}" for k, v in node.kwargs.items()]
    if node.op == "output":
        return f"return {', '.join(arguments)}"
    return f"{node.name} = {target_name(node.target)}({', '.join(arguments)})"


def _address(program: Program, node: fx.Node) -> str:
    call = origin_of(node).call
    return str(program.book.address(program.book.calls[call])) if 0 <= call < len(program.book.calls) else ""


def _signed(number: int) -> str:
    return f"{number:+,}"
