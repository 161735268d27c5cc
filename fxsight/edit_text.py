"""Edits as data that can be read, stored and sent: lists and texts, and the tensors beside them.

    read_0 = read('transformer.h.3:output')    # f32[2, 7, 768]
    constant_0 = constant('steer')    # f32[768]
    user_add = torch.Tensor.add(read_0, constant_0)    # f32[2, 7, 768]

Reading it executes nothing: the text is parsed, functions are looked up by name among those that compute with tensors
alone, and everything else is an error that says what is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxsight.address import Address
from fxsight.backward import STATEMENTS
from fxsight.edit import Edit
from fxsight.errors import AddressError, EditFileError, TextError
from fxsight.intervention import Intervention, Read, Write
from fxsight.mutate import mutate
from fxsight.node import Origin
from fxsight.parse import Line, parse_line
from fxsight.place import Location
from fxsight.spec import TensorSpec
from fxsight.targets import argument_text, mutate_functions, target_name
from fxsight.text import spec_text
from fxsight.value import NUMBERS

Data = dict[str, Any]

# What reaches beyond the tensors that are given: memory, files, objects; and what an edit cannot do.
_REFUSED = (
    NUMBERS
    | STATEMENTS
    | {
        *("from_file", "set_", "resize_", "resize_as_", "data_ptr", "storage", "untyped_storage", "share_memory_"),
        *("map_", "map2_", "apply_", "tofile", "__iter__", "as_subclass", "is_shared", "pin_memory", "record_stream"),
    }
)
_ROOTS = ("torch.", "aten.", "operator.getitem", "getattr", "mutate", "custom_function")
_LONGEST = 100_000  # characters of a line


# -- to data ---------------------------------------------------------------------------------------------------------


def edits_data(edits: Iterable[Edit]) -> tuple[list[Data], dict[str, torch.Tensor]]:
    """The edits, and their tensors by name: on the CPU, in memory of their own.

    Raises: EditFileError for an edit with a function that a file may not have.
    """
    tensors: dict[str, torch.Tensor] = {}
    data: list[Data] = []
    for edit in edits:
        data.append(_edit_data(edit))
        for name, tensor in zip(edit.names, edit.tensors, strict=True):
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    return data, tensors


def _edit_data(edit: Edit) -> Data:
    asked = edit.asked
    given = {name: f"constant({edit.names[i]!r})" for i, (name, _) in enumerate(asked.constants)}
    given |= {name: f"weight({weight!r})" for name, weight in asked.weights}
    given |= {read.name: f"read({str(read.location.address)!r})" for read in asked.reads}
    return {
        "line": _short(edit.line),
        "body": [_line(node, given) for node in asked.graph.nodes],
        "writes": [_write_data(write) for write in asked.writes],
        "skips": [str(address) for address, _ in edit.skipped],
        "sizes": [[name, list(sizes)] for name, sizes in edit.looked],
    }


def _line(node: fx.Node, given: Mapping[str, str]) -> str:
    if node.op == "placeholder":
        call = given[node.name]
    else:
        name = target_name(node.target)
        _check_function(node.target, name, node.args)
        parts = [argument_text(a) for a in node.args] + [f"{k}={argument_text(v)}" for k, v in node.kwargs.items()]
        call = f"{name}({', '.join(parts)})"
    return f"{node.name} = {call}    # {spec_text(node.meta.get('spec'))}"


def _write_data(write: Write) -> Data:
    return {"at": str(write.location.address), "value": write.value, "in_place": write.in_place}


def _short(line: str) -> str:
    """Where it was written, without the folder."""
    return os.path.basename(line)


# -- from data -------------------------------------------------------------------------------------------------------


def edits_of(data: Any, tensors: Mapping[str, torch.Tensor]) -> list[Edit]:
    """The edits that ``edits_data`` has made such data of, with these tensors.

    Raises: EditFileError for anything else, naming the edit and the line.
    """
    if not isinstance(data, list):
        raise EditFileError(f"'edits' is a list, not {_kind(data)}")
    edits: list[Edit] = []
    for number, each in enumerate(data):
        try:
            edits.append(_edit_of(each, tensors))
        except EditFileError as error:
            raise EditFileError(f"edit {number}: {error}") from None
    unused = set(tensors) - {name for edit in edits for name in edit.names}
    if unused:
        raise EditFileError(f"no edit has the tensors {', '.join(sorted(unused))}")
    return edits


def _edit_of(data: Any, tensors: Mapping[str, torch.Tensor]) -> Edit:
    fields = _checked(data, {"line": str, "body": list, "writes": list, "skips": list, "sizes": list}, "an edit")
    body = _Body(fields["line"], tensors)
    for text in fields["body"]:
        body.add(text)
    writes = tuple(body.write(each) for each in fields["writes"])
    if not writes:
        raise EditFileError("it writes nothing")
    asked = Intervention(body.graph, tuple(body.reads), tuple(body.constants), tuple(body.weights), writes, ())
    names = tuple(body.names)
    skipped = tuple((_address(text, port=False), fields["line"]) for text in fields["skips"])
    looked = tuple(body.looked(pair) for pair in fields["sizes"])
    return Edit(asked, tuple(tensors[name] for name in names), names, skipped, looked, fields["line"])


class _Body:
    """The lines of one edit, read into a graph."""

    def __init__(self, line: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.graph, self.line, self.tensors = fx.Graph(), line, tensors
        self.nodes: dict[str, fx.Node] = {}
        self.reads: list[Read] = []
        self.constants: list[tuple[str, TensorSpec]] = []
        self.names: list[str] = []
        self.weights: list[tuple[str, str]] = []

    def add(self, text: Any) -> None:
        """One line of the body."""
        if not isinstance(text, str) or len(text) > _LONGEST:
            raise EditFileError(f"a line of the body is a text of at most {_LONGEST} characters, not {_kind(text)}")
        try:
            line = parse_line(text, self.nodes)
            node = self._given(line) if line.function in ("read", "constant", "weight") else self._call(line)
        except (TextError, AddressError) as error:
            raise EditFileError(f"{_shown(text)}: {error}") from None
        if node.name != line.name or line.name in self.nodes:
            raise EditFileError(f"{_shown(text)}: the name {line.name!r} is taken or reserved")
        self.nodes[line.name] = node
        node.meta.update(spec=line.spec, origin=Origin(user=self.line, made_by="body"))

    def _given(self, line: Line) -> fx.Node:
        text = line.args[0] if len(line.args) == 1 and not line.kwargs else None
        if not isinstance(text, str):
            raise TextError(f"{line.function} takes one text")
        if line.function == "read":
            self.reads.append(Read(line.name, _location(text), self.line))
        elif line.function == "weight":
            self.weights.append((line.name, text))
        elif text in self.tensors and text not in self.names:
            self.names.append(text)
            tensor = self.tensors[text]
            spec = TensorSpec(tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), "cpu", line.name)
            self.constants.append((line.name, spec))
        else:
            raise TextError(f"no tensor {text!r}" if text not in self.tensors else f"{text!r} is a constant already")
        return self.graph.placeholder(line.name)

    def _call(self, line: Line) -> fx.Node:
        _check_function(line.target, line.function, line.args)
        return self.graph.create_node("call_function", line.target, line.args, line.kwargs, line.name)

    def _node(self, name: Any) -> fx.Node:
        if not isinstance(name, str) or name not in self.nodes:
            raise EditFileError(f"no line of the body makes {_shown(name)}")
        return self.nodes[name]

    def write(self, data: Any) -> Write:
        """One written place."""
        fields = _checked(data, {"at": str, "value": str, "in_place": bool}, "a write")
        self._node(fields["value"])
        try:
            location = _location(fields["at"])
        except AddressError as error:
            raise EditFileError(str(error)) from None
        return Write(location, fields["value"], fields["in_place"], self.line)

    def looked(self, pair: Any) -> tuple[str, tuple[int | None, ...]]:
        """A node and the sizes that the body has seen of it."""
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[1], list):
            raise EditFileError(f"one of 'sizes' is a name and a list, not {_shown(pair)}")
        if any(type(size) not in (int, type(None)) for size in pair[1]):
            raise EditFileError(f"sizes are numbers or null, not {_shown(pair[1])}")
        return self._node(pair[0]).name, tuple(pair[1])


def _location(text: str) -> Location:
    """A location that is known by its address alone, until the edit is replayed."""
    address = _address(text, port=True)
    return Location("", "output" if address.port == "output" else "input", -1, "", 0, 0, address)


def _address(text: Any, port: bool) -> Address:
    if not isinstance(text, str):
        raise EditFileError(f"an address is a text, not {_shown(text)}")
    address = Address.parse(text)
    if bool(address.port) != port:
        raise AddressError(f"{text!r} names {'a place, not a value of it' if port else 'a value, not a place'}")
    return address


def _check_function(target: Any, name: str, args: Sequence[Any]) -> None:
    """Raises: EditFileError for a function that a file of edits may not have."""
    names = [name, *(mutate_functions(args) if target is mutate else ())]
    for each in names:
        last = [part for part in each.split(".") if part not in ("default",)]
        is_private = any(part.startswith("_") and not part.endswith("__") for part in last)
        if (
            not each.startswith(_ROOTS)
            or each.startswith("torch.ops.")
            or is_private
            or any(part in _REFUSED for part in last)
        ):
            raise EditFileError(f"{each} is no function that a file of edits may have")


def _checked(data: Any, kinds: Mapping[str, type], what: str) -> Data:
    """A table with exactly these fields."""
    if not isinstance(data, dict) or set(data) != set(kinds):
        raise EditFileError(f"{what} is a table with {', '.join(kinds)}, not {_shown(data)}")
    for name, kind in kinds.items():
        if type(data[name]) is not kind:
            raise EditFileError(f"{name!r} of {what} is a {kind.__name__}, not {_shown(data[name])}")
    return data


def _kind(data: Any) -> str:
    return f"a {type(data).__name__}"


def _shown(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 80 else f"{text[:77]}..."
