"""``edited.fold_edits(x)``: edits put into the weights, where that is exact: a plain module that computes the same.

An edit can be folded when what it writes to a value is an affine function of what was there, the same for every row,
``h + v``, ``h * s``, ``h - (h @ d)[..., None] * d``, ``h[..., 8:16] = 0``, and the value is one of these:

    the input of a linear layer        x' = A x + c     gives    W' = W A,  b' = b + W c
    what weights make: see fold_sum    y' = A y + c     gives    W' = A W,  b' = A b + c, in each weight that makes it

Whether it is affine is seen from its operations, which may be sums, products with constants and choices of columns
alone; then it is a polynomial, and what it is can be read off the results for a few inputs. Everything else is refused.
"""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxsight.captures import Captures
from fxsight.edit import Edit
from fxsight.edits import Edits, PlainTrace
from fxsight.errors import FoldError
from fxsight.fold_sum import Affine, Into, Made, Refused, double, write
from fxsight.intervention import Write
from fxsight.mutate import mutate
from fxsight.node import spec_of_node
from fxsight.pipeline import sources_pipeline
from fxsight.program import Program
from fxsight.rows import Call
from fxsight.run import Weights
from fxsight.spec import TensorSpec
from fxsight.targets import mutate_functions, target_name

_SUMS = ("add", "sub", "mul", "div", "truediv", "radd", "rsub", "rmul", "neg", "matmul", "mv", "mm", "dot", "bmm")
_SHAPES = ("getitem", "setitem", "unsqueeze", "squeeze", "sum", "mean", "iadd", "isub", "imul", "idiv", "itruediv")
_OTHERS = ("T", "full_like", "zeros_like", "ones_like", "expand_as", "contiguous", "clone", "detach", "to", "linear")
_AFFINE = frozenset((*_SUMS, *_SHAPES, *_OTHERS, "zero", "fill", "copy", "outer", "einsum", "t", "transpose"))
_KEYED = ("getitem", "setitem")
_LEAD = (2, 3)  # rows of the inputs on which an edit is tried


@dataclass(frozen=True)
class Part:
    """One write of an edit that is about one place alone.

    nodes: the nodes of the edit that make the written value, in order.
    """

    edit: Edit
    write: Write
    nodes: tuple[fx.Node, ...]

    def refuse(self, why: object) -> FoldError:
        """The error that says why it cannot be folded."""
        written = dict.fromkeys(str(w.location.address) for w in self.edit.asked.writes)
        which = f", of {self.write.location.address}," if len(written) > 1 else ""
        return FoldError(f"{self.edit.title}{which} cannot be folded into weights: {why}")


def fold_into_weights(captures: Captures, edits: Edits, call: Call) -> nn.Module:
    """A copy of the module in whose weights the edits are.

    call: an example, for which the program is looked at.

    Raises: FoldError, saying which edit cannot be folded, and why.
    """
    module = captures.module
    folded = copy.deepcopy(module)
    parts = [part for edit in edits for part in _parts(edit)]
    trace, bare = PlainTrace(captures, call, "eager", edits=edits), PlainTrace(captures, call, "eager")
    program, plain = (sources_pipeline(each.say())(each.captured) for each in (trace, bare))
    base = trace.base
    values: dict[str, list[Part]] = {}
    for part in parts:
        layer = folded.get_submodule(part.write.location.address.module)
        if _is_input(part.write) and is_linear(layer):
            _check_shared(part, folded, layer)
            _into_input(part, layer, affine_of(part, module, sizes_of(layer)[1]))
        else:
            values.setdefault(_value(part, trace, base), []).append(part)
    maps = {name: _composed(parts, module, base, name) for name, parts in values.items()}
    made = Made(program, plain, base, folded, maps)
    for into in [into for name, parts in values.items() for into in _plan(made, name, parts)]:
        into.put(folded)
    return folded


