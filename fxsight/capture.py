"""Module and example inputs → program: ``torch.export`` with every free size left free.

The module is exported as it is, in its current mode, not functionalised: the program calls the same operators in the
same order as the module, so that its numbers are the module's own, bit for bit. What export leaves around the model's
own operators (assertions on sizes, ``no_grad`` regions) is folded into guards and plain nodes.
"""

from __future__ import annotations

import inspect
import keyword
import operator
import re
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import sympy
import torch
from torch import fx, nn

from fxsight import _torch
from fxsight.book import Book, Call, Opaque, Ref, SizeRef, Structure
from fxsight.errors import CaptureError, InputError
from fxsight.node import Binding, Fixed, InputLeaf, Origin, Size
from fxsight.program import Program
from fxsight.provenance import TAG, Libraries, Scribe
from fxsight.sizes import bind_sizes
from fxsight.source import SourceReader
from fxsight.spec import TensorSpec, parse_dims, spec_of, symbol
from fxsight.tree import Tree, flatten

AUTO = torch.export.Dim.AUTO


def capture(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    reader: SourceReader | None = None,
    on_tick: OnTick = None,
) -> Program:
    """The program of ``module(*args, **kwargs)``, for all sizes of the inputs that the model's code allows.

    The module is called once, on fake tensors: nothing is computed, and meta-device modules work.

    Raises: CaptureError with the model's line, when the model cannot be one graph.
    """
    return capture_all(module, args, kwargs, reader, on_tick)[-1]


def capture_all(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    reader: SourceReader | None = None,
    on_tick: OnTick = None,
) -> list[Program]:
    """One program, or several when the first excludes these very inputs: the last holds for them.

    A model whose code asks whether the batch is one gets a program for one and another for more.

    Raises: CaptureError.
    """
    leaves, inputs = flatten((args, dict(kwargs)))
    made: list[Program] = []
    failures: list[Exception] = []
    for plan in _plans([x for x in leaves if isinstance(x, torch.Tensor)]):
        flat = _Flat(module, inputs, leaves, Scribe(module, reader or SourceReader(), on_tick))
        try:
            exported = _export(flat, *plan)
        except Exception as error:  # whatever torch or the model raises becomes one CaptureError
            failures.append(error)
            continue
        made.append(_Builder(module, flat, exported).program())
        if _fits(made[-1], leaves):
            return made
    raise _capture_error(module, failures) from (failures[0] if failures else None)


def _fits(program: Program, leaves: Sequence[Any]) -> bool:
    try:
        bind_sizes(program, leaves)
    except InputError:
        return False
    return True


_ONE_AT_A_TIME = threading.RLock()  # torch.export has state that all threads share
OnTick = Callable[[], None] | None
Shapes = tuple[dict[int, Any], ...]


def _plans(tensors: list[torch.Tensor]) -> Iterator[tuple[tuple[torch.Tensor, ...], Shapes, bool]]:
    """What to try, freest first: example tensors, their free dimensions, and whether with transformers' patches."""
    pair = len({t.shape[0] for t in tensors if t.ndim > 1} | {1}) == 1  # a batch of one is shown as a batch of two
    examples = tuple(t.expand(2, *t.shape[1:]).clone() if pair and t.ndim > 1 else t for t in tensors)
    free: Shapes = tuple(dict.fromkeys(range(t.ndim), AUTO) for t in tensors)
    outer: Shapes = tuple(dict.fromkeys(range(min(t.ndim, 2)), AUTO) for t in tensors)
    yield examples, free, False
    yield tuple(tensors), free, False
    yield examples, outer, False
    yield examples, outer, True
    yield tuple(tensors), outer, True
    yield tuple(tensors), tuple({} for _ in tensors), False


def _export(
    flat: _Flat, tensors: tuple[torch.Tensor, ...], shapes: Shapes, patched: bool
) -> torch.export.ExportedProgram:
    with ExitStack() as stack:
        stack.enter_context(_ONE_AT_A_TIME)
        stack.enter_context(_torch.honest_sizes())
        stack.enter_context(torch.random.fork_rng(devices=[]))  # a capture draws nothing from the user's numbers
        if patched:
            stack.enter_context(_transformers_patches(flat.module))
        return torch.export.export(flat, tensors, strict=False, dynamic_shapes={"leaves": shapes})


@contextmanager
def _transformers_patches(module: nn.Module) -> Generator[None]:
    """What transformers itself changes in its models while exporting them (``transformers.exporters``)."""
    if not any(cls.__module__.startswith("transformers.") for cls in type(module).__mro__):
        raise CaptureError("not a transformers model")
    from transformers.exporters.exporter_dynamo import reset_model_state
    from transformers.exporters.utils import apply_patches

    with apply_patches("dynamo"), reset_model_state(module):
        yield


