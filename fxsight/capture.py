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
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import sympy
import torch
from torch import fx, nn

from fxsight import _torch
from fxsight.book import Book, Call, Opaque, Ref, SizeRef, Structure
from fxsight.capture_errors import Refused, capture_error
from fxsight.errors import InputError
from fxsight.node import Binding, Fixed, InputLeaf, Origin, Size
from fxsight.program import Program
from fxsight.provenance import TAG, Libraries, Scribe, stack_lines
from fxsight.sizes import bind_sizes
from fxsight.source import SourceReader
from fxsight.spec import TensorSpec, parse_dims, spec_of, symbol
from fxsight.state import restored
from fxsight.tree import Tree, flatten

AUTO = torch.export.Dim.AUTO
PLAIN = "write it with plain operators, or trace a submodule without it"


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
    method: str = "forward",
) -> list[Program]:
    """One program, or several when the first excludes these very inputs: the last holds for them.

    A model whose code asks whether the batch is one gets a program for one and another for more.
    method: what is called; its program stands where that of the forward does, at the root's address.

    Raises: CaptureError.
    """
    leaves, inputs = flatten((args, dict(kwargs)))
    made: list[Program] = []
    failure = _hidden(module)
    for plan in [] if failure else _plans(module, [x for x in leaves if isinstance(x, torch.Tensor)]):
        flat = _Flat(module, inputs, leaves, Scribe(module, reader or SourceReader(), on_tick), method)
        program = _attempt(flat, plan)
        if isinstance(program, Program):
            made.append(program)
            failure = _misfit(program, leaves)
            if failure is None:
                return made
            continue
        failure = program
        if _torch.takes_functions(failure):
            break  # whatever the sizes
    assert failure is not None, "there is always a plan"
    # The last plan is the inputs as they are: its error has their sizes in it.
    raise capture_error(_title(module, method), failure) from (None if isinstance(failure, Refused) else failure)


def _hidden(module: nn.Module) -> Exception | None:
    """Why there is nothing to see in a module, if so."""
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            cause = f"{path or 'it'} is compiled by torch.jit, which hides its operations"
            return Refused(cause, "use the module it was compiled from")
    return None


def _attempt(flat: _Flat, plan: Plan) -> Program | Exception:
    """The program, or why there is none this way."""
    try:
        with restored(flat.module):
            exported = _export(flat, plan)
    except _Stopped as stopped:
        return stopped.error
    except Exception as error:  # whatever torch raises becomes one CaptureError
        return error
    try:
        return _Builder(flat.module, flat, exported).program()
    except Refused as refused:
        return refused


def _misfit(program: Program, leaves: Sequence[Any]) -> InputError | None:
    """Why a program does not hold for the inputs that it was made with, if so."""
    try:
        bind_sizes(program, leaves)
    except InputError as error:
        return error
    return None


OnTick = Callable[[], None] | None
Shapes = tuple[dict[int, Any], ...]


@dataclass(frozen=True)
class Plan:
    """One way to export: example tensors, their free dimensions, and whether with transformers' patches."""

    tensors: tuple[torch.Tensor, ...]
    shapes: Shapes
    patched: bool = False


def _plans(module: nn.Module, tensors: list[torch.Tensor]) -> Iterator[Plan]:
    """What to try, freest first; at last the tensors as they are."""
    pair = len({t.shape[0] for t in tensors if t.ndim > 1} | {1}) == 1  # a batch of one is shown as a batch of two
    examples = tuple(t.expand(2, *t.shape[1:]).clone() if pair and t.ndim > 1 else t for t in tensors)
    free: Shapes = tuple(dict.fromkeys(range(t.ndim), AUTO) for t in tensors)
    outer: Shapes = tuple(dict.fromkeys(range(min(t.ndim, 2)), AUTO) for t in tensors)
    yield Plan(examples, free)
    yield Plan(tuple(tensors), free)
    yield Plan(examples, outer)
    if any(cls.__module__.startswith("transformers.") for cls in type(module).__mro__):
        yield Plan(examples, outer, patched=True)
        yield Plan(tuple(tensors), outer, patched=True)
    yield Plan(tuple(tensors), tuple({} for _ in tensors))


def _export(flat: _Flat, plan: Plan) -> torch.export.ExportedProgram:
    with ExitStack() as stack:
        stack.enter_context(_torch.honest_sizes())
        stack.enter_context(_torch.quiet_export())
        stack.enter_context(torch.random.fork_rng(devices=[]))  # a capture draws nothing from the user's numbers
        if plan.patched:
            stack.enter_context(_transformers_patches(flat.module))
        shapes = {"leaves": plan.shapes} if plan.tensors else None
        return torch.export.export(flat, plan.tensors, strict=False, dynamic_shapes=shapes)


