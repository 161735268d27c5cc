"""The grammar of addresses: the one name of every value in a model.

    transformer.h.3.mlp:output            what the module returned, its first call
    transformer.h.3.attn:output[0]        one member of it
    cell#2:input                          the first argument of the third call of ``cell``
    h.3.attn/split_1:output               an operation of the module's source
    h.3.attn/attention_interface_0/torch_nn_functional_scaled_dot_product_attention_0/softmax_0
    :output                               the root module's output

    address = module ["#" n] {"/" operation ["#" n]} [":" port {"[" key "]"}]
    port    = "output" | "input" | "inputs"

An address is a value: it prints as it is read (``Address.parse(str(a)) == a``), sorts, hashes, and says nothing
about any particular model. No torch here.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, replace

from fxsight.errors import AddressError

PORTS = ("output", "input", "inputs")
Key = int | str

_STEP = re.compile(r"(?P<name>[^\W\d]\w*)(?:#(?P<n>\d+))?")
_MODULE = re.compile(r"(?P<name>(?:[^\s./:#\[\]]+(?:\.[^\s./:#\[\]]+)*)?)(?:#(?P<n>\d+))?")
_KEY = re.compile(r"""\[(?P<key>-?\d+|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\]""")


@dataclass(frozen=True, order=True)
class Step:
    """One operation on the way down: its name in the source and which of its executions (0 is the first)."""

    name: str
    n: int = 0

    def __str__(self) -> str:
        return f"{self.name}#{self.n}" if self.n else self.name


@dataclass(frozen=True)
class Address:
    """The name of a place in a model: a module call, an operation in it, or a value there.

    module: dotted path as in ``named_modules`` (empty for the root).  call: which call of the module, 0 the first.
    steps: operations, outermost first.  port: one of ``PORTS``, or "" for the place itself.
    keys: the way to one member of a structured value.
    """

    module: str
    call: int = 0
    steps: tuple[Step, ...] = ()
    port: str = ""
    keys: tuple[Key, ...] = ()

    def __post_init__(self) -> None:
        if self.port and self.port not in PORTS:
            raise AddressError(f"no port {self.port!r}: a value is one of {', '.join(PORTS)}")
        if self.keys and not self.port:
            raise AddressError("keys need a port: write ':output[0]'")
        object.__setattr__(self, "_hash", hash((self.module, self.call, self.steps, self.port, self.keys)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined,no-any-return]

    def __str__(self) -> str:
        module = f"{self.module}#{self.call}" if self.call else self.module
        steps = "".join(f"/{step}" for step in self.steps)
        port = f":{self.port}" if self.port else ""
        return module + steps + port + "".join(f"[{key!r}]" for key in self.keys)

    def __lt__(self, other: Address) -> bool:
        return self._order() < other._order()

    def _order(self) -> tuple[object, ...]:
        natural = tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in self.module.split("."))
        keys = tuple((0, key, "") if isinstance(key, int) else (1, 0, key) for key in self.keys)
        return (natural, self.call, self.steps, self.port, keys)

    @property
    def place(self) -> Address:
        """The module call or operation, without port and keys."""
        return replace(self, port="", keys=())

    @property
    def parent(self) -> Address:
        """The place one level up: of an operation, the one that contains it; of a module, its parent module."""
        if self.steps:
            return Address(self.module, self.call, self.steps[:-1])
        return Address(self.module.rpartition(".")[0])

    def at(self, port: str, *keys: Key) -> Address:
        """The value at ``port`` of this place."""
        return replace(self, port=port, keys=keys)

    def step(self, name: str, n: int = 0) -> Address:
        """The operation ``name`` inside this place."""
        return Address(self.module, self.call, (*self.steps, Step(name, n)))

    @staticmethod
    def parse(text: str) -> Address:
        """Read an address.

        Raises: AddressError, showing where the text stops following the grammar.
        """
        place, colon, value = text.partition(":")
        module, *steps = place.split("/")
        head = _MODULE.fullmatch(module)
        if head is None:
            raise _bad(text, module)
        port, keys = _parse_value(text, value) if colon else ("", ())
        return Address(head["name"], int(head["n"] or 0), tuple(_parse_step(text, s) for s in steps), port, keys)


def _parse_step(text: str, step: str) -> Step:
    match = _STEP.fullmatch(step)
    if match is None:
        raise _bad(text, step)
    return Step(match["name"], int(match["n"] or 0))


def _parse_value(text: str, value: str) -> tuple[str, tuple[Key, ...]]:
    port, bracket, rest = value.partition("[")
    if port not in PORTS:
        raise AddressError(f"not an address: {text!r}: after ':' comes one of {', '.join(PORTS)}, not {port!r}")
    keys: list[Key] = []
    rest = bracket + rest
    while rest:
        match = _KEY.match(rest)
        if match is None:
            raise _bad(text, rest)
        keys.append(ast.literal_eval(match["key"]))
        rest = rest[match.end() :]
    return port, tuple(keys)


def _bad(text: str, part: str) -> AddressError:
    return AddressError(
        f"not an address: {text!r}: cannot read {part!r}; write for example 'h.3.mlp/self_act_0:output[0]'"
    )
