"""``edited.fold(x)``: edits put into the weights, where that is exact: a plain module that computes the same.

An edit can be folded when what it writes to the output, or to the input, of one linear layer is an affine function of
what was there, the same for every row: ``h + v``, ``h * s``, ``h - (h @ d)[..., None] * d``, ``h[..., 8:16] = 0``.

    y = W x + b,  y' = A y + c     gives    W' = A W,  b' = A b + c
    x' = A x + c                   gives    W' = W A,  b' = b + W c

Whether it is one is seen from its operations, which may be sums, products with constants and choices of columns alone;
then it is a polynomial, and what it is can be read off the results for a few inputs. Everything else is refused.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxsight.edit import Edit
from fxsight.errors import FoldError
from fxsight.mutate import mutate
from fxsight.run import Weights
from fxsight.targets import mutate_functions, target_name

_SUMS = ("add", "sub", "mul", "div", "truediv", "radd", "rsub", "rmul", "neg", "matmul", "mv", "mm", "dot", "bmm")
_SHAPES = ("getitem", "setitem", "unsqueeze", "squeeze", "sum", "mean", "iadd", "isub", "imul", "idiv", "itruediv")
_OTHERS = ("T", "full_like", "zeros_like", "ones_like", "expand_as", "contiguous", "clone", "detach", "to", "linear")
_AFFINE = frozenset((*_SUMS, *_SHAPES, *_OTHERS, "zero", "fill", "copy", "outer", "einsum", "t", "transpose"))
_KEYED = ("getitem", "setitem")
_LEAD = (2, 3)  # rows of the inputs on which an edit is tried


@dataclass(frozen=True)
class Affine:
    """``h @ matrix + offset``, for rows ``h``; float64."""

    matrix: torch.Tensor
    offset: torch.Tensor


def fold_into_weights(module: nn.Module, edits: Sequence[Edit]) -> nn.Module:
    """A copy of the module in whose weights the edits are.

    Raises: FoldError, saying which edit cannot be folded, and why.
    """
    folded = copy.deepcopy(module)
    for edit in edits:
        _check_one_place(edit)
        write = edit.asked.writes[0]
        address = write.location.address
        layer = folded.get_submodule(address.module)
        _check_layer(edit, folded, layer)
        features = sizes_of(layer)[0 if address.port == "output" else 1]
        map_ = affine_of(edit, module, features)
        (_into_output if address.port == "output" else _into_input)(edit, layer, map_)
    return folded


def _refuse(edit: Edit, why: str) -> FoldError:
    return FoldError(f"{edit.title} cannot be folded into weights: {why}")


# -- what can be folded ----------------------------------------------------------------------------------------------


def _check_one_place(edit: Edit) -> None:
    asked = edit.asked
    places = {w.location.address for w in asked.writes} | {r.location.address for r in asked.reads}
    if edit.skipped or len(places) != 1 or len(asked.writes) != 1:
        raise _refuse(edit, f"it is about several places ({', '.join(map(str, places))}); write one edit for each")
    (address,) = places
    if address.steps or address.keys or address.call or address.port == "inputs":
        raise _refuse(edit, "it is not of the whole output or the first input of a module")
    if edit.looked:
        raise _refuse(edit, "it has looked at a shape")


def is_linear(layer: nn.Module) -> bool:
    """Whether it is a linear layer: torch's, or the ``Conv1D`` of transformers."""
    return type(layer) is nn.Linear or type(layer).__name__ == "Conv1D"


def _check_layer(edit: Edit, folded: nn.Module, layer: nn.Module) -> None:
    if not is_linear(layer):
        raise _refuse(
            edit, f"{type(layer).__name__} is no linear layer, which alone has a weight and a bias to put it in"
        )
    weight = layer.get_parameter("weight")
    shared = [name for name, p in folded.named_parameters(remove_duplicate=False) if p is weight]
    if len(shared) > 1:
        raise _refuse(edit, f"its weight is that of {' and of '.join(shared)}: the others would change, too")


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """Features of the output and of the input."""
    rows, columns = layer.get_parameter("weight").shape
    return (rows, columns) if type(layer) is nn.Linear else (columns, rows)


