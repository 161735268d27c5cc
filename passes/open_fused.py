"""``OpenFused``: one fused operator, at one place, as the plain operators it is made of.

The operator's own formula (``reference``), or torch's decomposition where we have written none, is traced on shapes
with the sizes of the program (``decompose``); the nodes come in the place of the operator's, and the calls of the
formula join the address book below the opened one (``splice``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from fxsight.address import Address
from fxsight.book import Call
from fxsight.decompose import PLAIN, Recipe, decompose
from fxsight.editor import Editor
from fxsight.errors import NotExecuted, UnknownAddress
from fxsight.node import origin_of
from fxsight.place import Place, Places
from fxsight.program import Program
from fxsight.rewrite import Pass
from fxsight.source import SourceReader
from fxsight.splice import Splice
from fxsight.targets import target_name


@dataclass(frozen=True)
class OpenFused(Pass):
    """Write one fused operator out as plain ones; all others of its kind stay fused.

        sdpa = aten.scaled_dot_product_attention.default(q, k, v)    # f32[2, 4, length, 8]  attn/sdpa_0
    becomes
        transpose = aten.transpose.int(k, -2, -1)         # f32[2, 4, 8, length]       attn/sdpa_0/key_transpose_0
        matmul = aten.matmul.default(q, transpose)        # f32[2, 4, length, length]  attn/sdpa_0/torch_matmul_0
        mul = aten.mul.Tensor(matmul, 0.35)               # f32[2, 4, length, length]  attn/sdpa_0/operator_mul_0
        softmax = aten.softmax.int(mul, -1)               # f32[2, 4, length, length]  attn/sdpa_0/softmax_0/…
        matmul_1 = aten.matmul.default(softmax, v)        # f32[2, 4, length, 8]       attn/sdpa_0/torch_matmul_1
        sdpa = aten.alias.default(matmul_1)               # f32[2, 4, length, 8]       attn/sdpa_0

    at: a torch call of the model that makes one operator, or that operator's own node.

    The value keeps its node's name and its memory layout, so all around it stays as it is. Safe: the same formula; a
    fused kernel adds up in another order, so results agree to rounding, not to the bit. Opening again changes nothing.

    Raises: UnknownAddress when there is no such place, or nothing inside that could be shown.
    """

    at: Address

    @property
    def label(self) -> str:
        """With the address as it is written."""
        return f"OpenFused(at={self.at})"

    def rewrite(self, editor: Editor) -> None:
        """Find the operator, trace what it is made of, put that in its place."""
        program = editor.program
        found = _operator(Places(program, SourceReader()), self.at.place)
        if found is None:
            return
        node, call = found
        try:
            parts = decompose(Recipe.of(node, program.sizes, program.guards))
        except UnknownAddress as error:
            raise UnknownAddress(f"{self.at.place}: {error}") from error.__cause__
        Splice(editor, editor.nodes[node.name], call, parts).splice()


def open_place(program: Program, at: Address, reader: SourceReader) -> Program:
    """The program in which the operations inside ``at`` have addresses; itself when they have already.

    Raises: UnknownAddress, NotExecuted.
    """
    call = program.book.find(at.place)
    return program if call is not None and call.body is not None else OpenFused(at.place)(program)


Opens = Callable[[Program, Address, SourceReader], Program]


def open_above(program: Program, at: Address, reader: SourceReader, opens: Opens = open_place) -> Program:
    """The program in which ``at`` names a place: fused operators on the way down to it are opened.

    opens: ``open_place``, or what remembers what that has returned.

    Raises: UnknownAddress, NotExecuted: when it names none even then.
    """
    opened = program
    while (error := _missing(opened, at, reader)) is not None:
        above = at.place
        while above.steps and _missing(opened, above, reader) is not None:
            above = above.parent
        if _missing(opened, above, reader) is not None or not _is_torch(Places(opened, reader).find(above)):
            raise error
        deeper = opens(opened, above, reader)
        if deeper is opened:
            raise error
        opened = deeper
    return opened


def _is_torch(place: Place) -> bool:
    """Whether there can be a fused operator."""
    return place.call is None or place.call.kind == "torch"


def _missing(program: Program, at: Address, reader: SourceReader) -> UnknownAddress | NotExecuted | None:
    try:
        Places(program, reader).find(at.place)
    except (UnknownAddress, NotExecuted) as error:
        return error
    return None


def _operator(places: Places, at: Address) -> tuple[fx.Node, Call] | None:
    """The node to open, and the call whose body its parts will be: the one it is all of, or one of its own.

    None when it is open.
    """
    place, program = places.find(at), places.program
    if places.inside(place) is not None:
        return None
    if place.call is None:
        node = program.nodes[place.key.removeprefix("%")]
        made_in = program.book.calls[origin_of(node).call]
        is_all = made_in.kind == "torch" and _operators(program, made_in) == [node]
        return node, made_in if is_all else _own_call(places, node, made_in)
    if place.call.kind != "torch":
        kind = place.call.kind
        raise UnknownAddress(f"{place.address}: a {kind} is open already: what it calls has addresses of its own")
    found = _operators(program, place.call)
    if len(found) != 1:
        raise _not_one(places, place, {f"%{n.name}" for n in found})
    return found[0], place.call


def _own_call(places: Places, node: fx.Node, made_in: Call) -> Call:
    """A call for an operator that is one of several of another call, under the operator's name there."""
    name, place = next((n, p) for n, p in places.node_places(made_in).items() if p.key == f"%{node.name}")
    number, title, line = len(places.program.book.calls), target_name(node.target), origin_of(node).line
    path, times = (made_in.module, made_in.module_call), (place.start, place.end)
    return Call(number, made_in.id, "torch", name, 0, *path, title, line, None, place.inputs, place.output, *times)


def _operators(program: Program, call: Call) -> list[fx.Node]:
    """The operators that one call makes."""
    made = (n for n in program.graph.nodes if n.op == "call_function" and origin_of(n).call == call.id)
    return [n for n in made if n.target not in PLAIN]


def _not_one(places: Places, place: Place, keys: set[str]) -> UnknownAddress:
    if not keys or place.call is None:
        return UnknownAddress(f"{place.address}: it calls no operator that could be opened: its value was there before")
    names = [name for name, found in places.node_places(place.call).items() if found.key in keys]
    listed = ", ".join(str(place.address.step(name)) for name in names)
    return UnknownAddress(f"{place.address}: it makes {len(keys)} operators; open one of {listed}")
