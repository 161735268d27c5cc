"""For which module and inputs a captured program holds, as a hash that every process makes alike.

What decides a capture is said in words: structure and types of the inputs, library versions, each submodule's class
and attributes, the layout of its tensors, its code. What has no such words (hooks, locks, code without a file) is
``Local``: it makes sense in one process only.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import json
import os
import sys
import types
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxsight import _torch
from fxsight.book import Book
from fxsight.folder import digest
from fxsight.version import __version__

_LARGEST = 1 << 26  # bytes of one literal, or of a tensor that is told apart by its contents
# Attributes of transformers' models and configs that say where they came from; no forward reads them.
_ORIGIN = ("name_or_path", "_name_or_path", "_commit_hash", "_original_object_hash")


class Local(Exception):
    """Something that means nothing in another process, or that no file can hold."""


def identity(module: nn.Module, key: Any, versions: Mapping[str, str]) -> str | None:
    """A hash of all that decides what is captured; None when that cannot be said in words every process shares.

    key: of ``Captures.find``: structure and signatures of the inputs, settings (read from the module here), ambient.
    """
    tree, leaves, _, ambient = key
    if any(len(leaf) == 2 and leaf[0] not in ("NoneType", "bool", "int", "float", "str") for leaf in leaves):
        return None  # an object as an input: known by its ``id`` only
    try:
        said = _Words(module)
        defaults = (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled())
        parts = [dict(versions), said(tree), said(leaves), said(ambient), said(defaults)]
        parts += [_tensors(module), [_part(part, said) for part in module.modules()], _code(module)]
    except Exception:  # Local; and an attribute may be anything, and do anything when it is looked at
        return None
    return digest(json.dumps(parts).encode())[:40]


def library_versions() -> dict[str, str]:
    """Of everything whose change could change a program."""
    transformers = sys.modules.get("transformers")
    return {
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "torch": torch.__version__,
        "transformers": "" if transformers is None else transformers.__version__,
        "fxsight": f"{__version__} {_own_code()}",
    }


@functools.cache
def _own_code() -> str:
    """Of our own files: an edited checkout has the version it had before."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return digest(b"".join(file.read_bytes() for file in files))


def _tensors(module: nn.Module) -> list[Any]:
    """Name, type and layout of each parameter and buffer, and the first name of the same tensor."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    first: dict[int, str] = {}
    return [
        [
            name,
            type(t).__name__,
            str(t.dtype),
            list(t.shape),
            list(t.stride()),
            str(t.device),
            first.setdefault(id(t), name),
        ]
        for name, t in named
    ]


def _part(module: nn.Module, said: _Words) -> Any:
    """One submodule: its class, and every attribute that is not torch's own."""
    own = vars(module)
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        raise Local("hooks")
    return said([type(module), {name: value for name, value in own.items() if name not in said.tables}])


def _code(module: nn.Module) -> list[Any]:
    """Of each class of a submodule, down to torch's: its functions as they are here, its constants, its file's hash."""
    classes = {cls: None for part in module.modules() for cls in type(part).__mro__}
    return [_class(cls) for cls in classes if not _is_library(cls.__module__.partition(".")[0])]


def _class(cls: type) -> Any:
    plain = {k: repr(v) for k, v in vars(cls).items() if isinstance(v, (bool, int, float, str)) and k[:2] != "__"}
    functions = {k: _code_hash(code) for k, v in vars(cls).items() if (code := _code_of(v)) is not None}
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None:
        raise Local("code without a file")
    return [f"{cls.__module__}:{cls.__qualname__}", os.path.abspath(file), file_hash(file), plain, functions]


def _is_library(package: str) -> bool:
    """Python's and torch's own packages, which have their versions."""
    return package == "torch" or package in sys.stdlib_module_names


