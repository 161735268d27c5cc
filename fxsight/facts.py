"""What is known of one operation, and the types of structured values as text."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxsight.address import Address
from fxsight.book import Call, Const, Leaf, Opaque, Ref, SizeRef, Structure, Weight
from fxsight.look import Look, node_of
from fxsight.node import Binding, origin_of
from fxsight.node_call import operator_name
from fxsight.place import Place
from fxsight.program import Program
from fxsight.spec import SizeSpec, Spec, TensorSpec


@dataclass(frozen=True)
class Facts:
    """What a program knows of the operation at a place: a call, or an operator of the graph."""

    place: Place
    program: Program

    @staticmethod
    def of(look: Look, address: Address) -> Facts:
        """Those at an address.

        Raises: as ``Look.places``.
        """
        places = look.places(address)
        return Facts(places.find(address), places.program)

    @property
    def target(self) -> str:
        """What is called: the name of a torch function, Python function, module class, or operator."""
        call = self.place.call
        return operator_name(self.node) if call is None else call.title

    @property
    def title(self) -> str:
        """The same in words: ``module Conv1D at transformer.h.0.attn.c_proj``."""
        kind = "operator" if self.place.call is None else self.place.call.kind
        return f"{kind} {self.target}{f' at {self.place.address}' if kind == 'module' else ''}"

    @property
    def line(self) -> str:
        """Where it is called: ``file:line``."""
        call = self.place.call or self._maker
        return origin_of(self.node).line if call is None else call.line

    @property
    def inputs(self) -> str:
        """The types of its arguments: ``(f32[batch, 8],) {'dim': -1}``."""
        leaves, (args, kwargs) = self.place.inputs.leaves, self.place.inputs.tree.children
        given = value_text(Structure(args, leaves[: args.size]), self.program)
        named = value_text(Structure(kwargs, leaves[args.size :]), self.program)
        return given if named == "{}" else f"{given} {named}"

    @property
    def type(self) -> str:
        """Dtype and shape of the output: ``(f32[batch, length, 64], None)``."""
        return value_text(self.place.output, self.program)

    @property
    def spec(self) -> TensorSpec | None:
        """The spec of the output; None if it is not one tensor."""
        return tensor_spec_of(self.place.output, self.program)

    @property
    def count(self) -> int:
        """How many times it runs in one call of the body around it."""
        call, book = self.place.call, self.program.book
        if call is None or call.parent is None:
            return 1
        return sum(other.name == call.name for other in book.children(book.calls[call.parent]))

    @property
    def node(self) -> fx.Node:
        """The node of an operator."""
        return node_of(self.place, self.program)

    @property
    def _maker(self) -> Call | None:
        """The torch call that an operator comes from."""
        number, calls = origin_of(self.node).call, self.program.book.calls
        return calls[number] if number >= 0 and calls[number].kind == "torch" else None


def value_text(structure: Structure, program: Program) -> str:
    """The type of a structured value: ``f32[batch, length, 64]``, ``(f32[batch, 2, length, 16], None)``."""
    return structure.tree.text([_leaf_text(leaf, program) for leaf in structure.leaves])


def tensor_spec_of(structure: Structure, program: Program) -> TensorSpec | None:
    """The spec of a value that is one tensor; None for any other."""
    spec = _spec(structure.leaves[0], program) if structure.tree.kind == "leaf" else None
    return spec if isinstance(spec, TensorSpec) else None


def _spec(leaf: Leaf, program: Program) -> Spec:
    name = leaf.node if isinstance(leaf, Ref) else ""
    if isinstance(leaf, Weight):
        bindings = program.bindings.items()
        name = next((node for node, known in bindings if known == Binding("weight", leaf.name)), "")
    found: Spec = program.nodes[name].meta.get("spec") if name in program.nodes else None
    return found


def _leaf_text(leaf: Leaf, program: Program) -> str:
    match leaf:
        case Const(value):
            return repr(value)
        case SizeRef(expr):
            return expr
        case Opaque(name):
            return name
        case _:
            spec = _spec(leaf, program)
            return "tensor" if spec is None else _spec_text(spec)


def _spec_text(spec: Spec) -> str:
    if isinstance(spec, tuple):
        return f"({', '.join(map(_spec_text, spec))})"
    return str(spec.expr if isinstance(spec, SizeSpec) else spec)