@contextmanager
def _transformers_patches(module: nn.Module) -> Generator[None]:
    """What transformers itself changes in its models while exporting them (``transformers.exporters``)."""
    from transformers.exporters.exporter_dynamo import reset_model_state
    from transformers.exporters.utils import apply_patches

    with apply_patches("dynamo"), reset_model_state(module):
        yield


class _Flat(nn.Module):
    """The module as a function of its tensor leaves alone, watched by a scribe."""

    def __init__(self, module: nn.Module, inputs: Tree, leaves: Sequence[Any], scribe: Scribe, method: str) -> None:
        super().__init__()
        self.module = module
        self.inputs, self.leaves, self.scribe, self.method = inputs, leaves, scribe, method
        # What the call returned is kept in the scribe: export takes back what a module keeps while it traces.
        self.train(module.training)

    def train(self, mode: bool = True) -> _Flat:
        """Does not reach into the user's module."""
        self.training = mode
        return self

    def forward(self, *leaves: Any) -> tuple[Any, ...]:
        given = iter(leaves)
        args, kwargs = self.inputs.build([next(given) if isinstance(x, torch.Tensor) else x for x in self.leaves])
        buffers = dict(self.module.named_buffers(remove_duplicate=False))
        try:
            with self.scribe.watching():
                is_forward = self.method == "forward"
                output = (
                    self.module(*args, **kwargs) if is_forward else self.scribe.call_method(self.method, args, kwargs)
                )
            self._write_back(buffers)
        except Exception as error:
            raise _Stopped(error) from error
        found, tree = flatten(output)
        values = [isinstance(x, (torch.Tensor, torch.SymInt)) for x in found]
        fixed = tuple(None if is_value else _fixed(x) for x, is_value in zip(found, values, strict=True))
        self.scribe.returned = (tree, fixed)
        return tuple(x for x, is_value in zip(found, values, strict=True) if is_value)

    def _write_back(self, before: Mapping[str, torch.Tensor]) -> None:
        """A tensor put in the place of a buffer is copied into the buffer: a program knows buffers by name."""
        now = dict(self.module.named_buffers(remove_duplicate=False))
        changed = {name: now[name] for name in before if name in now and now[name] is not before[name]}
        shared = {_torch.storage_key(before[name]) for name in changed}
        for name, tensor in changed.items():
            if _layout(tensor) != _layout(before[name]):
                cause = f"it puts a tensor of another shape, dtype or device in the place of the buffer {name}"
                fix = "make the buffer like that from the start, or keep the tensor in an attribute"
                raise Refused(cause, fix, _torch.export_node(tensor))
            if _torch.storage_key(tensor) in shared:  # two buffers changed places
                changed[name] = tensor.clone()
        for name, tensor in changed.items():
            before[name].copy_(tensor)
        self.scribe.tick()


class _Stopped(Exception):
    """An error of the model on its way through torch.export, which prints errors that it knows and adds advice."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return [_torch.size_expr(size) for size in tensor.shape], tensor.dtype, tensor.device


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
            _title(self.module, self.flat.method),
            self.graph,
            self.flat.inputs,
            inputs,
            self.flat.scribe.returned[0],
            self.flat.scribe.returned[1],
            tuple(self._sizes()),
            tuple(self._guards()),
            Book(tuple(self._call(c.close()) for c in self.flat.scribe.calls), frozenset(self.flat.scribe.names)),
            self.literals,
        )

    # -- inputs ------------------------------------------------------------------------------------------------------

    def _placeholders(self, graph: fx.Graph) -> Iterator[tuple[fx.Node, Binding, str]]:
        nodes = {n.name: n for n in graph.nodes if n.op == "placeholder"}
        paths = ["_".join(map(str, _argument_path(self.flat, p))) for p in self.flat.inputs.paths()]
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


def _title(module: nn.Module, method: str) -> str:
    return type(module).__name__ if method == "forward" else f"{type(module).__name__}.{method}"


def _argument_path(flat: _Flat, path: tuple[Any, ...]) -> tuple[Any, ...]:
    """A readable name for one input leaf: the parameter's name, then keys."""
    place, *rest = path if path else (0, 0)
    if place == 0:
        names = _parameter_names(getattr(flat.module, flat.method))
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
