"""What torch.export returns → program.

Nodes are copied with their spec and origin and nothing else; sizes get names; what export leaves around the model's own
operators (assertions on sizes, ``no_grad`` regions) is folded into guards and plain nodes.
"""

from __future__ import annotations

import inspect
import keyword
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import sympy
import torch
from torch import fx, nn

from fxsight import _torch
from fxsight.book import Book, Call, Opaque, Ref, SizeRef, Structure
from fxsight.capture_errors import Refused
from fxsight.clock import TAG
from fxsight.free_sizes import FreeSizes
from fxsight.libraries import Libraries, stack_lines
from fxsight.node import Binding, Fixed, InputLeaf, Origin
from fxsight.past import Count
from fxsight.program import Program
from fxsight.provenance import Scribe
from fxsight.spec import TensorSpec, parse_dims, spec_of, symbol
from fxsight.tree import Tree

PLAIN = "write it with plain operators, or trace a submodule without it"


def fixed(value: Any) -> Fixed:
    """An input or output that is no tensor: the value itself, or the name of its class."""
    plain = value is None or isinstance(value, (bool, int, float, str))
    return Fixed(value if plain else f"<{type(value).__qualname__}>")


def title_of(module: nn.Module, method: str) -> str:
    """The name of a program: of the class, and of the method when it is not the forward."""
    return type(module).__name__ if method == "forward" else f"{type(module).__name__}.{method}"


class Builder:
    """Turns what torch.export returns into a program.

    scribe: of the forward that was exported.  inputs, leaves: what the module was called with, by which method.
    """

    def __init__(
        self, scribe: Scribe, inputs: Tree, leaves: Sequence[Any], exported: torch.export.ExportedProgram, method: str
    ) -> None:
        self.module, self.scribe, self.exported, self.method = scribe.root, scribe, exported, method
        self.inputs, self.leaves = inputs, leaves
        self.graph = fx.Graph()
        self.literals: dict[str, torch.Tensor] = {}
        self.free = FreeSizes(exported)
        self.names = self.free.names
        self.storages: dict[int, str] = {}
        self.by_time: dict[int, str] = {}
        self.lines = {c.id: c.line for c in self.scribe.calls}
        self.last = Origin(0, 0)  # what export adds in front belongs to the root
        self.libraries = Libraries()

    def program(self) -> Program:
        """The finished program.

        Raises: Refused for what no program can hold.
        """
        old = self.exported.graph_module.graph
        env: dict[fx.Node, Any] = {}
        for node, binding, name in self._placeholders(old):
            place = self.graph.placeholder(name)
            place.target = place.name  # the name may have been taken: code is generated from the target
            env[node] = self._keep(node, place)
            env[node].meta["binding"] = binding
            tag = (node.meta.get("custom") or {}).get(TAG)
            if binding.kind == "input" and tag is not None:
                self.by_time.setdefault(tag[0], place.name)
        returned = self._copy(self.exported.graph_module, env)
        self.graph.output(tuple(returned[: sum(leaf is None for leaf in self.scribe.returned[1])]))
        self.graph.eliminate_dead_code(lambda node: not _is_dead(node))
        return Program(
            title_of(self.module, self.method),
            self.graph,
            self.inputs,
            tuple(self._input_leaves()),
            self.scribe.returned[0],
            self.scribe.returned[1],
            tuple(self.free.sizes()),
            tuple(self.free.guards()),
            self._book(),
            self.literals,
        )

    def _book(self) -> Book:
        after = self.scribe.after
        calls = tuple(self._call(c.close()) for c in self.scribe.calls)
        left = None if after is None else self._structure(after)
        return Book(calls, frozenset(self.scribe.mentions.names), left, tuple(self.scribe.functions))

    # -- inputs ------------------------------------------------------------------------------------------------------

    def _placeholders(self, graph: fx.Graph) -> Iterator[tuple[fx.Node, Binding, str]]:
        nodes = {n.name: n for n in graph.nodes if n.op == "placeholder"}
        called = operator.attrgetter(self.method)(self.module)
        paths = ["_".join(map(str, _argument_path(called, p))) for p in self.inputs.paths()]
        inputs = (i for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor) or type(leaf) is Count)
        for spec in self.exported.graph_signature.input_specs:
            node, target = nodes[spec.arg.name], str(spec.target or "").removeprefix("module.")
            kind = torch.export.graph_signature.InputKind
            if spec.kind is kind.USER_INPUT:
                number = next(inputs)
                yield node, Binding("input", number), _identifier(paths[number])
            elif spec.kind in (kind.PARAMETER, kind.BUFFER) or _has(self.module, target):
                yield node, Binding("weight", target), _identifier(target)
            else:
                self.literals[target] = cast(torch.Tensor, self.exported.constants[str(spec.target)])
                yield node, Binding("literal", target), _identifier(target)

    def _input_leaves(self) -> Iterator[InputLeaf]:
        specs = {
            n.meta["binding"].key: n.meta["spec"]
            for n in self.graph.nodes
            if n.op == "placeholder" and n.meta["binding"].kind == "input"
        }
        for number, leaf in enumerate(self.leaves):
            yield specs[number] if number in specs else fixed(leaf)

    # -- nodes -------------------------------------------------------------------------------------------------------

    def _copy(self, owner: Any, env: dict[fx.Node, Any]) -> Sequence[Any]:
        """Copy the nodes of one graph, regions in line; what it returns."""
        for node in owner.graph.nodes:
            if node.op == "call_function" and not _is_assertion(node):
                env[node] = self._call_function(owner, node, env)
            elif node.op == "get_attr":
                env[node] = getattr(owner, str(node.target))
            elif node.op == "output":
                returned: Any = fx.map_arg(node.args[0], lambda n: env[n])
                return list(returned)
        raise AssertionError("a graph without output")

    def _call_function(self, owner: Any, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        args: list[Any] = [env[a] if isinstance(a, fx.Node) else a for a in node.args]
        if node.target is _torch.set_grad_region():
            results = self._region(args[1], args[2:])
            return results if args[0] else [self._detached(r) for r in results]
        if node.target is _torch.autocast_region():
            return self._autocast(node, args)
        if node.target is operator.getitem and isinstance(args[0], (list, tuple)):
            return args[0][args[1]]
        name = _torch.takes_functions_name(node.target)
        if name:
            raise Refused(f"it calls {name}, which takes functions", PLAIN, node)
        new = self.graph.node_copy(node, lambda n: env[n])
        return self._keep(node, new)

    def _region(self, body: Any, args: Sequence[Any]) -> Sequence[Any]:
        places = [n for n in body.graph.nodes if n.op == "placeholder"]
        return self._copy(body, dict(zip(places, args, strict=True)))

    def _autocast(self, node: fx.Node, args: Sequence[Any]) -> Sequence[Any]:
        device, _, enabled, _, body, *rest = args
        if enabled or torch.is_autocast_enabled(str(device)):
            cause = f"it switches autocast {'on' if enabled else 'off'}, whose casts a program does not hold"
            inside = _first_line(body.graph.nodes)
            raise Refused(cause, "cast explicitly in the model, or trace without autocast", inside)
        return self._region(body, rest)

    def _detached(self, value: Any) -> Any:
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get("spec"), TensorSpec):
            return value
        node = self.graph.call_function(torch.ops.aten.detach.default, (value,))
        node.meta.update(value.meta)
        self._retarget(value, node)
        return node

    def _retarget(self, old: fx.Node, new: fx.Node) -> None:
        for time, name in self.by_time.items():
            if name == old.name:
                self.by_time[time] = new.name

    def _keep(self, old: fx.Node, new: fx.Node) -> fx.Node:
        """Give a copied node its spec and origin, and nothing else of export's."""
        value, tag = old.meta.get("val"), (old.meta.get("custom") or {}).get(TAG)
        if _torch.is_transformed(value):
            line = _first_line([old, *old.users])
            raise Refused("it calls torch.func.grad or the like, which takes functions", PLAIN, line)
        new.meta = {"spec": spec_of(value, self.names, self.storages, new.name)}
        if tag is not None and old.op == "call_function":
            self.last = Origin(max(tag[1], 0), tag[0], _line(old, self.libraries) or self.lines.get(tag[1], ""))
            self.by_time.setdefault(tag[0], new.name)
        new.meta["origin"] = self.last if old.op == "call_function" else Origin()
        return new

    def _call(self, call: Call) -> Call:
        return replace(call, inputs=self._structure(call.inputs), output=self._structure(call.output))

    def _structure(self, structure: Structure) -> Structure:
        """References by time become references by node."""
        names = (self.by_time.get(int(x.node)) if isinstance(x, Ref) else "" for x in structure.leaves)
        renamed = {symbol(str(old)): new for old, new in self.names.items()}
        sized = [_renamed(x, renamed) if isinstance(x, SizeRef) else x for x in structure.leaves]
        pairs = zip(sized, names, strict=True)
        return replace(
            structure,
            leaves=tuple(x if n == "" else Ref(n) if n else Opaque("unused tensor") for x, n in pairs),
        )