def affine_of(edit: Edit, module: nn.Module, features: int) -> Affine:
    """What the edit makes of a row.

    Raises: FoldError when it is not the same affine function of each row.
    """
    for node in edit.asked.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            _check_operation(edit, node)
    lead = _LEAD
    zero = torch.zeros(*lead, features, dtype=torch.float64)
    try:
        offset = _run(edit, module, zero)[0, 0]
        basis = torch.eye(features, dtype=torch.float64).expand(*lead[:1], features, features)
        matrix = _run(edit, module, basis.contiguous())[0] - offset
        for seed in range(3):
            dice = torch.Generator().manual_seed(seed)
            h = torch.randn(*lead, features, generator=dice, dtype=torch.float64)
            torch.testing.assert_close(_run(edit, module, h), h @ matrix + offset, rtol=1e-9, atol=1e-9)
    except (RuntimeError, IndexError, TypeError) as error:
        raise _refuse(edit, f"it holds for some sizes only ({error})") from error
    except AssertionError:
        raise _refuse(edit, "what it writes is not the same affine function of every row") from None
    return Affine(matrix, offset)


def _check_operation(edit: Edit, node: fx.Node) -> None:
    names = mutate_functions(node.args) if node.target is mutate else [target_name(node.target)]
    if node.target is getattr:
        names = [str(node.args[1])]
    for name in names:
        short = name.removeprefix("aten.").split(".")[0] if name.startswith("aten.") else name.rpartition(".")[2]
        if short.strip("_") not in _AFFINE:
            raise _refuse(edit, f"{name} is not linear")
    for name, args in _keyed(node):
        if name.strip("_") in _KEYED and not _is_of_columns(args):
            raise _refuse(edit, f"it chooses rows, {name}({args}): write h[..., columns]")


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


def _run(edit: Edit, module: nn.Module, h: torch.Tensor) -> torch.Tensor:
    """The written value for a read one, in float64."""
    asked = edit.asked
    table: dict[str, Any] = {read.name: h for read in asked.reads}
    table |= {name: _double(t) for (name, _), t in zip(asked.constants, edit.tensors, strict=True)}
    table |= {name: _double(Weights(module, [weight])()[0]) for name, weight in asked.weights}
    for node in asked.graph.nodes:
        if node.op == "call_function":
            given: Any = fx.map_arg((node.args, node.kwargs), lambda n: table[n.name])
            with torch.no_grad():
                table[node.name] = node.target(*given[0], **given[1])
    found: torch.Tensor = table[asked.writes[0].value]
    if found.shape != h.shape:
        raise RuntimeError(f"the result is {list(found.shape)} for {list(h.shape)}")
    return found


def _double(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor


# -- into the weights ------------------------------------------------------------------------------------------------


def _parts(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight as ``[in, out]``, and the bias; float64."""
    weight = _double(layer.get_parameter("weight"))
    bias: Any = layer.bias
    made = torch.zeros(sizes_of(layer)[0], dtype=torch.float64) if bias is None else _double(bias)
    return (weight.T if type(layer) is nn.Linear else weight), made


def _put(edit: Edit, layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> None:
    old = layer.get_parameter("weight")
    with torch.no_grad():
        old.copy_(weight.T if type(layer) is nn.Linear else weight)
    own: Any = layer.bias
    if own is not None:
        with torch.no_grad():
            own.copy_(bias)
    elif bool(bias.any()):
        raise _refuse(edit, "it adds a constant, and the layer has no bias: a checkpoint would lose it")


def _into_output(edit: Edit, layer: nn.Module, map_: Affine) -> None:
    weight, bias = _parts(layer)
    _put(edit, layer, weight @ map_.matrix, bias @ map_.matrix + map_.offset)


def _into_input(edit: Edit, layer: nn.Module, map_: Affine) -> None:
    weight, bias = _parts(layer)
    _put(edit, layer, map_.matrix @ weight, bias + map_.offset @ weight)


def largest_difference(a: Sequence[Any], b: Sequence[Any]) -> float:
    """|a - b| / (1 + |b|), the greatest of all."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, torch.Tensor) and x.numel()]
    return max((float(((x.double() - y.double()).abs() / (1 + y.double().abs())).max()) for x, y in pairs), default=0.0)
