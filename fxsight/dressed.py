"""Structures of the model in a body: with ``.save()``, and watched for assignments to their members."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from fxsight.address import Address
from fxsight.errors import WriteError
from fxsight.past import Count
from fxsight.tree import flatten

Dressed = tuple[Any, list[Any], Address]  # a structure of the model's, its leaves, and where it is from


def undress(dressed: Iterable[Dressed]) -> None:
    """Take the ``.save`` of model outputs away again.

    Raises: WriteError when a member was assigned, which the model cannot see.
    """
    for structure, leaves, address in dressed:
        attributes: Any = vars(structure)
        attributes.pop("save", None)
        now = flatten(structure)[0]
        if len(now) != len(leaves) or any(not _is_same(a, b) for a, b in zip(now, leaves, strict=True)):
            raise WriteError(
                f"a member of {address} was assigned, which the model does not see; change it in place "
                f"(out.logits[:] = ...) or write the whole (model.{address.port} = ...)"
            )


def _is_same(now: Any, before: Any) -> bool:
    return now is before or (type(now) is Count and now == before)  # a count has no identity of its own


class Dresser:
    """Dresses the structures that one body reads.  keep: marks a structure as saved."""

    def __init__(self, keep: Callable[[Any], None]) -> None:
        self._keep = keep
        self._dressed: list[Dressed] = []

    def dress(self, structure: Any, address: Address) -> Any:
        """A dict, list, model output or dataclass of the model in a body: with ``.save()``, and watched for assignments
        to its members."""
        object.__setattr__(structure, "save", partial(self._save, structure))
        self._dressed.append((structure, list(flatten(structure)[0]), address))
        return structure

    def _save(self, structure: Any) -> Any:
        self._keep(structure)
        return structure

    def adopt(self, made: Any, structure: Any, leaves: list[Any]) -> None:
        """Watch a structure of the body's instead of one that was made now; ``leaves``: as it was."""
        self._dressed = [(structure, leaves, a) if s is made else (s, old, a) for s, old, a in self._dressed]

    def finish(self) -> None:
        """The block has ended: structures are as the model has them.

        Raises: WriteError when a member was assigned, which the model cannot see.
        """
        undress(self._dressed)
