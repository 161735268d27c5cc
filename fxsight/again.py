"""The known way of a body: what a statement gave the last time, with values of this body."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

from fxsight.dressed import Dressed
from fxsight.keys import Keys
from fxsight.known import Number, Step
from fxsight.value import Members, Value, keep


class Again(Keys, ABC):
    """The values of one body, numbered as they are made.  names: of the model's weights by ``id``."""

    live: bool
    """Whether statements go through the walk."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__(names)
        self.values: list[Value] = []
        self._dressed: list[Dressed] = []
        self._building = False

    @abstractmethod
    def leave(self) -> None:
        """What follows is recorded and not remembered."""

    @abstractmethod
    def _statement(self, key: Any, what: str, given: tuple[Any, ...]) -> Any:
        """One statement, remembered or written down."""

    @abstractmethod
    def _value(self, step: Step, number: int) -> Value:
        """One of the values that a statement makes, the next of this body."""

    def _again(self, step: Step) -> Any:
        """What the statement gave, with values of this body."""
        if step.kind == "same":
            return self.values[step.data]
        if step.kind == "many":
            tree, leaves, is_members = step.data
            made = [self._value(step, leaf) if type(leaf) is Number else leaf for leaf in leaves]
            return self._members(made) if is_members else tree.build(made)
        if step.kind == "fields":
            return self._structure(step)
        return step.data

    def _structure(self, step: Step) -> Any:
        """A model output or dataclass, as the recorder makes it."""
        mould, leaves, address = step.data
        made = [self._value(step, leaf) if type(leaf) is Number else leaf for leaf in leaves]
        self._building = True
        try:
            structure, filled = mould.fill(made)
        finally:
            self._building = False
        self._dressed.append(Dressed(structure, made, filled.is_whole, address))
        return self._with_save(structure)

    def _with_save(self, structure: Any) -> Any:
        object.__setattr__(structure, "save", partial(self._save_structure, structure))
        self._structures[id(structure)] = len(self._structures)
        return structure

    def _save_structure(self, structure: Any) -> Any:
        if self.live:
            self._statement(("save structure", self._structures[id(structure)]), "save", (structure,))
        else:
            keep(structure)
        return structure

    def _members(self, made: list[Any]) -> Members:
        members = Members(made)

        def assign(key: int, value: Any) -> None:
            self.leave()
            members.writer(key, value)  # by now that of the recorder

        members.writer = assign
        return members
