"""Numbers that vary, for a compiler: tensors without dimensions, of which the compiled code takes the number.

    h[:, number_0] *= number_1    →    select(h, 1, item(number_0)).mul_(item(number_1))

So steering with another strength or at another position runs what is compiled already. A number that a compiler must
see, such as the bounds of a slice, is written into the program, which is compiled for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxsight.artifacts import Artifacts
from fxsight.compiled import Lowered, by_regions
from fxsight.editor import copy_graph
from fxsight.node import binding_of
from fxsight.program import Program
from fxsight.regions import Region, cut, whole
from fxsight.spec import SizeSpec, TensorSpec

KEPT = 64  # compiled programs for numbers that a compiler must see
_DTYPES = {int: torch.int64, float: torch.float64}
_ITEM = torch.ops.aten._local_scalar_dense.default
_GET, _SET = torch.Tensor.__getitem__, torch.Tensor.__setitem__


def compile_for(
    program: Program, arguments: Sequence[Any], fixed: Mapping[str, int], artifacts: Artifacts, is_whole: bool = False
) -> Lowered:
    """The program compiled, for the sizes and numbers of these arguments at least.

    fixed: sizes that it holds for alone.  is_whole: in one piece, not by regions.

    Raises: InputError where a size depends on numbers; NotReady where the artifacts may not be made.
    """

    def compile_it(each: Program, given: Sequence[Any]) -> Lowered:
        return by_regions(each, given, fixed, artifacts, _one if is_whole else cut)

    if not number_places(program):
        return compile_it(program, arguments)
    made = Varying(program, compile_it)
    made.find(arguments)
    return made


def _one(program: Program) -> Sequence[Region]:
    return [whole(program)]


def number_places(program: Program) -> tuple[int, ...]:
    """Which placeholders of a program are numbers that vary."""
    places = [n for n in program.graph.nodes if n.op == "placeholder"]
    return tuple(
        i for i, n in enumerate(places) if isinstance(n.meta["spec"], SizeSpec) and binding_of(n).kind == "constant"
    )


class Varying:
    """A program with numbers, compiled.

    compile_it: compiles a program, for one run's placeholders.
    """

    def __init__(self, program: Program, compile_it: Callable[[Program, Sequence[Any]], Lowered]) -> None:
        self._program, self._compile = program, compile_it
        self._places = number_places(program)
        self._seen = frozenset(seen(program))
        self._made: dict[tuple[str, ...], Lowered] = {}

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        """The results; compiled at the first call, and for each number that a compiler must see."""
        given = self._given(arguments)
        lowered = self._made.get(self._key(arguments))
        return (self._find(arguments, given) if lowered is None else lowered)(*given)

    @property
    def seen(self) -> frozenset[int]:
        """The placeholders whose numbers what is compiled has written into it."""
        return self._seen

    def find(self, arguments: Sequence[Any]) -> Lowered:
        """What takes the numbers of these arguments as tensors: compiled now, if nothing does.

        Raises: InputError where a size depends on numbers.
        """
        return self._made.get(self._key(arguments)) or self._find(arguments, self._given(arguments))

    def _given(self, arguments: Sequence[Any]) -> list[Any]:
        given = list(arguments)
        for i in self._places:
            given[i] = torch.tensor(arguments[i], dtype=_DTYPES[type(arguments[i])], device="cpu")
        return given

    def _key(self, arguments: Sequence[Any]) -> tuple[str, ...]:
        return tuple(repr(arguments[i]) for i in self._places if i in self._seen)

    def _find(self, arguments: Sequence[Any], given: Sequence[Any]) -> Lowered:
        """Compiled now; with more of its numbers written into it where torch refuses fewer.

        Raises: InputError where a size depends on numbers.
        """
        numbers = {i: arguments[i] for i in self._places}
        whole = {i for i, number in numbers.items() if type(number) is int}
        for more in (self._seen, self._seen | whole):
            if len(more) < len(numbers):
                try:
                    return self._keep(more, arguments, self._compile(with_tensors(self._program, numbers, more), given))
                except Exception:  # whatever torch and Inductor raise where they need a number
                    continue
        more = frozenset(numbers)
        return self._keep(more, arguments, self._compile(with_tensors(self._program, numbers, more), given))

    def _keep(self, known: frozenset[int], arguments: Sequence[Any], lowered: Lowered) -> Lowered:
        if known != self._seen or len(self._made) >= KEPT:
            self._seen = known
            self._made.clear()
        self._made[self._key(arguments)] = lowered
        return lowered


def seen(program: Program) -> Iterator[int]:
    """The numbers that a compiler must see: in a slice, and beside a tensor or list of an index."""
    places = [n for n in program.graph.nodes if n.op == "placeholder"]
    for i in number_places(program):
        node = places[i]
        if any(user.target in (_GET, _SET) and not _is_plain_index(user, node) for user in node.users):
            yield i


def _is_plain_index(user: fx.Node, number: fx.Node) -> bool:
    """Whether a number is an index by itself, beside slices and other numbers; or no part of the index."""
    inside: list[fx.Node] = []
    fx.map_arg(user.args[1], inside.append)
    return number not in inside or all(x is number or _is_basic(x, number) for x in _elements(user))


def _is_basic(part: Any, number: fx.Node) -> bool:
    if isinstance(part, slice):
        return number not in (part.start, part.stop, part.step)
    is_number = isinstance(part, fx.Node) and isinstance(part.meta["spec"], SizeSpec)
    return is_number or isinstance(part, (int, type(None), type(...)))


def _elements(node: fx.Node) -> tuple[Any, ...]:
    index: Any = node.args[1]
    return index if isinstance(index, tuple) else (index,)


def with_tensors(program: Program, numbers: Mapping[int, int | float], known: frozenset[int]) -> Program:
    """The program whose numbers are tensors; ``known`` ones are written into it."""
    graph = copy_graph(program.graph)
    places = [n for n in graph.nodes if n.op == "placeholder"]
    for i, number in numbers.items():
        for user in list(places[i].users):
            _write(graph, user, places[i], number if i in known else None)
        places[i].meta = {**places[i].meta, "spec": TensorSpec(_DTYPES[type(number)], (), ())}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in (_GET, _SET) and any(map(_is_item, _elements(node))):
            _select(graph, node)
    return replace(program, graph=graph)


def _write(graph: fx.Graph, user: fx.Node, place: fx.Node, number: int | float | None) -> None:
    """Let an operator have a number, or what a tensor has for it."""
    given: Any = number
    if number is None:
        with graph.inserting_before(user):
            given = graph.call_function(_ITEM, (place,))
        given.meta = {"spec": None, "origin": user.meta["origin"]}
    user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: given if n is place else n)


def _is_item(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is _ITEM


def _select(graph: fx.Graph, node: fx.Node) -> None:
    """Numbers of an index are selected one by one, after all else that it asks for."""
    index, base = _elements(node), node.args[0]
    others = tuple(slice(None) if _is_item(x) else x for x in index)
    with graph.inserting_before(node):
        view: Any = base
        if any(x != slice(None) for x in others):
            view = _call(graph, node, _GET, (view, others))
        for number, dim in _dims(index):
            view = _call(graph, node, torch.ops.aten.select.int, (view, dim, number))
    if node.target is _SET:
        arguments: Any = (view, (...,), *node.args[2:])
        node.args = arguments
        return
    view.meta = dict(node.meta)
    node.replace_all_uses_with(view)
    graph.erase_node(node)


def _call(graph: fx.Graph, like: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    made = graph.call_function(target, args)
    made.meta = {"spec": None, "origin": like.meta["origin"]}
    return made


def _dims(index: Sequence[Any]) -> list[tuple[Any, int]]:
    """The numbers of an index and their dimensions, in an order in which selecting one does not move the next."""
    middle = next((i for i, x in enumerate(index) if x is ...), len(index))
    before, after = index[:middle], index[middle + 1 :]
    first = [(x, _taken(before[:i])) for i, x in enumerate(before) if _is_item(x)]
    last = [(x, -1 - _taken(after[i + 1 :])) for i, x in enumerate(after) if _is_item(x)]
    return [*first[::-1], *last]


def _taken(index: Sequence[Any]) -> int:
    """How many dimensions what stands in an index leaves."""
    return sum(type(x) is not int for x in index)
