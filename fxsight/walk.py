"""Recording, memoised: the same statement on the same symbolic values gives what it gave the last time.

Every read, torch call, write and save of a body is a step in a tree that belongs to one program and one set of sizes.
As long as a body goes a way that has been gone before, nothing is written down: its values are made from what the steps
remember, and at the end the finished program is there already. At the first step off the known way the recorder is
made, the statements so far are written down in it, and from there on the tree grows.

What cannot be remembered (a number on demand, a branch, an object torch does not know) leaves the tree: the rest of the
body is simply recorded.

    Walk     statements: known, or written down, and the tree grows    (this file)
    Again    what known statements gave, with values of this body      (``again``)
    Keys     what tells statements apart                               (``keys``)
    Slow     the trace, which writes down                              (``slow``)
    Step     the tree                                                  (``known``)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from fxsight import _torch
from fxsight.again import Again
from fxsight.cell import Cell
from fxsight.dressed import undress
from fxsight.edit import Edit
from fxsight.known import Finish, Step, Unknown, described
from fxsight.lent import check_unchanged
from fxsight.lines import user_line
from fxsight.run import Executable
from fxsight.slow import Slow, Writing
from fxsight.tree import flatten
from fxsight.value import NUMBERS, Members, Value, keep

_LEAVING = NUMBERS | {"register_hook", "nonzero", "argwhere", "masked_select", "unique"}


class Walk(Again):
    """One body on its way.

    root: where it begins.  names: of the model's weights by ``id``.  mark: what the spec of a value at a port depends
    on of the sizes, for a tree that bodies at several sizes share.
    """

    def __init__(
        self,
        trace: Slow,
        root: Step,
        names: Mapping[int, str],
        mark: Callable[[Any, str], tuple[int, ...]] = lambda address, port: (),
    ) -> None:
        super().__init__(names)
        self._mark = mark
        self._trace: Slow | None = trace
        self.step: Step | None = root
        self.fast = True  # nothing has been written down yet
        self.live = True  # statements go through the walk
        self._busy = False
        self._log: list[tuple[str, tuple[Any, ...], Any, Step]] = []
        self._recorder: Writing | None = None
        self._differentiates = torch.is_grad_enabled()

    @property
    def ended(self) -> bool:
        """Whether the block has ended."""
        return self._trace is None

    # -- statements --------------------------------------------------------------------------------------------------

    def read(self, address: Any, port: str) -> Any:
        """The value at a port of a place."""
        return self._statement(("read", address, port, self._mark(address, port)), "read", (address, port))

    def write(self, address: Any, port: str, value: Any) -> None:
        """Another value for a port of a place."""
        try:
            key = ("write", address, port, self._mark(address, port), self._key(value))
        except Unknown:
            self.leave_for("write", (address, port, value))
            return
        self._statement(key, "write", (address, port, value))

    def edit(self, edit: Edit) -> None:
        """All statements of an edit: one step, for all edits that differ in the numbers of their tensors alone."""
        marks = tuple(self._mark(address.place, address.port) for address in edit.used)
        key = ("edit", edit.asked, marks, tuple(map(self._tensor_key, edit.tensors)))
        self._statement(key, "edit", (edit,))

    def call(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One torch call."""
        if self._building:
            with _torch.plain_function_calls():
                return func(*args, **kwargs)
        if self._busy:
            return self._do("call", (func, args, kwargs))
        try:
            if getattr(func, "__name__", "") in _LEAVING or torch.is_grad_enabled() != self._differentiates:
                raise Unknown
            named = tuple((name, self._key(value)) for name, value in kwargs.items()) if kwargs else ()
            key = ("call", func, self._key(args), named)
        except Unknown:
            return self.leave_for("call", (func, args, kwargs))
        return self._statement(key, "call", (func, args, kwargs))

    def save(self, value: Any) -> None:
        """Keep the values of a structure."""
        try:
            key = ("save all", self._key(value))
        except Unknown:
            self.leave_for("save", (value,))
            return
        self._statement(key, "save", (value,))

    def save_one(self, value: Value) -> None:
        """Keep one value of this body."""
        self._statement(("save", value.number), "save", (value,))

    def _statement(self, key: Any, what: str, given: tuple[Any, ...]) -> Any:
        if self.fast:
            try:
                found = cast(Step, self.step).ways.get(key)
            except TypeError:  # something in it cannot be hashed
                return self.leave_for(what, given)
            if found is not None:
                result = self._value(found, 0) if found.kind == "one" else self._again(found)
                self._log.append((what, given, result, found))
                self.step = found
                return result
            self.settle()
        result = self._do(what, given)
        self._learn(key, result)
        return result

    def _value(self, step: Step, number: int) -> Value:
        value = Value.shaped(*step.shapes[number])
        value.walk, value.number = self, len(self.values)
        self.values.append(value)
        return value

    # -- off the known way -------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Write down what has been said so far."""
        if not self.fast or self._trace is None:
            return
        self.fast = False
        recorder = self._recorder = self._trace.begin_recorder()
        with torch.set_grad_enabled(self._differentiates):
            for what, given, result, step in self._log:
                recorder.line = lambda line=step.line: line  # type: ignore[misc]
                self._take_over(result, self._do(what, given))
        recorder.line = user_line

    def _take_over(self, mine: Any, theirs: Any) -> None:
        """Values made on the known way get the cells of those written down now."""
        dressed = next((one for one in self._dressed if one.structure is mine), None)
        if dressed is not None:
            cast(Writing, self._recorder).dresser.adopt(theirs, dressed)
        if isinstance(mine, Members):
            mine.writer = theirs.writer
        if mine is not theirs:
            leaves = flatten(mine)[0] if dressed is None else dressed.leaves
            for leaf, other in zip(leaves, flatten(theirs)[0], strict=True):
                if isinstance(leaf, Value) and leaf is not other:
                    leaf.known_cell = other.cell

    def leave(self) -> None:
        """What follows is recorded and not remembered."""
        self.settle()
        self.live, self.step = False, None

    def release(self) -> list[weakref.ref[Value]]:
        """Leave; values are kept no longer than somebody holds them.  Returns: what leads to those that are."""
        self.leave()
        refs = [weakref.ref(value) for value in self.values]
        self.values, self._log, self._dressed = [], [], []
        return refs

    def leave_for(self, what: str, given: tuple[Any, ...]) -> Any:
        """Leave with a statement."""
        self.leave()
        if what == "call":  # there may be values of other bodies in it
            func, args, kwargs = given
            return Value.__torch_function__(func, (), args, kwargs)
        return keep(*given) if what == "save" else self._do(what, given)

    def _do(self, what: str, given: tuple[Any, ...]) -> Any:
        """A statement, written down; what it calls by itself is no statement."""
        assert self._trace is not None
        assert self._recorder is not None
        outer, self._busy = self._busy, True
        try:
            if what == "read":
                return self._trace.do_read(*given)
            if what == "write":
                return self._trace.do_write(*given)
            if what == "edit":
                return self._trace.do_edit(*given)
            if what == "call":
                return self._recorder.call(*given)
            return self._recorder.keep(*given)
        finally:
            self._busy = outer

    def _learn(self, key: Any, result: Any) -> None:
        """The tree grows by this statement."""
        if self.step is None or self._trace is None:
            return
        try:
            if self._trace.is_decided:
                raise Unknown
            step = self._described(result, key)
        except Unknown:
            self.live, self.step = False, None
            return
        self.step.go_on(key, step, len(self.values) - len(step.specs))
        self.step = step

    def _described(self, result: Any, key: Any) -> Step:
        """The step that a statement makes, from what it gave; its values are this body's from here on.

        Raises: Unknown for what cannot be made again.
        """
        if isinstance(result, Value) and result.walk is self:
            return Step("same", result.number, user_line())
        step, values = described(result, user_line(), key[1].at(key[2]) if key[0] == "read" else None)
        if step.kind == "fields":
            self._with_save(result)
        for value in values:
            value.walk, value.number = self, len(self.values)
            self.values.append(value)
        return step

    # -- the end -----------------------------------------------------------------------------------------------------

    def constants(self, finish: Finish) -> list[torch.Tensor]:
        """The constants of the finished program; structures are as the model has them from here on.

        Raises: InputError when a tensor of the user's was changed after the body had used it.
        """
        undress(self._dressed)
        found = [self._tensors[number] for number in finish.constants]
        check_unchanged(found, [self._versions[number] for number in finish.constants])
        return found

    def remember(
        self, executable: Executable, constants: list[torch.Tensor], results: list[int], learning: Any = None
    ) -> None:
        """The way that has been gone ends in this program; ``results``: the values that its results belong to."""
        numbers = [self._ids.get(id(tensor), -1) for tensor in constants]
        if self.step is None or -1 in numbers or -1 in results:
            return
        pairs = {value: place for place, value in reversed(list(enumerate(results)))}
        self.step.finish = Finish(executable.bound([], False), tuple(numbers), tuple(pairs.items()), learning)

    def end(self) -> None:
        """The block has ended: nothing but names for messages is kept."""
        self.live, self._trace, self._recorder = False, None, None
        self._log.clear()
        self.values.clear()
        self._tensors.clear()
        self._ids.clear()
        self._dressed.clear()

    def cell_of(self, index: int) -> Cell:
        """The cell of a value: of a block that has ended, its name and its spec."""
        if self._trace is not None:
            value = self.values[index]
            self.settle()
            assert value.known_cell is not None
            return value.known_cell
        assert self.step is not None, "every value was made by a statement"
        return self.step.cell_of(index)