def _composed(parts: Sequence[Part], module: nn.Module, base: Program, name: str) -> Affine:
    """What all parts that are about one node make of its rows, one after the other."""
    maps = [affine_of(part, module, _features(part, base, name)) for part in parts]
    return functools.reduce(Affine.then, maps)


def _plan(made: Made, name: str, parts: Sequence[Part]) -> list[Into]:
    try:
        return made.plan(name)
    except Refused as refused:
        raise parts[-1].refuse(refused) from None


# -- what can be folded ----------------------------------------------------------------------------------------------


def _parts(edit: Edit) -> Iterator[Part]:
    """The writes of an edit, each with what makes its value.

    Raises: FoldError where one is about several places, or the edit does more than write.
    """
    asked = edit.asked
    table = {node.name: node for node in asked.graph.nodes}
    reads = {read.name: read.location.address for read in asked.reads}
    for each in asked.writes:
        wanted = _above(table[each.value])
        part = Part(edit, each, tuple(node for node in asked.graph.nodes if node in wanted))
        places = dict.fromkeys([each.location.address, *(reads[n.name] for n in part.nodes if n.name in reads)])
        if len(places) > 1:
            raise part.refuse(f"it is about several places ({', '.join(map(str, places))})")
        if edit.skipped:
            raise part.refuse("it skips a module")
        if edit.looked:
            raise part.refuse("it has looked at a shape")
        yield part


def _above(node: fx.Node) -> set[fx.Node]:
    """A node and all that it is made of."""
    found, left = {node}, [node]
    while left:
        new = [each for each in left.pop().all_input_nodes if each not in found]
        found.update(new)
        left += new
    return found


def _is_input(write: Write) -> bool:
    address = write.location.address
    return address.port == "input" and not (address.steps or address.keys or address.call)


def _value(part: Part, trace: PlainTrace, base: Program) -> str:
    """The name of the node that an edit is about, without the borders of modules around it."""
    address = part.write.location.address
    name = next(w.location.node for w in trace.asked.writes if w.location.address == address)
    node = base.nodes.get(name)
    while node is not None and target_name(node.target) == "aten.alias.default":
        node = node.args[0] if isinstance(node.args[0], fx.Node) else None
    if node is None:
        raise part.refuse("it is inside a fused operator")
    return node.name


def _features(part: Part, base: Program, name: str) -> int:
    spec = spec_of_node(base.nodes[name])
    size = spec.shape[-1] if isinstance(spec, TensorSpec) and spec.shape else None
    if not isinstance(size, int):
        raise part.refuse("its value has no last dimension of one size")
    return size


def is_linear(layer: nn.Module) -> bool:
    """Whether it is a linear layer: torch's, or the ``Conv1D`` of transformers."""
    return type(layer) is nn.Linear or type(layer).__name__ == "Conv1D"


def _check_shared(part: Part, folded: nn.Module, layer: nn.Module) -> None:
    weight = layer.get_parameter("weight")
    shared = [name for name, p in folded.named_parameters(remove_duplicate=False) if p is weight]
    if len(shared) > 1:
        raise part.refuse(f"its weight is that of {' and of '.join(shared)}: the others would change, too")


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """Features of the output and of the input."""
    rows, columns = layer.get_parameter("weight").shape
    return (rows, columns) if type(layer) is nn.Linear else (columns, rows)


def affine_of(part: Part, module: nn.Module, features: int) -> Affine:
    """What the edit makes of a row.

    Raises: FoldError when it is not the same affine function of each row.
    """
    for node in part.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            _check_operation(part, node)
    lead = _LEAD
    zero = torch.zeros(*lead, features, dtype=torch.float64)
    try:
        offset = _run(part, module, zero)[0, 0]
        basis = torch.eye(features, dtype=torch.float64).expand(*lead[:1], features, features)
        matrix = _run(part, module, basis.contiguous())[0] - offset
        for seed in range(3):
            dice = torch.Generator().manual_seed(seed)
            h = torch.randn(*lead, features, generator=dice, dtype=torch.float64)
            torch.testing.assert_close(_run(part, module, h), h @ matrix + offset, rtol=1e-9, atol=1e-9)
    except (RuntimeError, IndexError, TypeError) as error:
        raise part.refuse(f"it holds for some sizes only ({error})") from error
    except AssertionError:
        raise part.refuse("what it writes is not the same affine function of every row") from None
    return Affine(matrix, offset)


