"""Whether an operator gives the same bits on fewer rows: tried, on random numbers of the very shapes.

A kernel's order of additions depends on shapes, strides and devices, not on the numbers; so a comparison of results on
random ones decides it for this machine. Two orders often give the same bits by chance: of sums of 16 products every
second, of 768 every tenth. Where one call gives few results it is therefore repeated, until there are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxsight.columns import SHARE, Piece, count_of, narrowable
from fxsight.gradient import backward, gradient
from fxsight.layout import minds_layout
from fxsight.node import binding_of, is_tensor, tensor_spec
from fxsight.passes.narrow_columns import NarrowColumns
from fxsight.passes.narrow_reads import ROW_MAJOR, Move, NarrowReads, is_view, moves, needs_layout, row_arguments
from fxsight.program import Program
from fxsight.spec import SizeSpec

Sizes = Mapping[str, int]
Known = dict[Any, bool]
ROWS = (1, 2, 4, 8, 16)
COLUMNS = (1, 4, 8, 16, 32)
_DRAWS = 16  # of columns whose numbers a tensor says
_BLOCK = 64  # columns so many apart are computed alike, but where a thread's part ends
_HERE = 8  # results that are compared at least of the columns themselves
_SUMS, _ROWS, _NUMBERS = 256, 32, 1024  # results that are compared at least: matrix products; norms; pointwise


Passes = tuple[NarrowReads | None, NarrowColumns | None]


def narrow_exactly(program: Program, sizes: Sizes, weight: Callable[[str], Any], known: Known) -> Program:
    """The program with ``NarrowReads`` and ``NarrowColumns`` as far as, for inputs of these sizes, each operator gives
    the same bits.

    weight: a parameter or buffer by name.  known: what has been tried; filled.
    """
    return narrowed_by(program, sizes, weight, known)[1]


def narrowed_by(
    program: Program, sizes: Sizes, weight: Callable[[str], Any], known: Known, but: tuple[str, ...] = ()
) -> tuple[Passes, Program]:
    """The same, and the passes that have made it; None for one that has left nothing out.  but: nodes that stay."""
    asked = narrowing(program, sizes, weight, known, but)
    narrowed = program if asked is None else asked(program)
    columns = narrowing_columns(narrowed, sizes, weight, known, but)
    if columns is not None:
        narrowed = columns.apply(narrowed, copies=narrowed is program).program
    return (asked, columns), narrowed


def narrowing(
    program: Program, sizes: Sizes, weight: Callable[[str], Any], known: Known, but: tuple[str, ...] = ()
) -> NarrowReads | None:
    """The pass that does so; None where nothing is left to narrow. Where gradients flow, they have the same bits, too.

    With the fewest rows for which all do (matrix products of few rows have kernels of their own); where there are none,
    without the operators that do not. With backward passes one row: sizes such as ``Min(4, length)`` take too long;
    there it is the readers who must not mind how rows lie (``minds_layout``).
    """
    is_joint = any(n.target is backward for n in program.graph.nodes)
    asked = NarrowReads(1, (*added_up(program.graph), *but), layout=not is_joint)
    found = moves(program.graph, asked)
    while is_joint and (bad := tuple(m.node for m in found if minds_layout(program.nodes[m.node], found))):
        asked = replace(asked, but=asked.but + bad)
        found = moves(program.graph, asked)
    if all(is_view(program.nodes[move.node]) for move in found):
        return None  # nothing is computed
    choices, wholes = (1,) if is_joint else ROWS, dict[str, torch.Tensor]()
    for rows in choices:
        asked = replace(asked, rows=rows)
        if not _wrong(program, found, rows, sizes, weight, known, wholes):
            return asked
    while wrong := _wrong(program, found, asked.rows, sizes, weight, known, wholes):
        asked = replace(asked, but=asked.but + wrong)
        found = moves(program.graph, asked)
    return asked if found else None


def narrowing_columns(
    program: Program, sizes: Sizes, weight: Callable[[str], Any], known: Known, but: tuple[str, ...] = ()
) -> NarrowColumns | None:
    """``NarrowColumns`` with the fewest columns for which the bits are the same; None where nothing is left.

    Without the layers for which no number of columns will do.
    """
    left, best = [layer for layer in narrowable(program.graph) if layer[0].name not in but], 1
    for node, readings in left:
        pieces = list(dict.fromkeys(piece for reading in readings for piece in reading.pieces))
        fitting = (n for n in COLUMNS if same_columns(node, pieces, n, sizes, weight, known))
        found = next(fitting, 0)
        but += () if found else (node.name,)
        best = max(best, found)
    return NarrowColumns(best, but, layout=True) if any(node.name not in but for node, _ in left) else None


def same_columns(
    node: fx.Node, pieces: Sequence[Piece], least: int, sizes: Sizes, weight: Callable[[str], Any], known: Known
) -> bool:
    """Whether a linear layer gives the bits of its columns where only these, and so many at least, are computed."""
    read = tuple(("tensor", count_of(piece)) if isinstance(piece, fx.Node) else piece for piece in pieces)
    key = (node.target, _about(node, sizes), "columns", read, least, torch.get_num_threads())
    if key not in known:
        known[key] = _try_columns(node, pieces, least, sizes, weight)
    return known[key]


def _try_columns(
    node: fx.Node, pieces: Sequence[Piece], least: int, sizes: Sizes, weight: Callable[[str], Any]
) -> bool:
    width = tensor_spec(node).numbers[-1]
    if SHARE * least > width:
        return False
    compared, number, wholes = 0, 0, 0
    draws = _DRAWS if any(isinstance(piece, fx.Node) for piece in pieces) else 1
    alike = _alike(pieces, width) * draws
    with torch.no_grad():
        while compared < _SUMS or number < draws:
            wholes += 1
            generator = torch.Generator().manual_seed(number)
            values = {a: _value(a, sizes, weight, generator) for a in node.all_input_nodes}
            whole = _call(node, values)
            for shift in alike:
                columns = [c for piece in pieces for c in _drawn(piece, width, number, generator, shift)]
                wanted = torch.tensor([*columns, *[0] * (least - len(columns))], device=whole.device)
                few = {a: v[wanted] if a in node.args[1:] else v for a, v in values.items()}
                if not torch.equal(_call(node, few), whole[..., wanted]):
                    return False
                results = max(whole.numel() // width, 1) * len(set(columns))
                compared, number = compared + results, number + 1
                if number >= draws and compared >= _SUMS * wholes // -(-_HERE // results):
                    break
    return True


def _alike(pieces: Sequence[Piece], width: int) -> tuple[int, ...]:
    """How far the columns can be shifted so that a kernel computes them as before; not at all comes first."""
    columns = [c for piece in pieces if not isinstance(piece, fx.Node) for c in _columns(piece)]
    if not columns:
        return (0,)
    end = max(width // _BLOCK * _BLOCK, max(columns) + 1)
    return (*range(0, end - max(columns), _BLOCK), *range(-_BLOCK, -min(columns) - 1, -_BLOCK))


def _columns(piece: int | range) -> Sequence[int]:
    return piece if isinstance(piece, range) else (piece,)


def _drawn(piece: Piece, width: int, draw: int, generator: torch.Generator, shift: int) -> Sequence[int]:
    """The columns of a piece, shifted; of a tensor, the first, the last, or any."""
    if not isinstance(piece, fx.Node):
        return [c + shift for c in _columns(piece)]
    number = count_of(piece)
    if draw < 2:
        return range(number) if draw else range(width - number, width)
    found: list[int] = torch.randint(width, (number,), generator=generator).tolist()
    return found


def of_one_size(program: Program) -> tuple[str, ...]:
    """Operators of whose shapes nothing is known at other sizes than those of the body: what it makes has numbers."""
    return tuple(
        node.name
        for node in program.graph.nodes
        if node.op == "call_function" and any(map(_is_of_body, (node, *node.all_input_nodes)))
    )


def _is_of_body(node: fx.Node) -> bool:
    return node.op == "call_function" and bool(node.meta["origin"].user)


def is_exact(program: Program, asked: NarrowReads, sizes: Sizes, weight: Callable[[str], Any], known: Known) -> bool:
    """Whether the pass gives the same bits for inputs of these sizes, too."""
    return not _wrong(program, moves(program.graph, asked), asked.rows, sizes, weight, known)


def differentiated(graph: fx.Graph) -> set[fx.Node]:
    """The values through which gradients flow in a program with backward passes that are not written out yet."""
    passes: list[Any] = [n.args for n in graph.nodes if n.target is backward]
    found = {n for args in passes for n in (*args[6], *args[7])}
    for node in graph.nodes if passes else ():
        if node.target is gradient:
            found.add(node.args[0])
    for node in graph.nodes if passes else ():
        if node.op == "call_function" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def added_up(graph: fx.Graph) -> tuple[str, ...]:
    """Operators whose gradients are sums over rows, in another order for fewer of them; all, where gradients are
    differentiated again."""
    flows = differentiated(graph)
    twice = any(n.target is backward and n.args[5][1] for n in graph.nodes)
    return tuple(n.name for n in flows if n.op == "call_function" and (twice or _adds_up(n, flows)))


def _adds_up(node: fx.Node, flows: set[fx.Node]) -> bool:
    """Whether an argument without rows has a gradient: one that is smaller than the result, or a weight."""
    given = [a for a in node.all_input_nodes if a in flows]
    if needs_layout(node) or node.target is torch.ops.aten.layer_norm.default:
        return any(a is not node.args[0] for a in given)
    shape = tensor_spec(node).shape if is_tensor(node) else ()
    return any(is_tensor(a) and tensor_spec(a).shape != shape for a in given)


def _wrong(
    program: Program,
    found: Sequence[Move],
    rows: int,
    sizes: Sizes,
    weight: Callable[[str], Any],
    known: Known,
    wholes: dict[str, torch.Tensor] | None = None,
) -> tuple[str, ...]:
    """The operators that give other bits when so many rows are kept.

    wholes: results that have been computed; filled.
    """
    kept, wholes = [replace(move, rows=max(rows, move.rows)) for move in found], {} if wholes is None else wholes
    return tuple(m.node for m in kept if not same_bits(program.nodes[m.node], m, sizes, weight, known, wholes))


def same_bits(
    node: fx.Node,
    move: Move,
    sizes: Sizes,
    weight: Callable[[str], Any],
    known: Known,
    wholes: dict[str, torch.Tensor],
) -> bool:
    """Whether the operator on the rows that are kept gives the bits that they have in the whole."""
    if any(isinstance(a.meta.get("spec"), SizeSpec) for a in node.all_input_nodes):
        return False
    flows = node in differentiated(node.graph)
    key = (node.target, _about(node, sizes), move.dim, move.start, move.end, torch.get_num_threads(), flows)
    if key not in known:
        known[key] = _try(node, move, sizes, weight, flows, wholes)
    return known[key]


def _about(node: fx.Node, sizes: Sizes) -> str:
    """The arguments as far as a kernel can see them."""
    given = fx.map_arg((node.args, node.kwargs), lambda a: repr(_kind(a, sizes)))
    return repr(given)


def _kind(node: fx.Node, sizes: Sizes) -> Any:
    spec = tensor_spec(node).at(sizes)
    return spec.dtype, spec.shape, spec.stride, spec.device


def _try(
    node: fx.Node,
    move: Move,
    sizes: Sizes,
    weight: Callable[[str], Any],
    flows: bool,
    wholes: dict[str, torch.Tensor],
) -> bool:
    rank, compared, draw = len(tensor_spec(node).shape), 0.0, 0
    rows = set(row_arguments(node, move.dim))
    while compared < 1:
        generator = torch.Generator().manual_seed(draw)
        values = {a: _value(a, sizes, weight, generator) for a in node.all_input_nodes}
        parts = {a: _rows_of(v, move.dim - rank + v.ndim, move) if a in rows else v for a, v in values.items()}
        if needs_layout(node):
            parts = {a: v.clone(**ROW_MAJOR) if a in rows else v for a, v in parts.items()}
        if flows:
            leaves = [a for a in rows if values[a].dtype.is_floating_point]
            pairs = list(_with_gradients(node, move, values, parts, leaves, draw))
        else:
            pairs = [_results(node, move, values, parts, wholes if draw == 0 else {})]
        if not all(torch.equal(whole, part) for whole, part in pairs):
            return False
        compared += min(_evidence(node, whole) for whole, _ in pairs)
        draw += 1
    return True


def _evidence(node: fx.Node, compared: torch.Tensor) -> float:
    """What these results are of all that are needed; those of a row of a norm share one sum."""
    number = compared.numel()
    if node.target is torch.ops.aten.layer_norm.default:
        found = number / max(compared.shape[-1], 1) / _ROWS
    else:
        found = number / (_SUMS if needs_layout(node) else _NUMBERS)
    return found if number else 1


def _results(
    node: fx.Node,
    move: Move,
    values: Mapping[fx.Node, Any],
    parts: Mapping[fx.Node, Any],
    wholes: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that are kept, of the whole and by themselves."""
    with torch.no_grad():
        if node.name not in wholes:
            wholes[node.name] = _call(node, values)
        return _rows_of(wholes[node.name], move.dim, move), _call(node, parts)


