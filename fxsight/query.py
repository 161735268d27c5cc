"""What is asked of operations, and which calls answer it: ``ops.find(target="relu", shape=("batch", 64))``."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import sympy
import torch
from torch import nn

from fxsight import _torch
from fxsight.address import Address
from fxsight.book import Call
from fxsight.conditions import Candidate, Selector, selector_of
from fxsight.facts import tensor_spec_of
from fxsight.look import Look
from fxsight.node import origin_of
from fxsight.node_call import operator_name
from fxsight.program import Program
from fxsight.selectors import chosen
from fxsight.spec import Dim, parse_dims, parse_tensor
from fxsight.targets import target_name

WantedDim = Dim | str | EllipsisType | None


@dataclass(frozen=True)
class Query:
    """What is asked of operations, as in ``Operations.find``; what is None is not asked for.

    selector: of the operations of the body.  target: pattern for the name of what is called, or of an operator it made.
    """

    selector: Selector | None
    name: str | None
    target: str | None
    dtype: torch.dtype | None
    dims: tuple[Dim | EllipsisType | None, ...] | None
    module_class: str | type[nn.Module] | None

    @staticmethod
    def of(selector: Any, name: Any, target: Any, shape: Any, module_class: Any) -> Query:
        """What a user asks for.

        Raises: TypeError, saying what is meant; SelectionError for what is no selector.
        """
        if selector is None and name is None and target is None and shape is None and module_class is None:
            raise TypeError("find what? Give a selector, or at least one of name=, target=, shape=, module_class=")
        places = None if selector is None else selector_of(selector)
        if not isinstance(name, str | None):
            raise TypeError(f"name={name!r}: give a pattern of names, such as 'self_c_*'")
        is_class = isinstance(module_class, type) and issubclass(module_class, nn.Module)
        if not is_class and not isinstance(module_class, str | None):
            raise TypeError(f"module_class={module_class!r}: give a class of modules, or its name")
        dtype, dims = (None, None) if shape is None else _wanted_shape(shape)
        return Query(places, name, _wanted_target(target), dtype, dims, module_class)

    def answers(self, look: Look, address: Address, recursive: bool) -> list[Address]:
        """The addresses of the operations in the body at an address for which all that is asked holds.

        recursive: those below it, too.

        Raises: TraceError before a capture; UnknownAddress, NotExecuted for the body; SelectionError where the selector
        selects none of its operations.
        """
        calls, program = _calls(look, address, recursive)
        made = _operators_made(program)
        known = [_candidate(call, look, program, made) for call in calls]
        found = known if self.selector is None else chosen(self.selector, known)
        return [_address(at.handle, program) for at in found if self._matches(at.handle, at.labels, look, program)]

    def _matches(self, call: Call, labels: Sequence[str], look: Look, program: Program) -> bool:
        """Whether all else that is asked holds for a call."""
        spec = tensor_spec_of(call.output, program)
        return (
            (self.name is None or fnmatch.fnmatchcase(call.name, self.name))
            and (self.target is None or bool(fnmatch.filter(labels[1:], self.target)))
            and (self.dtype is None or (spec is not None and spec.dtype == self.dtype))
            and (self.dims is None or (spec is not None and _fits(self.dims, spec.shape, look)))
            and (self.module_class is None or self._is_of_class(call, look))
        )

    def _is_of_class(self, call: Call, look: Look) -> bool:
        classes = type(look.module(call.module)).__mro__ if call.kind == "module" else ()
        return any(self.module_class in (cls, cls.__name__) for cls in classes)


def _wanted_target(target: Any) -> str | None:
    """A pattern for the names that calls of ``target`` have."""
    if target is None or isinstance(target, str):
        return target
    if isinstance(target, _torch.OpOverload):
        return target_name(target)
    name = getattr(target, "__name__", None)
    if not callable(target) or not isinstance(name, str):
        raise TypeError(f"target={target!r}: give a function, class or operator, or a pattern such as 'tanh'")
    return name.strip("_")


def _wanted_shape(shape: Any) -> tuple[torch.dtype | None, tuple[Dim | EllipsisType | None, ...]]:
    """Dtype, if it is given, and dimensions."""
    try:
        return parse_tensor(shape) if isinstance(shape, str) else (None, tuple(map(_wanted_dim, shape)))
    except (SyntaxError, TypeError, ValueError):  # TextError is a ValueError
        example = "('batch', None, 64) or 'f32[batch, length, 64]'"
        raise TypeError(f"shape={shape!r}: give sizes, such as {example}") from None


def _wanted_dim(dim: Any) -> Dim | EllipsisType | None:
    if isinstance(dim, str):
        (parsed,) = parse_dims(dim)
        return parsed
    if dim is None or dim is ... or isinstance(dim, int | sympy.Expr):
        return dim
    raise TypeError


def _fits(wanted: Sequence[Dim | EllipsisType | None], shape: Sequence[Dim], look: Look) -> bool:
    """Whether a shape is the wanted one."""
    gap = next((i for i, w in enumerate(wanted) if w is ...), None)
    if gap is not None:
        more = len(shape) - len(wanted) + 1
        wanted = (*wanted[:gap], *[None] * max(more, 0), *wanted[gap + 1 :])
    if len(wanted) != len(shape):
        return False
    return all(w is None or w in (h, look.number(h)) for w, h in zip(wanted, shape, strict=True))


def _calls(look: Look, address: Address, recursive: bool) -> tuple[list[Call], Program]:
    """The calls in this body; for a module without a forward (``ModuleList``), those of its modules."""
    body = look.body(address)
    program = body.program or look.places(Address("")).program
    book, path = program.book, f"{address.module}."
    if body.call is not None:
        below = list(book.within(body.call))[1:]
        return below if recursive else list(book.children(body.call)), program
    if address.steps:
        return [], program
    parts = [c for c in book.modules.values() if c.module.startswith(path)]
    top = [c for c in parts if not book.calls[c.parent or 0].module.startswith(path)]
    if not top:
        look.find(address)  # says that the module is not called
    return [c for t in top for c in (book.within(t) if recursive else (t,))], program


def _candidate(call: Call, look: Look, program: Program, made: Mapping[int, list[str]]) -> Candidate:
    """A call that may be selected: its name in the source, what it calls, and the operators it made itself."""
    path = _address(call, program).module
    operators = made.get(call.id, []) if call.kind == "torch" else []
    return Candidate(look.module(path), path, (call.name, call.title, call.title.strip("_"), *operators), call)


def _address(call: Call, program: Program) -> Address:
    return program.book.address(program.book.calls[call.parent or 0]).step(call.name, call.n)


def _operators_made(program: Program) -> Mapping[int, list[str]]:
    """Names of the operators that each call made itself, by its number in the book."""
    made: dict[int, list[str]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            made.setdefault(origin_of(node).call, []).append(operator_name(node))
    return made