def _check_operation(part: Part, node: fx.Node) -> None:
    names = mutate_functions(node.args) if node.target is mutate else [target_name(node.target)]
    if node.target is getattr:
        names = [str(node.args[1])]
    for name in names:
        short = name.removeprefix("aten.").split(".")[0] if name.startswith("aten.") else name.rpartition(".")[2]
        if short.strip("_") not in _AFFINE:
            raise part.refuse(f"{name} is not linear")
    for name, args in _keyed(node):
        if name.strip("_") in _KEYED and not _is_of_columns(args):
            raise part.refuse(f"it chooses rows, {name}({args}): write h[..., columns]")


def _keyed(node: fx.Node) -> list[tuple[str, Any]]:
    """Indexing in an operation: its name and its key."""
    if node.target is mutate:
        steps: Any = [(step[0], step[1]) for step in node.args[1]] + [(node.args[2], node.args[3])]  # type: ignore[union-attr,index]
    else:
        steps = [(target_name(node.target), node.args)]
    return [(name.rpartition(".")[2], args[1]) for name, args in steps if len(args) > 1]


def _is_of_columns(key: Any) -> bool:
    """Whether an index takes whole rows, or columns of them."""
    if key is Ellipsis or key == slice(None):
        return True
    if not isinstance(key, tuple) or not key or isinstance(key[0], fx.Node):
        return False
    first = key[0] is Ellipsis
    return first and not any(isinstance(part, fx.Node) for part in key)


def _run(part: Part, module: nn.Module, h: torch.Tensor) -> torch.Tensor:
    """The written value for a read one, in float64."""
    asked = part.edit.asked
    table: dict[str, Any] = {read.name: h for read in asked.reads}
    table |= {name: double(t) for (name, _), t in zip(asked.constants, part.edit.tensors, strict=True)}
    table |= {name: double(Weights(module, [weight])()[0]) for name, weight in asked.weights}
    for node in part.nodes:
        if node.op == "call_function":
            given: Any = fx.map_arg((node.args, node.kwargs), lambda n: table[n.name])
            with torch.no_grad():
                table[node.name] = node.target(*given[0], **given[1])  # type: ignore[operator]
    found: torch.Tensor = table[part.write.value]
    if found.shape != h.shape:
        raise RuntimeError(f"the result is {list(found.shape)} for {list(h.shape)}")
    return found


# -- into the weights ------------------------------------------------------------------------------------------------


def _into_input(part: Part, layer: nn.Module, map_: Affine) -> None:
    """The map of what a linear layer is given."""
    old = layer.get_parameter("weight")
    own: Any = layer.bias
    weight = double(old).T if type(layer) is nn.Linear else double(old)
    added = map_.offset @ weight
    if own is None and bool(added.any()):
        raise part.refuse("it adds a constant, and the layer has no bias: a checkpoint would lose it")
    changed = map_.matrix @ weight
    write(old, changed.T if type(layer) is nn.Linear else changed)
    if own is not None:
        write(own, double(own) + added)


def largest_difference(a: Sequence[Any], b: Sequence[Any]) -> float:
    """|a - b| / (1 + |b|), the greatest of all; infinite where one is a number and the other is none."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, torch.Tensor) and x.numel()]
    return max((_difference(x.double(), y.double()) for x, y in pairs), default=0.0)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    same = (a == b) | (a.isnan() & b.isnan())
    far = ((a - b).abs() / (1 + b.abs())).nan_to_num(nan=math.inf)
    return float(torch.where(same, 0, far).max())