def _with_gradients(
    node: fx.Node,
    move: Move,
    values: Mapping[fx.Node, Any],
    parts: Mapping[fx.Node, Any],
    rows: Sequence[fx.Node],
    draw: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same, and so the gradients of the arguments with rows; those of rows that are left out are zero."""
    found: list[tuple[torch.Tensor, ...]] = []
    for given in (values, parts):
        with torch.enable_grad():
            own = {
                a: v.detach().requires_grad_(a in rows) if isinstance(v, torch.Tensor) else v for a, v in given.items()
            }
            result = _call(node, own)
            kept = _rows_of(result, move.dim, move) if given is values else result
            generator = torch.Generator().manual_seed(draw + 1)
            seed = torch.randn(kept.shape, generator=generator).to(kept)
            found.append((kept.detach(), *torch.autograd.grad(kept, [own[a] for a in rows], seed)))
    (whole, *gradients), (part, *others) = found
    yield whole, part
    for one, other in zip(gradients, others, strict=True):
        dim = move.dim - whole.ndim + one.ndim
        yield _rows_of(one, dim, move), other
        left = one.clone()
        _rows_of(left, dim, move).zero_()
        yield left, torch.zeros_like(left)


def _rows_of(value: torch.Tensor, dim: int, move: Move) -> torch.Tensor:
    rows: torch.Tensor = torch.ops.aten.slice.Tensor(value, dim, move.start, move.end)
    return rows


def _call(node: fx.Node, values: Mapping[fx.Node, Any]) -> torch.Tensor:
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    target: Any = node.target
    result: torch.Tensor = target(*args, **kwargs)
    return result


def _value(node: fx.Node, sizes: Sizes, weight: Callable[[str], Any], generator: torch.Generator) -> torch.Tensor:
    if node.op == "placeholder" and binding_of(node).kind == "weight":
        found: torch.Tensor = weight(str(binding_of(node).key))
        if found[:_BLOCK].any():  # of nothing but zeros, all sums are the same, and it may learn
            return found
    spec = tensor_spec(node).at(sizes)
    length = 1 + sum((n - 1) * s for n, s in zip(spec.numbers, spec.steps, strict=True))
    wide = torch.float64 if spec.dtype in (torch.float64, torch.complex128) else torch.float32
    numbers = torch.randn(max(length, 1), generator=generator, dtype=wide)  # all bits of it: products are rounded, too
    return numbers.to(spec.device, spec.dtype).as_strided(spec.numbers, spec.steps)
