"""Fake values for a compiler: tensors with symbolic sizes and no data, made from specs and turned back into specs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxsight import _torch
from fxsight.errors import InputError
from fxsight.spec import SizeSpec, Spec, TensorSpec, number, spec_of, symbol


class Fakes:
    """Fake values over some named sizes.

    sizes: an example number for each, all different, so that equal numbers mean equal sizes.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.mode = _torch.symbolic_mode()
        self._sizes = sizes
        made = _torch.symbolic_sizes(self.mode, sizes)
        self._symbols = {symbol(name): _torch.size_expr(size) for name, size in made.items()}

    def of(self, spec: Spec) -> Any:
        """The fake value of a tensor or size; tensors have memory of their own.

        Raises: InputError for a size that depends on numbers.
        """
        if isinstance(spec, SizeSpec):
            return self._number(spec.expr)
        assert isinstance(spec, TensorSpec), f"no fake value for {spec}"
        shape, stride = [self._number(d) for d in spec.shape], [self._number(d) for d in spec.stride]
        with self.mode:
            return torch.empty_strided(shape, stride, dtype=spec.dtype, device=spec.device)

    def spec(self, value: Any) -> Spec:
        """The spec of a fake value, in the names of the sizes."""
        return spec_of(value, {mine: name for name, mine in self._symbols.items()}, {}, "")

    def guards(self) -> tuple[Any, ...]:
        """What has been taken for granted of the sizes because it holds for the examples, in their names."""
        env: Any = self.mode.shape_env
        names = {mine: name for name, mine in self._symbols.items()}
        return tuple(dict.fromkeys(guard.expr.xreplace(names) for guard in env.guards))

    def _number(self, dim: Any) -> Any:
        if isinstance(dim, int):
            return dim
        try:
            return _torch.symbolic_number(self.mode, dim.xreplace(self._symbols), number(dim, self._sizes))
        except InputError as error:
            raise _needs_numbers(error) from error


class Untraceable(Exception):
    """A graph that torch refuses for symbolic sizes; ``__cause__`` is what torch said."""


def propagate(module: fx.GraphModule, mode: Any, example: Sequence[Any]) -> list[Any]:
    """Give every node the fake value that a compiler expects.  Returns: those of the results.

    Raises: InputError where a size depends on numbers; Untraceable where torch refuses an operator.
    """

    class Propagate(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            n.meta["example_value"] = n.meta["val"] = result
            return result

    try:
        with torch.no_grad(), mode, _torch.numbers_of_tensors(mode):
            return list(Propagate(module).run(*example))
    except _torch.NeedsData as error:
        raise _needs_numbers(error) from error
    except Exception as error:
        raise Untraceable from error


def _needs_numbers(error: Exception) -> InputError:
    return InputError(f"the inductor tier needs sizes that only running the model tells: {error}; use backend='eager'")
