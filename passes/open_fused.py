"""``OpenFused``: one fused operator, at one place, as the plain operators it is made of.

The operator's own formula (``reference``), or torch's decomposition where we have written none, is traced on shapes
with the sizes of the program; the nodes come in the place of the operator's, and the calls of the formula join the
address book below the opened one.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from types import CodeType
from typing import Any

import sympy
import torch
from functorch import make_fx  # type: ignore[import-untyped]
from torch import fx, nn

from fxsight import _torch, reference
from fxsight.address import Address
from fxsight.book import Call, Leaf, Opaque, Ref, SizeRef, Structure, Weight
from fxsight.editor import Editor
from fxsight.effects import mutated_arguments
from fxsight.errors import NotExecuted, UnknownAddress
from fxsight.node import Origin, binding_of, origin_of, spec_of_node, tensor_spec
from fxsight.place import Place, Places
from fxsight.program import Program
from fxsight.provenance import TAG, OpenCall, Scribe
from fxsight.rewrite import Pass
from fxsight.source import SourceReader
from fxsight.spec import Dim, SizeSpec, Spec, TensorSpec, contiguous_stride, parse_dims, spec_of, symbol
from fxsight.targets import target_name
from fxsight.tree import flatten

aten = torch.ops.aten
_PLAIN = (operator.getitem, aten.alias.default, aten.detach.default, aten.sym_size.int)


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
        places = Places(editor.program, SourceReader())
        found = _operator(places, places.find(self.at.place), self.label)
        if found is None:
            return
        try:
            parts = _parts(_Recipe.of(found[0]))
        except UnknownAddress as error:
            raise UnknownAddress(f"{self.at.place}: {error}") from error.__cause__
        _Splice(editor, editor.nodes[found[0].name], found[1], parts).splice()


def open_place(program: Program, at: Address, reader: SourceReader) -> Program:
    """The program in which the operations inside ``at`` have addresses; itself when they have already.

    Raises: UnknownAddress, NotExecuted.
    """
    call = program.book.find(at.place)
    return program if call is not None and call.body is not None else OpenFused(at.place)(program)


def open_above(program: Program, at: Address, reader: SourceReader) -> Program:
    """The program in which ``at`` names a place: fused operators on the way down to it are opened.

    Raises: UnknownAddress, NotExecuted: when it names none even then.
    """
    opened = program
    while (error := _missing(opened, at, reader)) is not None:
        above = at.place
        while above.steps and _missing(opened, above, reader) is not None:
            above = above.parent
        try:
            deeper = open_place(opened, above, reader)
        except UnknownAddress:
            raise error from None
        if deeper is opened:
            raise error
        opened = deeper
    return opened


def _missing(program: Program, at: Address, reader: SourceReader) -> UnknownAddress | NotExecuted | None:
    try:
        Places(program, reader).find(at.place)
    except (UnknownAddress, NotExecuted) as error:
        return error
    return None


# -- which operator --------------------------------------------------------------------------------------------------


def _operator(places: Places, place: Place, label: str) -> tuple[fx.Node, Call | None] | None:
    """The node to open and the call it is all of (None when the call makes others, too); None when it is open."""
    program, call = places.program, place.call
    if call is None:
        node = program.nodes[place.key.removeprefix("%")]
        return node, next((c for c in program.book.calls if _is_all_of(program, node, c)), None)
    if call.kind != "torch":
        raise UnknownAddress(f"{place.address}: a {call.kind} is open already: what it calls has addresses of its own")
    found = _operators(program, call)
    if call.body is not None or any(origin_of(n).made_by == label for n in found):
        return None
    if len(found) != 1:
        raise _not_one(places, place, {f"%{n.name}" for n in found})
    return found[0], call


def _is_all_of(program: Program, node: fx.Node, call: Call) -> bool:
    made_here = call.id == origin_of(node).call and call.kind == "torch" and call.body is None
    return made_here and _operators(program, call) == [node]


def _operators(program: Program, call: Call) -> list[fx.Node]:
    """The operators that one call makes."""
    made = (n for n in program.graph.nodes if n.op == "call_function" and origin_of(n).call == call.id)
    return [n for n in made if n.target not in _PLAIN]


def _not_one(places: Places, place: Place, keys: set[str]) -> UnknownAddress:
    if not keys or place.call is None:
        return UnknownAddress(f"{place.address}: it calls no operator that could be opened: its value was there before")
    names = [name for name, found in places.node_places(place.call).items() if found.key in keys]
    listed = ", ".join(str(place.address.step(name)) for name in names)
    return UnknownAddress(f"{place.address}: it makes {len(keys)} operators; open one of {listed}")


# -- what it is made of ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recipe:
    """One operator without its place: places with equal recipes are made of the same parts.

    target, arguments: what is called and, as text, with what.  specs: of its inputs.  node: the call, in a graph of its
    own whose placeholders are the inputs.
    """

    target: Any
    arguments: str
    specs: tuple[Spec, ...]
    node: fx.Node = field(compare=False)

    @staticmethod
    def of(node: fx.Node) -> _Recipe:
        """The recipe of a node."""
        graph, inputs = fx.Graph(), node.all_input_nodes
        places = {n: graph.placeholder(f"input_{i}") for i, n in enumerate(inputs)}
        copy = graph.node_copy(node, places.__getitem__)
        specs = tuple(_nameless(spec_of_node(n)) for n in inputs)
        return _Recipe(node.target, repr((copy.args, copy.kwargs)), specs, copy)

    def call(self, function: Callable[..., Any], values: Sequence[Any]) -> Any:
        """Call a function as the node calls its target, with values for its inputs."""
        given = dict(zip(self.node.all_input_nodes, values, strict=True))
        args, kwargs = _plain((self.node.args, self.node.kwargs), given)
        return function(*args, **kwargs)


def _nameless(spec: Spec) -> Spec:
    return replace(spec, storage="") if isinstance(spec, TensorSpec) else spec


@dataclass(frozen=True)
class _Parts:
    """What an operator is made of.

    graph: of placeholders, one for each input, and operators.  calls: of the formula, itself first; none for torch's
    decompositions.  names: the program's sizes by those in the graph.  numbers: an example of each size, equal where
    the operator needs equal ones.  storages: the inputs', as ``spec_of`` has them.
    """

    graph: fx.Graph
    calls: tuple[OpenCall, ...]
    names: Mapping[Any, sympy.Symbol]
    numbers: Mapping[sympy.Symbol, int]
    storages: tuple[int | None, ...]


class _Watcher(Scribe):
    """Writes down the calls of a formula of ours."""

    def _is_own(self, code: CodeType) -> bool:
        return code.co_filename == reference.__file__


@functools.lru_cache(maxsize=32)
def _parts(recipe: _Recipe) -> _Parts:
    """Trace an operator on shapes: a second or so, once for all layers that are alike.

    Raises: UnknownAddress when it is not made of others.
    """
    name, formula = target_name(recipe.target), reference.REFERENCES.get(recipe.target)
    if mutated_arguments(recipe.node):
        raise UnknownAddress(f"{name} cannot be opened: it changes memory in place")
    shapes = _Shapes(recipe.specs, _numbers(recipe, formula or recipe.target))
    scribe = None if formula is None else _Watcher(_module(formula), SourceReader())
    try:
        graph = _trace(recipe, shapes, scribe)
    except Exception as error:  # whatever torch raises while it decomposes becomes one error
        raise UnknownAddress(f"{name} cannot be opened: {error}") from error
    if shapes.fixed:
        raise UnknownAddress(f"{name} cannot be opened: it is made in another way for each {', '.join(shapes.fixed)}")
    made = [n.target for n in graph.nodes if n.op not in ("placeholder", "output") and n.target not in _PLAIN]
    if len(made) < 2 or any(n.op == "get_attr" for n in graph.nodes):
        raise UnknownAddress(f"{name} cannot be opened: it is not made of other operators")
    return _Parts(graph, tuple(scribe.calls) if scribe else (), shapes.names, shapes.numbers, shapes.storages)


def _module(formula: Callable[..., Any]) -> nn.Module:
    module = nn.Module()
    module.forward = formula
    return module


def _trace(recipe: _Recipe, shapes: _Shapes, scribe: Scribe | None) -> fx.Graph:
    def call(*values: Any) -> Any:
        with nullcontext() if scribe is None else scribe.watching():
            return recipe.call(recipe.target if scribe is None else scribe.root, values)

    known: Mapping[Any, Any] = torch.export.default_decompositions() if scribe is None else {}
    table = {recipe.target: known[recipe.target]} if recipe.target in known else {}
    with torch.no_grad(), _torch.honest_sizes():
        traced = make_fx(call, table, tracing_mode="symbolic", pre_dispatch=scribe is not None)(*shapes.values)
    graph: fx.Graph = traced.graph
    graph.eliminate_dead_code(lambda n: n.op != "call_function" or not isinstance(n.meta.get("val"), torch.SymInt))
    return graph


def _plain(value: Any, given: Mapping[fx.Node, Any]) -> Any:
    """Arguments as Python's own lists and dicts, with values for nodes."""
    if isinstance(value, fx.Node):
        return given[value]
    if isinstance(value, (tuple, list)):
        members = [_plain(v, given) for v in value]
        return tuple(members) if isinstance(value, tuple) else members
    return {k: _plain(v, given) for k, v in value.items()} if isinstance(value, dict) else value