class _Flat(nn.Module):
    """The module as a function of its tensor leaves alone, watched by a scribe."""

    def __init__(self, module: nn.Module, inputs: Tree, leaves: Sequence[Any], scribe: Scribe) -> None:
        super().__init__()
        self.module = module
        self.inputs, self.leaves, self.scribe = inputs, leaves, scribe
        # What the call returned is kept in the scribe: export takes back what a module keeps while it traces.
        self.train(module.training)

    def train(self, mode: bool = True) -> _Flat:
        """Does not reach into the user's module."""
        self.training = mode
        return self

    def forward(self, *leaves: Any) -> tuple[Any, ...]:
        given = iter(leaves)
        args, kwargs = self.inputs.build([next(given) if isinstance(x, torch.Tensor) else x for x in self.leaves])
        with self.scribe.watching():
            output = self.module(*args, **kwargs)
        found, tree = flatten(output)
        values = [isinstance(x, (torch.Tensor, torch.SymInt)) for x in found]
        fixed = tuple(None if is_value else _fixed(x) for x, is_value in zip(found, values, strict=True))
        self.scribe.returned = (tree, fixed)
        return tuple(x for x, is_value in zip(found, values, strict=True) if is_value)


def _fixed(value: Any) -> Fixed:
    plain = value is None or isinstance(value, (bool, int, float, str))
    return Fixed(value if plain else f"<{type(value).__qualname__}>")


class _Builder:
    """Turns what torch.export returns into a program."""

    def __init__(self, module: nn.Module, flat: _Flat, exported: torch.export.ExportedProgram) -> None:
        self.module, self.flat, self.exported = module, flat, exported
        self.graph = fx.Graph()
        self.literals: dict[str, torch.Tensor] = {}
        self.names: dict[Any, sympy.Symbol] = {}
        self.storages: dict[int, str] = {}
        self.by_time: dict[int, str] = {}
        self.lines = {c.id: c.line for c in flat.scribe.calls}
        self.last = Origin(0, 0)  # what export adds in front belongs to the root
        self.libraries = Libraries()

    def program(self) -> Program:
        """The finished program."""
        old = self.exported.graph_module.graph
        self._name_sizes(old)
        env: dict[fx.Node, Any] = {}
        for node, binding, name in self._placeholders(old):
            place = self.graph.placeholder(name)
            place.target = place.name  # the name may have been taken: code is generated from the target
            env[node] = self._keep(node, place)
            env[node].meta["binding"] = binding
        returned = self._copy(self.exported.graph_module, env)
        self.graph.output(tuple(returned))
        self.graph.eliminate_dead_code(lambda node: not _is_dead(node))
        inputs = tuple(self._input_leaves())
        return Program(
            type(self.module).__name__,
            self.graph,
            self.flat.inputs,
            inputs,
            self.flat.scribe.returned[0],
            self.flat.scribe.returned[1],
            tuple(self._sizes()),
            tuple(self._guards()),
            Book(tuple(self._call(c.close()) for c in self.flat.scribe.calls)),
            self.literals,
        )

    # -- inputs ------------------------------------------------------------------------------------------------------

    def _placeholders(self, graph: fx.Graph) -> Iterator[tuple[fx.Node, Binding, str]]:
        nodes = {n.name: n for n in graph.nodes if n.op == "placeholder"}
        paths = ["_".join(map(str, _argument_path(self.module, p))) for p in self.flat.inputs.paths()]
        tensors = [i for i, leaf in enumerate(self.flat.leaves) if isinstance(leaf, torch.Tensor)]
        inputs = iter(tensors)
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
        for number, leaf in enumerate(self.flat.leaves):
            yield specs[number] if isinstance(leaf, torch.Tensor) else _fixed(leaf)

    # -- sizes -------------------------------------------------------------------------------------------------------

    def _name_sizes(self, graph: fx.Graph) -> None:
        """``batch`` and ``length`` for the first two dimensions, then the input's name and the dimension."""
        self.names.update(self._settled_sizes())
        inputs = {s.arg.name for s in self.exported.graph_signature.input_specs if s.kind.name == "USER_INPUT"}
        for node in graph.nodes:
            if node.name in inputs and isinstance(node.meta.get("val"), torch.Tensor):
                for dim, size in enumerate(node.meta["val"].shape):
                    expr = _torch.size_expr(size)
                    if expr.is_Symbol and expr not in self.names:
                        self.names[expr] = symbol(self._size_name(dim))

    def _settled_sizes(self) -> Mapping[Any, Any]:
        """Symbols that the model's code has pinned to a number."""
        env = self._shape_env()
        if env is None:
            return {}
        pinned = {s: e for s, e in env.replacements.items() if e.is_Integer}
        equal = [g.expr for g in env.guards if isinstance(g.expr, sympy.Eq)]
        pinned.update({e.lhs: e.rhs for e in equal if e.lhs.is_Symbol and e.rhs.is_Integer})
        return pinned

    def _shape_env(self) -> Any:
        tensors = (n.meta.get("val") for n in self.exported.graph.nodes)
        return _torch.shape_env(next((t for t in tensors if isinstance(t, torch.Tensor)), None))

    def _size_name(self, dim: int) -> str:
        plain = ("batch", "length", "height", "width")
        taken = {str(s) for s in self.names.values()}
        name = plain[dim] if dim < len(plain) else f"size_{dim}"
        return name if name not in taken else next(f"{name}_{i}" for i in range(2, 1000) if f"{name}_{i}" not in taken)

    def _sizes(self) -> Iterator[Size]:
        for old, new in [(old, new) for old, new in self.names.items() if new.is_Symbol]:
            bounds = self.exported.range_constraints.get(old)
            low = int(bounds.lower) if bounds is not None and bounds.lower.is_finite else 0
            finite = bounds is not None and bounds.upper.is_Integer and bounds.upper < 2**62
            yield Size(new.name, max(low, 0), int(bounds.upper) if finite and bounds is not None else None)

    def _guards(self) -> Iterator[Any]:
        env = self._shape_env()
        seen: set[Any] = set()
        for guard in () if env is None else env.guards:
            expr = guard.expr.xreplace(self.names)
            known = all(s in self.names.values() for s in expr.free_symbols)
            if known and expr.free_symbols and expr not in seen:
                seen.add(expr)
                yield expr

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
        new = self.graph.node_copy(node, lambda n: env[n])
        return self._keep(node, new)

    def _region(self, body: Any, args: Sequence[Any]) -> Sequence[Any]:
        places = [n for n in body.graph.nodes if n.op == "placeholder"]
        return self._copy(body, dict(zip(places, args, strict=True)))

    def _autocast(self, node: fx.Node, args: Sequence[Any]) -> Sequence[Any]:
        device, _, enabled, _, body, *rest = args
        if enabled or torch.is_autocast_enabled(str(device)):
            raise CaptureError(
                f"{type(self.module).__name__} switches autocast {'on' if enabled else 'off'} in its own forward, "
                "under which "
                "its operators would be captured without their casts; cast explicitly, or trace without autocast"
            )
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