class _Words:
    """Says what a value is in words that are the same in every process, as JSON.

    root: whose submodules and parameters are said by their names.

    Raises: Local for what has no such words.
    """

    def __init__(self, root: nn.Module) -> None:
        self.tables = frozenset(vars(nn.Module())) - {"training"} | {*_ORIGIN}  # what no forward reads
        self._paths = {id(part): path for path, part in root.named_modules()}
        self._names = {id(parameter): name for name, parameter in root.named_parameters()}
        self._met: dict[int, tuple[int, Any]] = {}

    def __call__(self, value: Any) -> Any:
        match value:
            case None | bool() | int() | float() | complex() | str() | bytes() | range():
                return f"{type(value).__name__} {value!r}"
            case torch.dtype() | torch.device() | torch.layout() | torch.memory_format() | _torch.OpOverload():
                return str(value)
            case type() | types.BuiltinFunctionType() if not isinstance(getattr(value, "__self__", None), torch.Tensor):
                return f"{value.__module__}:{value.__qualname__}"
            case tuple():
                return [type(value).__name__, *map(self, value)]
            case set() | frozenset():
                return ["set", *sorted(json.dumps(self(member)) for member in value)]
            case _:
                return self._object(value)

    def _object(self, value: Any) -> Any:
        """What has an identity of its own: said once, then by its number."""
        if id(value) in self._met:
            return self._met[id(value)][0]
        self._met[id(value)] = (len(self._met), value)  # held, so that nothing else gets its ``id``
        if len(self._met) > 50_000:
            raise Local("too much to say")
        match value:
            case nn.Module():
                return self._module(value)
            case torch.Tensor() if id(value) in self._names:
                return f"parameter {self._names[id(value)]}"
            case torch.Tensor():
                return [layout(value), digest(contents(value))]
            case dict():
                return [self(type(value)), *([self(key), self(member)] for key, member in value.items())]
            case list():
                return [self(type(value)), *map(self, value)]
            case types.FunctionType():
                cells = [cell.cell_contents for cell in value.__closure__ or ()]
                more = [cells, value.__defaults__, value.__kwdefaults__]
                return [f"{value.__module__}:{value.__qualname__}", _code_hash(value.__code__), self(more)]
            case types.MethodType():
                return [self(value.__func__), self(value.__self__)]
            case weakref.ReferenceType():
                return ["weak", self(value())]
            case functools.partial():
                return ["partial", self(value.func), self(value.args), self(value.keywords)]
            case _:
                return self._instance(value)

    def _module(self, module: nn.Module) -> Any:
        if id(module) not in self._paths:
            raise Local("a module that is no submodule")
        return f"module {self._paths[id(module)]}"

    def _instance(self, value: Any) -> Any:
        """An object that is nothing but its attributes: its classes are all written in Python, without slots."""
        written = all(cls.__flags__ & 1 << 9 for cls in type(value).__mro__[:-1])
        if not written or not hasattr(value, "__dict__"):
            raise Local(f"a {type(value).__name__}")
        return [self(type(value)), self({k: v for k, v in vars(value).items() if k not in _ORIGIN})]


# ------------------------------------------------------------------------------------------------------ contents


def layout(tensor: torch.Tensor) -> dict[str, Any]:
    """dtype, device, shape and strides (in elements) as JSON.

    Raises: Local for subclasses, and for layouts that are not strided.
    """
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
        raise Local(f"a {type(tensor).__name__} as a literal")
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "device": str(tensor.device),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
    }


def contents(tensor: torch.Tensor) -> bytes:
    """The elements in order, as the processor has them; none of a tensor without data.

    Raises: Local beyond 64 MiB.
    """
    if tensor.is_meta:
        return b""
    plain = tensor.detach().cpu().contiguous()
    if plain.numel() * plain.element_size() > _LARGEST:
        raise Local("a literal that is too large")
    return ctypes.string_at(plain.data_ptr(), plain.numel() * plain.element_size()) if plain.numel() else b""


# ------------------------------------------------------------------------------------------------------ code


def file_hash(file: str) -> str:
    """A hash of the contents of a file.

    Raises: Local when it cannot be read.
    """
    try:
        return digest(Path(file).read_bytes())
    except OSError:
        raise Local(f"no file {file}") from None


def _code_of(value: Any) -> types.CodeType | None:
    """Of a function, method, property or decorated function as it stands in a class or module."""
    value = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
    code = getattr(inspect.unwrap(value) if callable(value) else value, "__code__", None)
    return code if isinstance(code, types.CodeType) else None


def _code_hash(code: types.CodeType) -> str:
    """The same in every process, and wherever the code stands in its file."""
    constants = [_constant(value) for value in code.co_consts]
    parts = (code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars)
    return digest(repr(parts).encode())[:16]


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _code_hash(value)
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


def check_current(book: Book, sources: set[str]) -> None:
    """That what ran is what the files say: one may have been edited since it was imported.

    Raises: Local when it is not.
    """
    ran = {(call.body[1], call.body[2]) for call in book.calls if call.body}
    for file in sources:
        try:
            code = compile(Path(file).read_bytes(), file, "exec", dont_inherit=True)
        except (OSError, SyntaxError, ValueError):
            raise Local(f"{file} is gone, or no Python") from None
        written = {(c.co_name, c.co_firstlineno): _code_hash(c) for c in _nested(code)}
        for code in _running(file):
            place = (code.co_name, code.co_firstlineno)
            if place in ran and written.get(place) != _code_hash(code):
                raise Local(f"{file} was edited")


def _running(file: str) -> Iterator[types.CodeType]:
    """The code of the functions that were imported from a file."""
    for module in list(sys.modules.values()):
        if os.path.abspath(getattr(module, "__file__", None) or "") == file:
            members = list(vars(module).values())
            members += [member for value in members if isinstance(value, type) for member in vars(value).values()]
            for code in map(_code_of, members):
                if code is not None and os.path.abspath(code.co_filename) == file:
                    yield from _nested(code)


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from _nested(value)
