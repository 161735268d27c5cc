"""Which weights a value is made of: where an affine map of it can be put, so that the value comes out mapped.

    value = residual + dropout(linear(x, W, b))      value' = value + v      b' = b + v
    value = linear(x, W, b)                          value' = value @ A + c  W' = W @ A,  b' = b @ A + c
    value = embedding(E, ids) + embedding(P, at)     value' = value @ A      E' = E @ A,  P' = P @ A

A constant goes into one summand. A matrix goes into all of them, but for one that it leaves as it is: the value of an
earlier edit that projects the same way. Nothing on the way may be used by anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from fxsight.node import binding_of, origin_of, tensor_spec
from fxsight.program import Program
from fxsight.targets import target_name

ROUNDING = 1e-5  # of a direction that was normalised in single precision


@dataclass(frozen=True)
class Affine:
    """``h @ matrix + offset``, for rows ``h``; float64."""

    matrix: torch.Tensor
    offset: torch.Tensor

    @property
    def adds(self) -> bool:
        """Whether it adds something, and does nothing else."""
        return _are_close(self.matrix, torch.eye(len(self.offset), dtype=torch.float64), 1e-9)

    def then(self, other: Affine) -> Affine:
        """This one, and another after it."""
        return Affine(self.matrix @ other.matrix, self.offset @ other.matrix + other.offset)

    def keeps(self, other: Affine) -> bool:
        """Whether what it makes is left as it is by another."""
        after = self.then(other)
        return _are_close(after.matrix, self.matrix, ROUNDING) and _are_close(after.offset, self.offset, ROUNDING)


@dataclass(frozen=True)
class Into:
    """A map put into a weight and a bias, by name; empty for none. rows: whether the weight is ``[out, in]``."""

    weight: str
    bias: str
    rows: bool
    map: Affine

    def put(self, module: nn.Module) -> None:
        """Change the weights of a module."""
        if self.weight:
            old = module.get_parameter(self.weight)
            new = double(old).T if self.rows else double(old)
            write(old, (new @ self.map.matrix).T if self.rows else new @ self.map.matrix)
        if self.bias:
            old = module.get_parameter(self.bias)
            write(old, double(old) @ self.map.matrix + self.map.offset)


class Refused(Exception):
    """A value that is not made of weights in which a map of it can be put; the message says why."""


@dataclass(frozen=True)
class Made:
    """How a finished program makes its values.

    program: with the edits.  plain: without.  base: as it was captured.  maps: of the edited values, by their node.
    """

    program: Program
    plain: Program
    base: Program
    module: nn.Module
    maps: Mapping[str, Affine]

    def plan(self, name: str) -> list[Into]:
        """Where the map of an edited value goes.

        Raises: Refused.
        """
        node = self.program.nodes.get(name) or self.plain.nodes.get(name)
        if node is None:
            raise Refused("this forward has no use for it")
        if name not in self.program.nodes:  # all of it is overwritten
            return self._into(node, self.maps[name])
        readers = [user for user in node.users if user.op == "output" or user.name in self.base.nodes]
        if readers:
            raise Refused(f"{self._say(readers[0])} reads the value without the edit")
        return self._into(node, self.maps[name])

    def _into(self, node: fx.Node, map_: Affine) -> list[Into]:
        """Where a map of a node's value goes."""
        if node.op == "placeholder":
            return [self._weights(node, None, node, False, map_)]
        made = _WAYS.get(target_name(node.target)) if node.name in self.base.nodes else None
        if made is None:
            raise Refused(f"it is made by {self._say(node)}, which is no sum of what weights make")
        return made(self, node, map_)

    def _below(self, node: Any, map_: Affine) -> list[Into]:
        """The same for a value on the way, which nothing else may use."""
        if not isinstance(node, fx.Node):
            raise Refused("one of its summands is a number")
        if len(node.users) > 1:
            raise Refused(f"{' and '.join(map(self._say, node.users))} use the same summand")
        return self._into(node, map_)

    # -- one way for each operator -----------------------------------------------------------------------------------

    def through(self, node: fx.Node, map_: Affine) -> list[Into]:
        """An operator that leaves rows as they are."""
        source: Any = node.args[0]
        now, then = tensor_spec(node), tensor_spec(source)
        if target_name(node.target) == "aten.dropout.default" and node.args[2] is not False:
            raise Refused("dropout is on: fold a model in eval()")
        if (now.shape[-1:], now.dtype) != (then.shape[-1:], then.dtype):
            raise Refused(f"{self._say(node)} makes other rows")
        return self._below(source, map_)

    def scaled(self, node: fx.Node, map_: Affine) -> list[Into]:
        """A product with one number."""
        source, factor = node.args[:2]
        if not isinstance(factor, (int, float)) or not factor:
            raise Refused(f"it is made by {self._say(node)}, which is no product with a number")
        return self._below(source, replace(map_, offset=map_.offset / factor))

    def sum(self, node: fx.Node, map_: Affine) -> list[Into]:
        """A constant into one summand, a matrix into all."""
        tensors = [x for x in node.args if isinstance(x, fx.Node)]
        if node.kwargs or any(tensor_spec(x).shape[-1:] != tensor_spec(node).shape[-1:] for x in tensors):
            raise Refused("one of its summands is scaled, or has other rows")
        return self._add(node, map_) if map_.adds else self._map_all(node, map_)

    def _add(self, node: fx.Node, map_: Affine) -> list[Into]:
        reasons: list[str] = []
        for operand in node.args:
            try:
                return self._below(operand, map_)
            except Refused as refused:
                reasons.append(str(refused))
        raise Refused("no summand of it has a bias of its own: " + "; ".join(dict.fromkeys(reasons)))

    def _map_all(self, node: fx.Node, map_: Affine) -> list[Into]:
        found: list[Into] = []
        left = map_
        for operand in node.args:
            if self._is_kept(operand, map_):
                continue
            found += self._below(operand, left)
            left = replace(map_, offset=torch.zeros_like(map_.offset))
        if left is map_ and bool(map_.offset.any()):
            raise Refused("it adds a constant to what is edited before")
        return found

    def _is_kept(self, node: Any, map_: Affine) -> bool:
        """Whether a summand is the value of an earlier edit, which the map leaves as it is."""
        edited = self._edited(node) if isinstance(node, fx.Node) and node.name not in self.base.nodes else set[str]()
        return len(edited) == 1 and all(name in self.maps and self.maps[name].keeps(map_) for name in edited)

    def _edited(self, node: fx.Node) -> set[str]:
        """The model's values of which edits have made a value."""
        if node.op == "placeholder":
            return set()
        if node.name in self.base.nodes:
            return {node.name}
        return {name for each in node.all_input_nodes for name in self._edited(each)}

    def linear(self, node: fx.Node, map_: Affine) -> list[Into]:
        """Linear(x, weight[out, in], bias)."""
        weight, bias = node.args[1], node.args[2] if len(node.args) > 2 else None
        return [self._weights(node, weight, bias, True, map_)]

    def addmm(self, node: fx.Node, map_: Affine) -> list[Into]:
        """Addmm(bias, x, weight[in, out]), as in the ``Conv1D`` of transformers."""
        if node.kwargs:
            raise Refused(f"it is made by {self._say(node)} with factors")
        return [self._weights(node, node.args[2], node.args[0], False, map_)]

    def embedding(self, node: fx.Node, map_: Affine) -> list[Into]:
        """A row of a table: each gets the map."""
        return [self._weights(node, None, node.args[0], False, map_)]

    def norm(self, node: fx.Node, map_: Affine) -> list[Into]:
        """A layer norm takes a constant in its bias."""
        if not map_.adds:
            raise Refused(f"it is made by {self._say(node)}, which takes a constant alone")
        return [self._weights(node, None, node.args[3] if len(node.args) > 3 else None, False, map_)]

    # -- weights -----------------------------------------------------------------------------------------------------

    def _weights(self, node: fx.Node, weight: Any, bias: Any, rows: bool, map_: Affine) -> Into:
        if bias is None and bool(map_.offset.any()):
            raise Refused(f"it adds a constant, and {self._say(node)} has no bias: a checkpoint would lose it")
        mapped = "" if weight is None or map_.adds else self._name(weight)
        return Into(mapped, "" if bias is None else self._name(bias), rows, map_)

    def _name(self, node: Any) -> str:
        """The name of a weight that nothing else uses."""
        if not isinstance(node, fx.Node) or node.op != "placeholder" or binding_of(node).kind != "weight":
            raise Refused(f"{self._say(node)} is no weight of the model")
        name = str(binding_of(node).key)
        tensor = dict(self.module.named_parameters(remove_duplicate=False)).get(name)
        if tensor is None:
            raise Refused(f"{name} is no parameter of the model")
        shared = [other for other, p in self.module.named_parameters(remove_duplicate=False) if p is tensor]
        if len(shared) > 1:
            raise Refused(f"its weight is that of {' and of '.join(shared)}: the others would change, too")
        if len(node.users) > 1:
            raise Refused(f"{name} is used {len(node.users)} times in this forward")
        return name

    def _say(self, node: Any) -> str:
        """A node in words: where it is in the model, and what it calls."""
        if not isinstance(node, fx.Node):
            return repr(node)
        if node.op == "output":
            return "the model's output"
        call, calls = origin_of(node).call, self.program.book.calls
        where = str(self.program.book.address(calls[call])) if 0 <= call < len(calls) else ""
        what = str(node.meta["binding"]) if node.op == "placeholder" else target_name(node.target)
        return f"{what} ({where})" if where else what


_WAYS: Mapping[str, Callable[[Made, fx.Node, Affine], list[Into]]] = {
    "aten.add.Tensor": Made.sum,
    "aten.linear.default": Made.linear,
    "aten.addmm.default": Made.addmm,
    "aten.embedding.default": Made.embedding,
    "aten.layer_norm.default": Made.norm,
    "aten.mul.Tensor": Made.scaled,
    **dict.fromkeys(
        (
            *("aten.dropout.default", "aten.view.default", "aten.reshape.default", "aten.alias.default"),
            *("aten.contiguous.default", "aten.clone.default", "aten.detach.default", "aten.to.dtype"),
            *("aten.to.dtype_layout", "aten.to.device"),
        ),
        Made.through,
    ),
}


def double(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers on the CPU, floating-point ones in float64."""
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor


def write(old: torch.Tensor, new: torch.Tensor) -> None:
    """New numbers for a parameter."""
    with torch.no_grad():
        old.copy_(new)


def _are_close(a: torch.Tensor, b: torch.Tensor, within: float) -> bool:
    return bool(((a - b).abs() <= within * (1 + b.abs())).all())