class _Shapes:
    """Values without numbers for some specs; the program's named sizes are symbols in them."""

    def __init__(self, specs: Sequence[Spec], numbers: Mapping[sympy.Symbol, int]) -> None:
        self.numbers, self._mode = numbers, _torch.symbolic_mode()
        shape = tuple(numbers.values())  # equal numbers become one symbol
        sized = _torch.symbolic(self._mode, torch.empty(shape, device="meta"), [True] * len(shape))
        self._sizes = dict(zip(numbers, sized.shape, strict=True))
        self._inner = {s: _torch.size_expr(size) for s, size in self._sizes.items()}
        self.names = {inner: s for s, inner in reversed(self._inner.items())}
        self.values = [_value(spec, self._size, self._mode) for spec in specs]
        self.storages = tuple(_torch.storage_key(v) if isinstance(v, torch.Tensor) else None for v in self.values)

    @property
    def fixed(self) -> list[str]:
        """Sizes that tracing has taken as plain numbers."""
        return [str(s) for s, size in self._sizes.items() if not _torch.size_expr(size).free_symbols]

    def _size(self, dim: Any) -> Any:
        number = _number(dim, self.numbers)
        if isinstance(dim, int) or not dim.free_symbols:
            return number
        env = self._mode.shape_env
        assert env is not None, "a symbolic mode has one"
        return env.create_symintnode(dim.xreplace(self._inner), hint=number)


