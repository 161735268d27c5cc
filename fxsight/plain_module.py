"""A finished program as a plain ``fx.GraphModule``: for torch.export and everything behind it. fxsight is not in it.

Weights keep their names; the tensors of edits are under ``edits.``, those of the model's own code under ``literals.``.
What the model returns in a class of its own becomes a dict, so that a file can be loaded without the model's library; a
cache of keys and values is a dict of its tensors, whose names are the same among the inputs.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx, nn

from fxsight.errors import EditError
from fxsight.node import Fixed, binding_of
from fxsight.program import Program
from fxsight.run import Weights
from fxsight.spec import SizeSpec, TensorSpec
from fxsight.tree import Tree


@dataclass(frozen=True)
class PlainModule:
    """The module; its inputs by name with the number of their leaf; and where each tensor of the edits is in it."""

    module: fx.GraphModule
    inputs: Mapping[str, int]
    parameters: Mapping[str, str]

    def arguments(self, leaves: Sequence[Any]) -> dict[str, torch.Tensor]:
        """The inputs by name, of the leaves of a call."""
        return {name: leaves[number] for name, number in self.inputs.items()}


def plain_module(program: Program, base: nn.Module, constants: Mapping[str, torch.Tensor]) -> PlainModule:
    """The module that computes a program.

    constants: the program's, by name and in order.

    Raises: EditError for inputs that are not single tensors.
    """
    names = _input_names(program, base)
    root, graph, made = nn.Module(), fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = {number: graph.placeholder(name) for name, number in names.items()}
    parameters = {name: _attribute("edits", name) for name in constants}
    for node in program.graph.nodes:
        if node.op == "output":
            returned = program.outputs.children[0]
            leaves = iter([made[n] for n in program.results])
            graph.output(_structure(returned, iter(program.output_leaves), leaves, ""))
        elif node.op == "call_function":
            made[node] = graph.node_copy(node, made.__getitem__)
            made[node].meta.clear()
        else:
            binding = binding_of(node)
            if binding.kind == "input":
                made[node] = inputs[int(binding.key)]
                continue
            if binding.kind == "constant":
                name = list(parameters)[int(binding.key)]
                path, tensor = parameters[name], constants[name]
            elif binding.kind == "literal":
                path, tensor = _attribute("literals", str(binding.key)), program.literals[str(binding.key)]
            else:
                path = str(binding.key)
                tensor = Weights(base, [path])()[0]
            _put(root, path, tensor)
            made[node] = graph.get_attr(path)
    return PlainModule(fx.GraphModule(root, graph, program.name), names, parameters)


def _input_names(program: Program, base: nn.Module) -> dict[str, int]:
    """Names of the tensors among the inputs, as the module's forward calls them."""
    args, kwargs = program.inputs.children
    own = list(inspect.signature(base.forward).parameters)
    names = [own[i] if i < len(own) else f"input_{i}" for i in range(len(args.children))] + list(map(str, kwargs.keys))
    found: dict[str, int] = {}
    number = 0
    for name, child in zip(names, (*args.children, *kwargs.children), strict=True):
        leaves = program.input_leaves[number : number + child.size]
        if child.kind not in ("leaf", "object") and any(isinstance(leaf, TensorSpec) for leaf in leaves):
            raise EditError(f"the input {name!r} is a {child.kind}; what is exported takes single tensors")
        if any(isinstance(leaf, SizeSpec) for leaf in leaves):
            raise EditError(f"the cache {name!r} counts what it has seen, and what is exported takes tensors alone")
        for place, (way, leaf) in enumerate(zip(child.paths(), leaves, strict=True)):
            if isinstance(leaf, TensorSpec):
                found[member_name(name, way)] = number + place
        number += child.size
    return found


def member_name(name: str, way: Sequence[Any]) -> str:
    """The name of a tensor in a cache: ``past_key_values_layers_0_keys``."""
    return "_".join([name, *map(str, way)])


def _attribute(prefix: str, name: str) -> str:
    parts = (re.sub(r"\W", "_", part) or "_" for part in name.split("."))
    return ".".join([prefix, *parts])


def _put(root: nn.Module, path: str, tensor: torch.Tensor) -> None:
    """A tensor under a dotted name: a parameter where it is one or is trained, else a buffer."""
    *way, leaf = path.split(".")
    for part in way:
        if part not in dict(root.named_children()):
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if isinstance(tensor, nn.Parameter) or (tensor.requires_grad and tensor.is_leaf):
        is_parameter = isinstance(tensor, nn.Parameter)
        root.register_parameter(leaf, tensor if is_parameter else nn.Parameter(tensor))  # type: ignore[arg-type]
    else:
        root.register_buffer(leaf, tensor)


def _structure(tree: Tree, leaves: Any, values: Any, name: str) -> Any:
    """The output: tuples, lists and dicts of nodes and of what is fixed; a cache is a dict of its tensors by name."""
    if tree.kind == "leaf":
        leaf = next(leaves)
        return leaf.value if isinstance(leaf, Fixed) else next(values)
    if tree.kind == "object":
        ways = [way for way in tree.paths() if not isinstance(next(leaves), Fixed)]
        return {member_name(name, way): next(values) for way in ways}
    members = [_structure(child, leaves, values, str(key)) for key, child in zip(tree.keys, tree.children, strict=True)]
    if tree.kind in ("dict", "fields", "cache"):
        return dict(zip(map(str, tree.keys), members, strict=True))
    return members if tree.kind == "list" else tuple(members)


def dynamic_shapes(program: Program, inputs: Mapping[str, int]) -> dict[str, dict[int, Any]]:
    """For torch.export: the free dimensions of each input, with their bounds."""
    return {
        name: {place: torch.export.Dim.AUTO(**bounds(program, dim)) for place, dim in free_dims(program, number)}
        for name, number in inputs.items()
    }


def free_dims(program: Program, number: int) -> list[tuple[int, Any]]:
    """The dimensions of an input that are not one number: place and size."""
    spec = program.input_leaves[number]
    assert isinstance(spec, TensorSpec)
    return [(place, dim) for place, dim in enumerate(spec.shape) if not isinstance(dim, int)]


def bounds(program: Program, size: Any) -> dict[str, int]:
    """The least and the greatest value of a free size, as far as they are known."""
    if not isinstance(size, sympy.Symbol):
        return {}
    named = next((s for s in program.sizes if s.name == size.name), None)
    low = 0 if named is None else named.low
    for number in (0, 1, 2):
        at = {size: sympy.Integer(number)}
        if any(g.free_symbols == {size} and g.xreplace(at) == False for g in program.guards):  # noqa: E712
            low = max(low, number + 1)
    high = {} if named is None or named.high is None else {"max": named.high}
    return {"min": low, **high}
