"""A method of the module that is not its forward: ``with model.encode.trace(x) as tracer:``.

``model.encode(x)`` simply calls it, as on the module. A call cannot know whether it stands behind a ``with``, so the
block is asked for by name, or by declaring the method: with ``Model(net, methods=["encode"])`` the call is the trace,
``with model.encode(x):``, and ``model.encode(x, trace=False)`` the plain result, as with ``model.trace``.
"""

from __future__ import annotations

from typing import Any

from fxsight.address import Address
from fxsight.ops import Operations


class Method:
    """One method of a model's module: callable as it is there, and traced as the model is.

    In its block, the model's own values (``model.output``, ``tracer.result``) are those of the method; the operations
    of its source are ``model.encode.ops``.

    called: the same model, traced by calling the method.  declared: whether a call is a block.
    """

    def __init__(self, model: Any, called: Any, name: str, declared: bool) -> None:
        self._model, self._called, self._name, self._declared = model, called, name, declared
        self.__doc__ = self.__wrapped__.__doc__

    @property
    def __wrapped__(self) -> Any:
        """The method itself, as the module has it now."""
        return getattr(self._model._module, self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method's result; of a declared method a block, but inside a block the result, too."""
        if self._declared and self._model._captures.open is None:
            return self.trace(*args, **kwargs)
        return self._plainly(args, kwargs)

    def _plainly(self, args: Any, kwargs: Any) -> Any:
        """The method's result, with the edits of the model."""
        return self._called(*args, **kwargs) if self._model.edits else self.__wrapped__(*args, **kwargs)

    def trace(self, *args: Any, trace: Any = True, **kwargs: Any) -> Any:
        """A block as ``Model.trace``, over one call of the method.  trace: False for the plain result."""
        return self._called.trace(*args, **kwargs) if trace else self._plainly(args, kwargs)

    def scan(self, *args: Any, **kwargs: Any) -> Any:
        """A block as ``Model.scan``, over one call of the method."""
        return self._called.scan(*args, **kwargs)

    @property
    def ops(self) -> Operations:
        """The operations of the method's source."""
        return Operations.of_module(self._called, Address(""))

    @property
    def source(self) -> Operations:
        """The same as ``ops``."""
        return self.ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)

    def __repr__(self) -> str:
        return f"<method {self._name} of {type(self._model._module).__name__}>"
