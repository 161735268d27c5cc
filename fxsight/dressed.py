"""Structures of the model in a body: with ``.save()``, and watched for assignments to their members."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from fxsight.address import Address
from fxsight.errors import WriteError
from fxsight.past import Count
from fxsight.tree import flatten


class Dressed(NamedTuple):
    """A structure of the model's in a body: its leaves, whether its members are still what they were, its place."""

    structure: Any
    leaves: list[Any]
    is_whole: Callable[[], bool]
    address: Address


def undress(dressed: Iterable[Dressed]) -> None:
    """Take the ``.save`` of model outputs away again.

    Raises: WriteError when a member was assigned, which the model cannot see.
    """
    for one in dressed:
        attributes: Any = vars(one.structure)
        attributes.pop("save", None)
        if not one.is_whole():
            raise WriteError(
                f"a member of {one.address} was assigned, which the model does not see; change it in place "
                f"(out.logits[:] = ...) or write the whole (model.{one.address.port} = ...)"
            )


def has_leaves(structure: Any, leaves: list[Any]) -> bool:
    """Whether these are the leaves of a structure."""
    now = flatten(structure)[0]
    return len(now) == len(leaves) and all(map(_is_same, now, leaves))


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
        leaves = list(flatten(structure)[0])
        self._dressed.append(Dressed(structure, leaves, partial(has_leaves, structure, leaves), address))
        return structure

    def _save(self, structure: Any) -> Any:
        self._keep(structure)
        return structure

    def adopt(self, made: Any, instead: Dressed) -> None:
        """Watch a structure of the body's instead of one that was made now."""
        self._dressed = [instead if one.structure is made else one for one in self._dressed]

    def finish(self) -> None:
        """The block has ended: structures are as the model has them.

        Raises: WriteError when a member was assigned, which the model cannot see.
        """
        undress(self._dressed)