def _renamed(size: SizeRef, names: Mapping[Any, sympy.Symbol]) -> SizeRef:
    expr = parse_dims(size.expr)[0]
    return size if isinstance(expr, int) else SizeRef(str(expr.xreplace(names)))


def _is_assertion(node: fx.Node) -> bool:
    name = str(node.target)
    return (
        name.startswith(("aten._assert", "aten.sym_constrain_range", "aten._assert_tensor_metadata"))
        or name == "<built-in function assert_>"
    )


def _is_dead(node: fx.Node) -> bool:
    """Sizes nobody uses go; every operator stays: it can be addressed."""
    return node.op == "call_function" and not isinstance(node.meta.get("spec"), (TensorSpec, tuple)) and not node.users


def _identifier(name: str) -> str:
    """The name as a Python identifier."""
    plain = re.sub(r"\W", "_", name)
    return plain if plain.isidentifier() and not keyword.iskeyword(plain) else f"m_{plain}"


def _has(module: nn.Module, path: str) -> bool:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return isinstance(found, torch.Tensor)


def _argument_path(function: Any, path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A readable name for one input leaf: the parameter's name, then keys."""
    place, *rest = path if path else (0, 0)
    if place == 0:
        names = _parameter_names(function)
        return (names[rest[0]] if rest[0] < len(names) else f"argument_{rest[0]}", *rest[1:])
    return tuple(str(r).replace(".", "_") for r in rest)


def _parameter_names(function: Any) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds]


def _first_line(nodes: Iterable[fx.Node]) -> fx.Node | None:
    """The first node that knows its line."""
    return next((node for node in nodes if node.meta.get("stack_trace")), None)


def _line(node: fx.Node, libraries: Libraries) -> str:
    """``file:line`` of the innermost line that made the node."""
    lines = stack_lines(node)
    return f"{libraries.short(lines[-1][0])}:{lines[-1][1]}" if lines else ""