def _value(spec: Spec, size: Callable[[Any], Any], mode: AbstractContextManager[Any], device: str = "") -> Any:
    """A tensor or number of some spec, with sizes made of its dimensions by ``size``."""
    if isinstance(spec, SizeSpec):
        return size(spec.expr)
    assert isinstance(spec, TensorSpec), f"an operator's input is a tensor or a size, not {spec}"
    shape, stride = [size(d) for d in spec.shape], [size(d) for d in spec.stride]
    with mode:
        return torch.empty_strided(shape, stride, dtype=spec.dtype, device=device or spec.device)


def _number(dim: Any, numbers: Mapping[sympy.Symbol, int]) -> int:
    return dim if isinstance(dim, int) else int(dim.xreplace(numbers))


def _numbers(recipe: _Recipe, function: Callable[..., Any]) -> Mapping[sympy.Symbol, int]:
    """A prime for each size: all different, except where the operator works with equal ones only.

    A program has a name for each size of its inputs, also where the model needs two of them to be equal.
    """
    named = {s.name: s for spec in recipe.specs for dim in _dims(spec) for s in dim.free_symbols}
    symbols = [named[name] for name in sorted(named)]

    def works(numbers: Mapping[sympy.Symbol, int]) -> bool:
        try:
            values = [_value(s, lambda d: _number(d, numbers), nullcontext(), "meta") for s in recipe.specs]
            with torch.no_grad():
                recipe.call(function, values)
        except Exception:  # whatever torch raises for sizes that do not fit
            return False
        return True

    numbers = dict(zip(symbols, _PRIMES, strict=False))
    if works(numbers):
        return numbers
    for symbol_, prime in zip(symbols, _PRIMES, strict=False):
        if numbers[symbol_] == prime:  # not yet among the equals of another
            numbers.update(dict.fromkeys(_equals(symbol_, symbols, works), prime))
    return numbers


def _equals(first: sympy.Symbol, symbols: list[sympy.Symbol], works: Works) -> tuple[sympy.Symbol, ...]:
    """The fewest sizes that have to be equal to ``first``.

    Raises: UnknownAddress when sizes have to fit in another way, such as one being a multiple of another.
    """
    others = [s for s in symbols if s is not first]
    for more in chain.from_iterable(combinations(others, count) for count in range(len(others) + 1)):
        equal = (first, *more)
        numbers = {s: 5 if s in equal else 7 for s in symbols}
        if works(numbers):
            if any(works({**numbers, s: 10}) for s in equal if more):
                break
            return equal
    raise UnknownAddress(f"its sizes {', '.join(map(str, symbols))} fit in a way that is not known before it runs")


Works = Callable[[Mapping[sympy.Symbol, int]], bool]
_PRIMES = tuple(sympy.primerange(5, 200))


