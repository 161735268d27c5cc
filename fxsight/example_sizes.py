"""A number for each free size that an operator depends on: with them it is traced when it is opened.

The numbers are all different, so that nothing in the trace takes one size for another, except where the operator works
with equal ones only: a program has a name for each size of its inputs, also where the model needs two to be equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import sympy

from fxsight import _torch
from fxsight.errors import UnknownAddress
from fxsight.node import Size
from fxsight.spec import SizeSpec, Spec, TensorSpec

Numbers = Mapping[sympy.Symbol, int]
_SMALLEST = 5  # above the sizes that are special: 0, 1, and what is counted in formulas


@dataclass(frozen=True)
class Known:
    """What a program says of some of its sizes: their bounds, and conditions on them alone."""

    sizes: tuple[Size, ...]
    guards: tuple[Any, ...]

    @staticmethod
    def of(symbols: Sequence[sympy.Symbol], sizes: Sequence[Size], guards: Sequence[Any]) -> Known:
        """That of the given sizes."""
        names = {s.name for s in symbols}
        about = (g for g in guards if {s.name for s in g.free_symbols} <= names)
        return Known(tuple(s for s in sizes if s.name in names), tuple(sorted(about, key=str)))


def symbols_of(specs: Sequence[Spec], strides: bool = True) -> list[sympy.Symbol]:
    """The sizes in some specs, by name; those that only strides tell of with ``strides``."""
    named = {s.name: s for spec in specs for dim in _dims(spec, strides) for s in dim.free_symbols}
    return [named[name] for name in sorted(named)]


def _dims(spec: Spec, strides: bool) -> Iterator[Any]:
    if isinstance(spec, SizeSpec):
        yield spec.expr
    elif isinstance(spec, TensorSpec):
        yield from (d for d in (*spec.shape, *(spec.stride if strides else ())) if not isinstance(d, int))


def size_number(dim: Any, numbers: Numbers) -> int:
    """A dimension at an example of each size."""
    return dim if isinstance(dim, int) else int(dim.xreplace(numbers))


def example_sizes(symbols: Sequence[sympy.Symbol], known: Known, works: Callable[[Numbers], bool]) -> Numbers:
    """The numbers; equal ones where the operator works with equal ones only.

    works: whether the operator can be called with given numbers.

    Raises: UnknownAddress when sizes have to fit in a way that is neither that nor said by the program.
    """

    equations = [g for g in known.guards if isinstance(g, sympy.Eq)]
    unit = math.lcm(*(d for g in known.guards for d in _divisors(g)))

    def fits(numbers: Numbers) -> bool:
        found = _multiplied(numbers, known)
        return all(g.xreplace(found) != False for g in equations) and works(found)  # noqa: E712

    numbers = dict(zip(symbols, _distinct(symbols, known, unit), strict=True))
    if not fits(numbers):
        for first, number in list(numbers.items()):
            if numbers[first] == number:  # not yet among the equals of another
                numbers.update(dict.fromkeys(_equals(first, symbols, unit, fits), number))
    found = _multiplied(numbers, known)
    if not (fits(numbers) and _hold(known, found)):
        raise _unknown(symbols)
    return found


def _divisors(guard: Any) -> Iterator[int]:
    """The numbers by which sizes are divided."""
    for part in sympy.preorder_traversal(guard):
        if part.func in (_torch.mod, _torch.floor_div) and part.args[1].is_Integer:
            divisor: Any = part.args[1]
            yield int(divisor)


def _distinct(symbols: Sequence[sympy.Symbol], known: Known, unit: int) -> Iterator[int]:
    """Primes times the unit within the bounds of the sizes; the bound itself where there is none."""
    bounds = {size.name: size for size in known.sizes}
    taken: set[int] = set()
    for symbol in symbols:
        size = bounds.get(symbol.name, Size(symbol.name))
        prime = sympy.nextprime(max(_SMALLEST, -(-size.low // unit)) - 1)
        while int(prime) in taken:
            prime = sympy.nextprime(prime)
        taken.add(int(prime))
        yield int(prime) * unit if size.high is None else min(int(prime) * unit, size.high)


def _multiplied(numbers: Numbers, known: Known) -> Numbers:
    """With sizes that are known to be multiples as multiples."""
    made = dict(numbers)
    for guard in known.guards:
        if isinstance(guard, sympy.Eq) and guard.rhs == 0 and guard.lhs.func is _torch.mod:
            parts: Any = guard.lhs.args
            multiple, unit = parts
            if multiple in made:
                made[multiple] *= size_number(unit, made)
    return made


def _hold(known: Known, numbers: Numbers) -> bool:
    bounds = {size.name: size for size in known.sizes}
    within = all(s.name not in bounds or _is_within(bounds[s.name], n) for s, n in numbers.items())
    return within and all(guard.xreplace(numbers) != False for guard in known.guards)  # noqa: E712


def _is_within(size: Size, number: int) -> bool:
    return size.low <= number and (size.high is None or number <= size.high)


def _equals(
    first: sympy.Symbol, symbols: Sequence[sympy.Symbol], unit: int, fits: Callable[[Numbers], bool]
) -> tuple[sympy.Symbol, ...]:
    """The fewest sizes that have to be equal to ``first``.

    Raises: UnknownAddress when sizes have to fit in another way.
    """
    others = [s for s in symbols if s is not first]
    for more in chain.from_iterable(combinations(others, count) for count in range(len(others) + 1)):
        equal = (first, *more)
        numbers = {s: (5 if s in equal else 7) * unit for s in symbols}
        if fits(numbers):
            if any(fits({**numbers, s: 10 * unit}) for s in equal if more):
                break
            return equal
    raise _unknown(symbols)


def _unknown(symbols: Sequence[sympy.Symbol]) -> UnknownAddress:
    return UnknownAddress(f"its sizes {', '.join(map(str, symbols))} fit in a way that is not known before it runs")
