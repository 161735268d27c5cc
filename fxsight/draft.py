"""Random programs, written line by line."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class _Value:
    """A value of a draft: f32[batch, width], with the distance of its rows in memory."""

    name: str
    width: int = 8
    row: int = 8
    storage: str = ""

    def note(self) -> str:
        """The note behind its line."""
        stride = f"stride='{self.row}, 1', " if self.row != self.width else ""
        shares = f"shares={self.storage!r}" if self.storage != self.name else ""
        return f"# f32[batch, {self.width}]" + (f"  {{{stride}{shares}}}" if shares else "")


_GIVEN: tuple[str, ...] = (
    "x: 'input 0'  # f32[batch, 8]",
    "y: 'input 1'  # f32[batch, 8]",
    "weight: 'weight weight'  # f32[8, 8]",
    "bias: 'weight bias'  # f32[8]",
)


@dataclass
class Draft:
    """A random program being written. Every method appends lines."""

    rng: random.Random
    lines: list[str] = field(default_factory=lambda: list(_GIVEN))
    values: list[_Value] = field(default_factory=lambda: [_Value("x", storage="x"), _Value("y", storage="y")])

    def unary(self) -> None:
        """One value to another."""
        name = self.rng.choice(["relu", "neg", "tanh", "sigmoid", "abs"])
        x = self._any()
        self._new(f"aten.{name}.default({x.name})", x.width)

    def binary(self) -> None:
        """Two values of one width to a third."""
        x = self._any()
        y = self._any(x.width)
        self._new(f"aten.{self.rng.choice(['add', 'sub', 'mul'])}.Tensor({x.name}, {y.name})", x.width)

    def linear(self) -> None:
        """A weight."""
        self._new(f"aten.linear.default({self._any(8).name}, weight, bias)")

    def border(self) -> None:
        """Where a value enters or leaves a module."""
        x = self._any()
        self._new(f"aten.alias.default({x.name})", like=x)

    def view(self) -> None:
        """Half of the columns, in the same memory."""
        x = self._any(8)
        start = self.rng.choice([0, 4])
        self._new(f"aten.slice.Tensor({x.name}, 1, {start}, {start + 4})", like=replace(x, width=4))

    def stack(self) -> None:
        """Two values stacked, and one of them taken out again."""
        name = f"stack_{len(self.lines)}"
        members = f"[{self._any(8).name}, {self._any(8).name}]"
        self.lines.append(f"{name} = aten.stack.default({members})  # f32[2, batch, 8]")
        self._new(f"aten.select.int({name}, 0, {self.rng.randrange(2)})", like=_Value("", storage=name))

    def dropout(self) -> None:
        """Random numbers."""
        name = f"dropout_{len(self.lines)}"
        call = f"aten.native_dropout.default({self._any(8).name}, 0.5, True)"
        self.lines.append(f"{name} = {call}  # (f32[batch, 8], b1[batch, 8])")
        self._new(f"operator.getitem({name}, 0)", like=_Value("", storage=f"{name}[0]"))

    def change(self) -> None:
        """A value changed in place: all with its memory see it. Inputs and weights are left alone."""
        own = [v for v in self.values if v.storage not in ("x", "y")]
        if own:
            x = self.rng.choice(own)
            call = self.rng.choice(["aten.mul_.Tensor({}, 0.5)", "aten.relu_.default({})", "aten.add_.Tensor({}, 1.0)"])
            self._new(call.format(x.name), like=x)

    def text(self) -> str:
        """The finished program; it returns some of the values."""
        returned = self.rng.sample(self.values, min(len(self.values), self.rng.randint(1, 3)))
        return "\n".join([*self.lines, f"return ({', '.join(v.name for v in returned)},)"])

    def _any(self, width: int | None = None) -> _Value:
        return self.rng.choice([v for v in self.values if width in (None, v.width)])

    def _new(self, call: str, width: int = 8, like: _Value | None = None) -> None:
        name = f"v{len(self.values)}"
        value = _Value(name, width, width, name) if like is None else replace(like, name=name)
        self.lines.append(f"{name} = {call}  {value.note()}")
        self.values.append(value)
