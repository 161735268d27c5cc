"""``View``: one module of a model, its children by name, its values inside a trace.

A word of ours keeps its meaning. Where a module has a child of the same name (``BertLayer`` has one called
``output``), the child is ``view["output"]``: a text in brackets is always a child, and ``print(model)`` says which
children are reached so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from fxsight.address import Address
from fxsight.attributes import Attributes, again
from fxsight.conditions import Candidate, Selector, selector_of
from fxsight.context import open_trace
from fxsight.editing import Editing, EditTrace
from fxsight.errors import NotExecuted, TraceError, WriteError
from fxsight.ops import Operations
from fxsight.selectors import chosen

if TYPE_CHECKING:
    from fxsight.tracer import Tracer


class View(Attributes):
    """One module of a model: its children by name, its values inside a trace, its operations anywhere.

    ``.output``, ``.input`` (first argument) and ``.inputs`` (``(args, kwargs)``) are read and written inside
    ``with model.trace(...)``; ``.ops`` (= ``.source``) browses the operations of its forward. What is no word of ours
    is the module's: ``view.config``, ``view.parameters()``.
    """

    # -- values ------------------------------------------------------------------------------------------------------

    @property
    def output(self) -> Any:
        """What the module returns: a value, or a structure of values."""
        return self._read("output")

    @output.setter
    def output(self, value: Any) -> None:
        self._write("output", value)

    @property
    def input(self) -> Any:
        """The module's first argument."""
        return self._read("input")

    @input.setter
    def input(self, value: Any) -> None:
        self._write("input", value)

    @property
    def inputs(self) -> Any:
        """All arguments: ``(args, kwargs)``."""
        return self._read("inputs")

    @inputs.setter
    def inputs(self, value: Any) -> None:
        self._write("inputs", value)

    def edit(
        self,
        *args: Any,
        inplace: bool = False,
        parameters: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> Editing:
        """A block that is made again in every forward of the edited model, which ``as`` gives: nothing runs now.

            with model.edit() as edited:
                model.layer1.output[:, 0] = 0
            edited(x)

        Asked of a part, it is an edit of the whole model, and ``as`` gives that part of it.
        args, kwargs: an example of the model's inputs, of which shapes and dtypes count; without, those of the last
        forward.  inplace: edit this model, not a copy of it (the module is never touched).
        parameters: names for tensors that the body uses, as ``edit_parameters`` gives them.

        Raises: EditError for a body that changes nothing; TraceError without example and forward; NeedsValueError
        where the body needs a number; as a trace does for the rest.
        """
        root = self._root
        call = (args, kwargs) if root._inputs.are_given(args, kwargs) else root._example()
        edited = root if inplace else root._edited()
        part = edited if self is root else again(edited, self._path, self._call)
        return Editing(EditTrace(root._captures, call, root._inputs, parameters or {}), edited, part)

    def skip(self, value: Any) -> None:
        """Let the module return ``value`` without running: what only it needs is not computed.

        Raises: WriteError when the value has not the structure of the module's output.
        """
        self._open("output").skip(self.address, value)

    def next(self) -> View:
        """In a generation: from here on the module, and all below it, is meant at the step after the present one.

        Returns: this view.
        Raises: TraceError outside a generation.
        """
        self._open("output").to_next(self._path)
        return self

    def __call__(self, *args: Any, hook: Any = None, **kwargs: Any) -> Any:
        """The module itself, on tensors or on values of a trace; its parameters are shared, not copied.

        Inside a block, the values of a module that the model itself never calls are then ``.output``, ``.input`` and
        ``.inputs`` of this view and of those below it.  hook: accepted; they are in any case.
        """
        trace = self._root._captures.open
        if trace is None or self._is_called(trace):
            return self._module(*args, **kwargs)
        return self._root._captures.attached_calls.call(trace, self._path, self._module, args, kwargs)

    def _is_called(self, trace: Any) -> bool:
        """Whether the forward that is traced calls the module."""
        return (self._path, 0) in trace.meant(self._address).captured.book.modules

    def _read(self, port: str) -> Any:
        captures = self._root._captures
        trace, calls = open_trace(captures.shared) or self._open(port), captures.attached_calls
        made = calls.find(trace, self._path, self._call) if calls else None
        if made is not None:
            return made.port(port)
        try:
            return trace.read(self._address, port)
        except NotExecuted as error:
            raise self._not_called(trace, error) from None

    def _write(self, port: str, value: Any) -> None:
        trace = self._open(port)
        if self._root._captures.attached_calls.find(trace, self._path, self._call) is not None:
            raise WriteError(
                f"{self.address}:{port} is a value that this block has computed itself, by calling the module, and "
                "cannot be assigned; give the new value to what used the result, or change the result in place"
            )
        try:
            trace.write(self._address, port, value)
        except NotExecuted as error:
            raise self._not_called(trace, error) from None

    def _not_called(self, trace: Tracer, error: NotExecuted) -> NotExecuted:
        """The error, with the way to give a module values that the model never calls."""
        if self._is_called(trace):
            return error
        made = self._root._captures.attached_calls.count(trace, self._path)
        if made:
            return NotExecuted(f"{self.address}: this block calls the module {made} times; the first is number 0")
        return NotExecuted(f"{error}\n  it has values after a call in this block: model[{self._path!r}](...)")

    def _open(self, port: str) -> Tracer:
        trace: Tracer | None = self._root._captures.open
        if trace is not None:
            return trace
        child = f'; its child of that name is view["{port}"]' if port in self._module._modules else ""
        raise TraceError(f"{self.address}:{port} has a value only inside a trace: with model.trace(...):{child}")

    def select(self, selector: Selector | str) -> list[Any]:
        """The modules here and below, or the operations, that a selector selects: see ``selectors``.

            for block in model.select("class:GPT2Block and layer:4-7"):
                block.output[:, -1] += vector

        Returns: views, parents before children; where it asks for operations (``op:``), these, of the last forward.
        Raises: SelectionError when there are none, and for a text that cannot be read; TraceError for operations
        before a capture.
        """
        root, wanted = self._root, selector_of(selector)
        if wanted.asks_for_operations:
            return list(self.ops.find(wanted))
        below = (path for path, _ in self._module.named_modules())
        paths = (".".join(filter(None, (self._path, path))) for path in below)
        found = [Candidate(root[path]._module, path, (), root[path]) for path in paths]
        return [at.handle for at in chosen(wanted, found)]

    # -- the tree ----------------------------------------------------------------------------------------------------

    @property
    def parent(self) -> View | None:
        """The view one level up; None for the model."""
        return self._root[self._path.rpartition(".")[0]] if self._path else None

    def call(self, n: int) -> View:
        """The same module, its call number ``n`` in one forward (0 is the first)."""
        cls = View if self is self._root else type(self)
        return cls(self._root, self._module, self._path, n)

    def modules(self, include_fn: Callable[[View], bool] | None = None, names: bool = False) -> list[Any]:
        """This view and all below it, children before parents.

        include_fn: keep those for which it says yes.  names: as pairs ``(path, view)``.
        """
        found = [(path, view) for path, view in self.named_modules() if include_fn is None or include_fn(view)]
        return list(found) if names else [view for _, view in found]

    def named_modules(self) -> list[tuple[str, View]]:
        """Path and view of this and all below it, children before parents; a shared module once."""
        found: dict[str, View] = {}
        self._gather(found)
        return list(found.items())

    def _gather(self, found: dict[str, View]) -> None:
        for view in self:
            if isinstance(view, View) and view.path not in found:
                view._gather(found)
        found[self.path] = self

    def get(self, path: str) -> Any:
        """What a dotted path or an address leads to, a value too: ``get("h.0.attn.ops.split_1.output")``.

        On the way a name is a child before it is a word of ours; at the end it is the word, as it is in Python.
        An address, ``get("h.0.attn/split_1:output[0]")``, leaves no doubt.

        Raises: AttributeError when there is nothing of that name; AddressError for what is no address.
        """
        if ":" in path or "/" in path or "#" in path:
            return self._at(Address.parse(path))
        *way, last = path.split(".") if path else ("",)
        found: Any = self
        for part in way:
            found = found._step(part) if isinstance(found, View) else getattr(found, part)
        if not last:
            return found
        is_number = isinstance(found, View) and last.removeprefix("-").isdecimal()
        return found._step(last) if is_number else getattr(found, last)

    def _step(self, part: str) -> Any:
        if part in self._module._modules:
            return self._child(part)
        return self[int(part)] if part.removeprefix("-").isdecimal() else getattr(self, part)

    def _at(self, address: Address) -> Any:
        found: Any = self[address.module]
        if address.call:
            found = found.call(address.call)
        if address.steps:
            found = found.ops["/".join(map(str, address.steps))]
        if address.port:
            found = getattr(found, address.port)
        for key in address.keys:
            found = found[key]
        return found

    @property
    def ops(self) -> Any:
        """The operations of the module's forward: print them, index them, find them."""
        return Operations.of_module(self._root, self.address)

    @property
    def source(self) -> Any:
        """The same as ``ops``."""
        return self.ops


def words(cls: type[View]) -> frozenset[str]:
    """What means something else than a child in views of this class."""
    return frozenset(name for name in dir(cls) if not name.startswith("_"))
