"""What of a view is the module's: its children by name or number, its attributes, its device, its text.

Everything is looked up when it is asked for, so a module that was moved, loaded or swapped is seen at once.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from fxsight.address import Address
from fxsight.errors import nearest
from fxsight.outline import outline

if TYPE_CHECKING:
    from fxsight.model import Model
    from fxsight.view import View

_RAW = (nn.ParameterList, nn.ParameterDict)  # hold tensors, not modules: handed out as they are
_CHAINED = frozenset(
    ["eval", "train", "requires_grad_", "float", "double", "half", "bfloat16", "type", "share_memory", "to_empty"]
)


class Attributes:
    """One module of a model: ``view.config``, ``view["output"]``, ``view[0]``, ``view.to("cuda")``."""

    def __init__(self, root: Model | None, module: nn.Module, path: str, call: int = 0) -> None:
        own = self.__dict__
        own["_root"], own["_module"], own["_path"], own["_call"] = root or self, module, path, call
        own["_views"], own["_address"] = {}, Address(path, call)

    # -- where it is -------------------------------------------------------------------------------------------------

    @property
    def address(self) -> Address:
        """The module's address."""
        address: Address = self._address
        return address

    @property
    def path(self) -> str:
        """Dotted path as in ``named_modules``; empty for the root. Of a module with several, the first."""
        return str(self._path)

    @property
    def root(self) -> Model:
        """The model this is a part of."""
        found: Model = self._root
        return found

    # -- children ----------------------------------------------------------------------------------------------------

    def __getitem__(self, key: int | slice | str) -> Any:
        names = list(self._module._modules)
        if isinstance(key, slice):
            return [self._child(name) for name in names[key]]
        if isinstance(key, str):
            return self._named(key)
        if not -len(names) <= key < len(names):
            raise IndexError(
                f"{self._shown()} has {len(names)} modules, 0 to {len(names) - 1}; there is no {key}"
                if names
                else f"{self._shown()} has no modules; there is no {key}"
            )
        return self._child(names[key])

    def _named(self, path: str) -> Any:
        """A child, or what is below it, by name; aliases too.

        Raises: KeyError.
        """
        found: Any = self
        for part in path.split(".") if path else ():
            target = self._root._aliases.below(found._path).get(part) if isinstance(found, Attributes) else None
            if target is not None:
                found = found._named(target)
            elif isinstance(found, Attributes) and part in found._module._modules:
                found = found._child(part)
            else:
                place = found._shown() if isinstance(found, Attributes) else "None"
                known = list(found._module._modules) if isinstance(found, Attributes) else []
                listed = nearest(part, known) or f"it has {', '.join(known) or 'no children'}"
                raise KeyError(f"{place} has no child {part!r}; {listed}")
        return found

    def __len__(self) -> int:
        return len(self._module._modules)

    def __bool__(self) -> bool:
        return True  # a module without children is something, too

    def __iter__(self) -> Iterator[Any]:
        return iter(self[:])

    def __contains__(self, name: object) -> bool:
        return name in self._module._modules or any(view is name for view in self)

    def __setitem__(self, key: int | str, module: nn.Module) -> None:
        """Put another module in the place of a child: ``model.layers[0] = Other()``."""
        names = list(self._module._modules)
        self._put(key if isinstance(key, str) else names[key], module)

    # -- attributes --------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_module" not in self.__dict__:  # protocols of Python are not passed on
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        word = getattr(type(self), name, None)
        if isinstance(word, property) and word.fget is not None:  # it raised an AttributeError: raise it again
            return word.fget(self)
        try:
            found = getattr(self._module, name)
        except AttributeError:
            if name in self._root._aliases.below(self._path):
                return self._named(name)
            raise AttributeError(self._unknown(name)) from None
        return self._present(name, found)

    def _present(self, name: str, found: Any) -> Any:
        """An attribute of the module, as users are to have it: modules of the model as views."""
        if isinstance(found, nn.Module):
            return self._view(name, found)
        if name in _CHAINED and isinstance(found, types.MethodType):
            return self._chained(found)
        return found

    def _chained(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self if result is self._module else result

        return call

    def _unknown(self, name: str) -> str:
        known = [name for name, _ in self._module.named_children()]
        hint = f"it has {', '.join(known) or 'no children'}"
        return f"{type(self._module).__name__} at {self._shown()} has no attribute {name!r}; {hint}"

    def _shown(self) -> str:
        return str(self.address) or "the root"

    def __setattr__(self, name: str, value: Any) -> None:
        word = getattr(type(self), name, None)
        if name.startswith("_"):
            self.__dict__[name] = value
        elif isinstance(word, property) and word.fset is not None:
            word.fset(self, value)
        elif word is not None:
            raise AttributeError(f"{name!r} is a word that every view has: give what you attach another name")
        else:
            self._put(name, value)

    def _put(self, name: str, value: Any) -> None:
        """Set an attribute of the module; a module becomes a child, and is at once reached as such."""
        if isinstance(value, Attributes):
            value = value._module
        before = self._module._modules.get(name)
        self._root._check_free(self._path, name)
        setattr(self._module, name, value)
        if isinstance(value, nn.Module):
            self._root._attached(self._module, name, before)

    def __delattr__(self, name: str) -> None:
        if name.startswith("_"):
            del self.__dict__[name]
        else:
            delattr(self._module, name)
            self.__dict__["_views"].pop(name, None)

    def _child(self, name: str) -> Any:
        return self._view(name, self._module._modules[name])

    def _view(self, name: str, module: nn.Module | None) -> Any:
        """The view of a child; None where the module has none, and what is no part of the model as it is."""
        views: dict[str, Attributes] = self.__dict__["_views"]
        view = views.get(name)
        if view is not None and view._module is module:
            return view
        if module is None or isinstance(module, _RAW):
            return module
        path = self._root._path_of(module)
        if path is None:
            return module
        views[name] = view = self._root._view_class(module, path)(self._root, module, path)
        return view

    # -- the module --------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device | None:
        """Device of the first parameter; None without parameters."""
        return next((p.device for p in self._module.parameters()), None)

    @property
    def devices(self) -> set[torch.device]:
        """Devices of all parameters and buffers."""
        return {t.device for t in (*self._module.parameters(), *self._module.buffers())}

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert the module, as ``nn.Module.to``.  Returns: this view."""
        self._module.to(*args, **kwargs)
        return self

    def cpu(self) -> Self:
        """Move the module to the CPU.  Returns: this view."""
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device | None = None) -> Self:
        """Move the module to a CUDA device.  Returns: this view."""
        return self.to("cuda" if device is None else device)

    # -- as an object ------------------------------------------------------------------------------------------------

    def __dir__(self) -> list[str]:
        aliases = self._root._aliases.below(self._path)
        return sorted({*dir(type(self)), *dir(self._module), *aliases})

    def __repr__(self) -> str:
        return outline(self._module, self._path, self._root._label, self._root._mounted, self._root._module)

    def __reduce__(self) -> tuple[Any, ...]:
        return again, (self._root, self._path, self._call)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        rebuild, state = self.__reduce__()
        return rebuild(*copy.deepcopy(state, memo))

    def __copy__(self) -> Any:
        rebuild, state = self.__reduce__()
        return rebuild(*state)


def again(root: Model, path: str, call: int) -> View:
    """A view that was copied or pickled with its model."""
    view: View = root[path]
    return view.call(call) if call else view
