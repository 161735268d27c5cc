"""The module at the top, as its views ask about it: paths, classes of views, aliases, methods."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Any, Self

from torch import nn

from fxsight.captures import Captures
from fxsight.errors import RenameError, nearest
from fxsight.inputs import PLAIN
from fxsight.methods import Method
from fxsight.rename import Aliases
from fxsight.view import View, words

Views = type[View] | Mapping[type[nn.Module] | str, type[View] | None]


class Root(View):
    """The view of a whole model, which all views of its parts ask.

    captures: its programs.  options: those of ``Model``, by name.

    Raises: RenameError; TypeError for what is no View.
    """

    def __init__(self, module: nn.Module, captures: Captures, options: Mapping[str, Any]) -> None:
        super().__init__(None, module, "")
        own, views = self.__dict__, options["views"]
        own["_options"], own["_captures"], own["_inputs"] = options, captures, PLAIN
        own["_paths"], own["_methods"], own["_aliases"] = {}, {}, Aliases()
        _check_views(views.values() if isinstance(views, Mapping) else (views,))
        for name in options["methods"]:
            self.method(name)
        own["_aliases"] = captures.shared.aliases = Aliases.of(module, options["rename"], self._words)

    def method(self, name: str) -> Method:
        """A method of the module, to be traced: ``with model.method("encode").trace(x):``.

        Raises: AttributeError when the module has no method of that name.
        """
        if name not in self._methods:
            found = getattr(self._module, name, None)
            if not isinstance(found, types.MethodType):
                hint = nearest(name, [n for n in dir(type(self._module)) if not hasattr(nn.Module, n)])
                text = f"{type(self._module).__name__} has no method {name!r}"
                raise AttributeError(f"{text}; {hint}" if hint else text)
            self._methods[name] = Method(self, self._called_by(name), name, name in self._options["methods"])
        return self._methods[name]  # type: ignore[no-any-return]

    def _called_by(self, method: str) -> Self:
        """The same model, traced by calling a method."""
        called = object.__new__(type(self))
        called.__dict__.update(self.__dict__, _captures=self._captures.of(method))
        return called

    # -- what its views ask ------------------------------------------------------------------------------------------

    def _present(self, name: str, found: Any) -> Any:
        is_own = isinstance(found, types.MethodType) and found.__self__ is self._module
        return self.method(name) if is_own and not hasattr(nn.Module, name) else super()._present(name, found)

    def _path_of(self, module: nn.Module) -> str | None:
        """The first path of a module of the model; None for one that is no part of it."""
        path = self._paths.get(id(module))
        if path is None or self._find(path) is not module:
            self.__dict__["_paths"] = {id(part): path for path, part in self._module.named_modules()}
        found: str | None = self._paths.get(id(module))
        return found

    def _find(self, path: str) -> nn.Module | None:
        module: nn.Module = self._module
        try:
            return module.get_submodule(path)
        except AttributeError:
            return None

    def _view_class(self, module: nn.Module, path: str) -> type[View]:
        """The class of the view of a module."""
        views: Any = self._options["views"]
        if not isinstance(views, Mapping):
            return views  # type: ignore[no-any-return]
        found = next((cls for cls in type(module).__mro__ if cls in views), None)
        ends = [key for key in views if isinstance(key, str) and (path == key or path.endswith(f".{key}"))]
        key = max(ends, key=len, default=None) if found is None else found
        return (None if key is None else views[key]) or View

    def _words(self, path: str, module: nn.Module) -> frozenset[str]:
        """What means something else than a child in the view of a module."""
        return words(self._view_class(module, path) if path else type(self))

    def _label(self, path: str, module: nn.Module, name: str) -> str:
        """What ``print`` shows in the parentheses before a child."""
        own = f'["{name}"]' if name in self._words(path, module) else name
        return "/".join([*self._aliases.of_child(path, name), own])

    def _mounted(self, path: str) -> list[tuple[str, str]]:
        """Labels and paths of the modules that have an alias on the module at a path, without being its children."""
        return [(f"{alias}/{way}", way) for alias, way in self._aliases.below(path).items() if "." in way]

    def _check_free(self, path: str, name: str) -> None:
        """Raises: RenameError when a name that is about to be given is an alias."""
        if name in self._aliases.below(path):
            raise RenameError(f"{name!r} is an alias of {self._aliases.below(path)[name]!r}: give another name")

    def _attached(self, parent: nn.Module, name: str, before: nn.Module | None) -> None:
        """A module has become a child; taken back when an alias that falls to it cannot be given."""
        try:
            aliases = Aliases.of(self._module, self._options["rename"], self._words, strict=False)
        except RenameError:
            delattr(parent, name) if before is None else setattr(parent, name, before)
            raise
        self.__dict__["_aliases"] = self._captures.shared.aliases = aliases
        self._captures.attach(parent, name, before)


def _check_views(classes: Iterable[Any]) -> None:
    for cls in classes:
        if cls is not None and not (isinstance(cls, type) and issubclass(cls, View)):
            raise TypeError(f"views: {cls!r} is no subclass of fxsight.View")