def _argument_path(module: nn.Module, path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A readable name for one input leaf: the parameter's name, then keys."""
    place, *rest = path if path else (0, 0)
    if place == 0:
        names = _parameter_names(module)
        return (names[rest[0]] if rest[0] < len(names) else f"argument_{rest[0]}", *rest[1:])
    return tuple(str(r).replace(".", "_") for r in rest)


def _parameter_names(module: nn.Module) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds]


def _line(node: fx.Node, libraries: Libraries) -> str:
    """``file:line`` of the innermost line of the model that made the node."""
    trace = (node.meta.get("stack_trace") or "").strip().splitlines()
    places = [line for line in trace if line.lstrip().startswith('File "')]
    if not places:
        return ""
    _, file, rest = places[-1].split('"', 2)
    return f"{libraries.short(file)}:{rest.split('line ')[1].split(',')[0]}"


def _capture_error(module: nn.Module, failures: Sequence[Exception]) -> CaptureError:
    """The first failure in words, at the model's line."""
    error = failures[0]
    cause, fix = _explain(error)
    place = _model_line(error)
    message = f"{type(module).__name__} cannot be captured as one graph: {cause}"
    return CaptureError(f"{message}\n  at {place}\n  {fix}" if place else f"{message}\n  {fix}")


def _explain(error: Exception) -> tuple[str, str]:
    text = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, CaptureError):
        return text, "see docs/capture.md"
    if isinstance(error, _torch.NeedsData):
        return (
            "its control flow or a size depends on the numbers in a tensor",
            "use torch.where or torch.cond in the model, or trace a submodule that has no such branch",
        )
    if isinstance(error, NotImplementedError):
        return f"an operator has no shape rule: {text}", "register one with torch.library.register_fake"
    return (
        f"{type(error).__name__}: {text}",
        "run the module itself on these inputs first; if that works, see docs/capture.md",
    )


def _model_line(error: Exception) -> str:
    """The innermost line of the model in a traceback."""
    libraries = Libraries()
    own = [f for f in traceback.extract_tb(error.__traceback__) if libraries.is_model_code(f.filename)]
    return f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else ""