def _dims(spec: Spec) -> Iterator[Any]:
    """The sizes in a spec that are not just numbers."""
    if isinstance(spec, SizeSpec):
        yield spec.expr
    elif isinstance(spec, TensorSpec):
        yield from (d for d in (*spec.shape, *spec.stride) if not isinstance(d, int))


# -- putting it in ---------------------------------------------------------------------------------------------------


class _Splice:
    """Puts the parts of an operator into its place.

    The node of the operator stays, as an alias of the result: it has the name that others know the value by. Times of
    what is inside are fractions between the one before the operator and its own.
    """

    def __init__(self, editor: Editor, node: fx.Node, call: Call | None, parts: _Parts) -> None:
        self.editor, self.node, self.call, self.parts = editor, node, call, parts
        self.origin = origin_of(node)
        self.inputs = tuple(node.all_input_nodes)
        pairs = [(key, n) for key, n in zip(parts.storages, self.inputs, strict=True) if key is not None]
        self.storages = {key: tensor_spec(n).storage for key, n in pairs}
        self.made: dict[fx.Node, fx.Node] = {}
        self.by_tag: dict[int, fx.Node] = {}
        clock = [self._tag(n)[0] for n in parts.graph.nodes] + [c.end for c in parts.calls]
        self._ticks = max(*clock, len(parts.graph.nodes)) + 4  # the last ones for the layout of the result
        self._begin = self._time_before()

    def splice(self) -> None:
        """Nodes, result, calls."""
        places = [n for n in self.parts.graph.nodes if n.op == "placeholder"]
        for place, node in zip(places, self.inputs, strict=True):
            self._known(place, node)
        for number, node in enumerate(n for n in self.parts.graph.nodes if n.op == "call_function"):
            self._copy(node, number + 1)
        returned = _plain(self.parts.graph.output_node().args[0], self.made)
        self._return([r if isinstance(r, fx.Node) else None for r in flatten(returned)[0]])
        if self.call is not None and self.parts.calls:
            self._extend_book(self.call)
        self.editor.touched = True

    # -- times -------------------------------------------------------------------------------------------------------

    def _time_before(self) -> float:
        """The last thing on the clock before the operator, at most half a tick away."""
        program, now = self.editor.program, self.origin.time
        times: list[float] = [origin_of(n).time for n in program.graph.nodes]
        times += [t for c in program.book.calls for t in (c.start, c.end)]
        return max((t for t in times if now - 0.5 < t < now), default=now - 0.5)

    def _time(self, tick: float) -> float:
        return self._begin + (self.origin.time - self._begin) * tick / self._ticks

    def _tag(self, node: fx.Node) -> tuple[int, int]:
        """When and in which call of the formula a node was made."""
        time, call = (node.meta.get("custom") or {}).get(TAG, (0, -1))
        return int(time), int(call)

    # -- nodes -------------------------------------------------------------------------------------------------------

    def _known(self, inner: fx.Node, outer: fx.Node) -> None:
        self.made[inner] = outer
        self.by_tag[self._tag(inner)[0]] = outer

    def _copy(self, node: fx.Node, number: int) -> None:
        tick, call = self._tag(node) if self.parts.calls else (number, 0)
        if node.target is aten.alias.default and call == 0:  # the border of the formula
            return self._known(node, self.made[node.all_input_nodes[0]])
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.made.__getitem__)
        new = self._add(node.target, args, kwargs, node.name, tick, call)
        new.meta["spec"] = spec_of(node.meta.get("val"), self.parts.names, self.storages, new.name)
        self._known(node, new)

    def _add(self, target: Any, args: Any, kwargs: Any, name: str, tick: float, call: int = 0) -> fx.Node:
        line = self.parts.calls[call].line if call > 0 else self.origin.line
        origin = Origin(self._call_id(call), self._time(tick), line, self.origin.user)
        return self.editor.call(target, tuple(args), kwargs, spec=None, name=name, before=self.node, origin=origin)

    def _call_id(self, call: int) -> int:
        inner = call > 0 and self.call is not None
        return len(self.editor.program.book.calls) + call - 1 if inner else self.origin.call

    # -- the result --------------------------------------------------------------------------------------------------

    def _return(self, results: list[fx.Node | None]) -> None:
        """The operator's node, or the members taken out of its result, become aliases of what was computed."""
        if isinstance(spec_of_node(self.node), TensorSpec):
            return self._become(self.node, results[0])
        for user in list(self.node.users):
            assert user.target is operator.getitem, f"{user.name} uses a tuple as a whole"
            self._become(user, results[int(user.args[1])])  # type: ignore[arg-type]
        self.editor.erase(self.node)

    def _become(self, node: fx.Node, result: fx.Node | None) -> None:
        """Let a node be an alias of the result, in the layout that its users were captured with."""
        assert result is not None, "what is used of an operator's result is a tensor"
        old, new = tensor_spec(node), tensor_spec(result)
        order = None if self._numbers(new.stride) == self._numbers(old.stride) else self._layout(old)
        if order is None:
            node.target, node.args, node.kwargs = aten.alias.default, (result,), {}
        else:
            result = self._laid_out(result, new, order)
            back = [order.index(i) for i in range(len(order))]
            node.target, node.args, node.kwargs = aten.permute.default, (result, back), {}
        node.meta["origin"] = replace(self.origin, made_by=self.editor.made_by)
        if old.storage.partition("[")[0] in (node.name, self.node.name):  # memory of its own: now the result's
            _rename_storage(self.editor.graph, old.storage, tensor_spec(result).storage)

    def _laid_out(self, result: fx.Node, spec: TensorSpec, order: list[int]) -> fx.Node:
        """A copy of the result whose dimensions are in the given order, contiguous."""
        shape, stride = tuple(spec.shape[i] for i in order), tuple(spec.stride[i] for i in order)
        turned = self._add(aten.permute.default, (result, order), {}, "permute", self._ticks - 3)
        turned.meta["spec"] = replace(spec, shape=shape, stride=stride)
        kwargs = {"memory_format": torch.contiguous_format}
        copy = self._add(aten.clone.default, (turned,), kwargs, "clone", self._ticks - 2)
        copy.meta["spec"] = replace(spec, shape=shape, stride=contiguous_stride(shape), storage=copy.name)
        return copy

    def _layout(self, spec: TensorSpec) -> list[int] | None:
        """The dimensions from the outermost in memory to the innermost; None when the memory has holes or overlaps."""
        shape, stride = self._numbers(spec.shape), self._numbers(spec.stride)
        order = sorted(range(len(shape)), key=lambda i: (stride[i], shape[i] > 1), reverse=True)
        dense = contiguous_stride([shape[i] for i in order])
        fits = all(shape[i] == 1 or stride[i] == step for i, step in zip(order, dense, strict=True))
        return order if fits else None

    def _numbers(self, dims: Sequence[Dim]) -> tuple[int, ...]:
        return tuple(_number(d, self.parts.numbers) for d in dims)

    # -- the book ----------------------------------------------------------------------------------------------------

    def _extend_book(self, call: Call) -> None:
        book = self.editor.program.book
        formula, *inner = [c.close() for c in self.parts.calls]
        opened = replace(call, body=formula.body, ran=formula.ran)
        self.editor.changes["book"] = book.extended(tuple(self._moved(c, call) for c in inner), {call.id: opened})

    def _moved(self, inner: Call, outer: Call) -> Call:
        changes: dict[str, Any] = {
            "id": self._call_id(inner.id),
            "parent": outer.id if inner.parent in (None, 0) else self._call_id(inner.parent),
            "module": outer.module,
            "module_call": outer.module_call,
            "start": self._time(inner.start),
            "end": self._time(inner.end),
            "inputs": self._structure(inner.inputs),
            "output": self._structure(inner.output),
        }
        return replace(inner, **changes)

    def _structure(self, structure: Structure) -> Structure:
        return replace(structure, leaves=tuple(map(self._leaf, structure.leaves)))

    def _leaf(self, leaf: Leaf) -> Leaf:
        if isinstance(leaf, SizeRef):
            renamed = {symbol(str(inner)): name for inner, name in self.parts.names.items()}
            expr = parse_dims(leaf.expr)[0]
            return SizeRef(str(expr if isinstance(expr, int) else expr.xreplace(renamed)))
        if not isinstance(leaf, Ref):
            return leaf
        node = self.by_tag.get(int(leaf.node))
        if node is None:
            return Opaque("unused tensor")
        is_weight = node.op == "placeholder" and binding_of(node).kind == "weight"
        return Weight(str(binding_of(node).key)) if is_weight else Ref(node.name)


def _rename_storage(graph: fx.Graph, old: str, new: str) -> None:
    """What shared the memory of the operator's result shares that of the new one."""
    for node in graph.nodes:
        if "spec" in node.meta:
            node.meta["spec"] = _renamed(node.meta["spec"], old, new)


def _renamed(spec: Spec, old: str, new: str) -> Spec:
    if isinstance(spec, tuple):
        return tuple(_renamed(part, old, new) for part in spec)
    return replace(spec, storage=new) if isinstance(spec, TensorSpec) and spec.storage == old else spec
