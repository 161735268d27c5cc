"""What users hold: ``Model`` around any ``nn.Module``, and a ``View`` of each of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fxsight.address import Address
from fxsight.captures import Captures
from fxsight.containers import Saved
from fxsight.context import here
from fxsight.errors import TraceError
from fxsight.session import Session
from fxsight.store import Store
from fxsight.tracer import BACKENDS, Scan, Tracer
from fxsight.tree import flatten


class View:
    """One module of a model: its children by name, its values inside a trace, its operations anywhere.

    ``.output``, ``.input`` (first argument) and ``.inputs`` (``(args, kwargs)``) are read and written inside
    ``with model.trace(...)``; ``.ops`` (= ``.source``) browses the operations of its forward.
    """

    def __init__(self, root: Model | None, module: nn.Module, path: str, call: int = 0) -> None:
        own = self.__dict__
        own["_root"], own["_module"], own["_path"], own["_call"] = root or self, module, path, call
        own["_views"] = {}

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

    def _read(self, port: str) -> Any:
        trace = self._open(port)
        return trace.read(trace.place(self.address), port)

    def _write(self, port: str, value: Any) -> None:
        trace = self._open(port)
        trace.write(trace.place(self.address), port, value)

    def _open(self, port: str) -> Tracer:
        trace: Tracer | None = self._root._captures.open
        if trace is None:
            raise TraceError(f"{self.address}:{port} has a value only inside a trace: with model.trace(...):")
        return trace

    # -- the tree ----------------------------------------------------------------------------------------------------

    @property
    def address(self) -> Address:
        """The module's address."""
        return Address(self._path, self._call)

    @property
    def path(self) -> str:
        """Dotted path as in ``named_modules``; empty for the root."""
        return str(self._path)

    def call(self, n: int) -> View:
        """The same module, its call number ``n`` in one forward (0 is the first)."""
        return View(self._root, self._module, self._path, n)

    def skip(self, value: Any) -> None:
        """Let the module return ``value`` without running: what only it needs is not computed.

        Raises: WriteError when the value has not the structure of the module's output.
        """
        self._open("output").skip(self.address, value)

    def modules(self) -> list[View]:
        """This view and all below it, children before parents."""
        return [view for _, view in self.named_modules()]

    def named_modules(self) -> list[tuple[str, View]]:
        """The same with their paths."""
        below = [
            pair
            for name, part in self._module._modules.items()
            if part is not None
            for pair in self._child(name).named_modules()
        ]
        return [*below, (self.path, self)]

    def get(self, path: str) -> Any:
        """What a dotted path leads to, a value too: ``get("transformer.h.0.output")``.

        Raises: AttributeError when there is nothing of that name.
        """
        found: Any = self
        for part in path.split("."):
            found = getattr(found, part)
        return found

    @property
    def device(self) -> torch.device | None:
        """Device of the first parameter; None without parameters."""
        return next((p.device for p in self._module.parameters()), None)

    @property
    def devices(self) -> set[torch.device]:
        """Devices of all parameters and buffers."""
        return {t.device for t in (*self._module.parameters(), *self._module.buffers())}

    def to(self, *args: Any, **kwargs: Any) -> View:
        """Move or convert the module, as ``nn.Module.to``.  Returns: this view."""
        self._module.to(*args, **kwargs)
        return self

    def cpu(self) -> View:
        """Move the module to the CPU.  Returns: this view."""
        return self.to("cpu")

    def cuda(self, device: int | str | torch.device | None = None) -> View:
        """Move the module to a CUDA device.  Returns: this view."""
        return self.to("cuda" if device is None else device)

    def __getattr__(self, name: str) -> Any:
        module: nn.Module = self.__dict__["_module"]
        if name in ("output", "input", "inputs"):  # the property raised NotExecuted, an AttributeError: raise it again
            return self._read(name)
        try:
            found = getattr(module, name)
        except AttributeError:
            known = ", ".join(name for name, _ in module.named_children()) or "no children"
            raise AttributeError(
                f"{type(module).__name__} at {str(self.address) or 'the root'} has no attribute {name!r}; "
                f"it has {known}"
            ) from None
        return self._child(name) if isinstance(found, nn.Module) else found

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("output", "input", "inputs"):
            object.__setattr__(self, name, value)
        elif name.startswith("_"):
            self.__dict__[name] = value
        else:
            setattr(self._module, name, value)

    def _child(self, name: str) -> View:
        views: dict[str, View] = self.__dict__["_views"]
        module = getattr(self._module, name)
        if name not in views or views[name]._module is not module:
            views[name] = View(self._root, module, f"{self._path}.{name}" if self._path else name)
        return views[name]

    def __getitem__(self, key: int | slice) -> Any:
        names = list(self._module._modules)
        if isinstance(key, slice):
            return [self._child(name) for name in names[key]]
        if not -len(names) <= key < len(names):
            raise IndexError(f"{self.address} has {len(names)} modules, 0 to {len(names) - 1}; there is no {key}")
        return self._child(names[key])

    def __len__(self) -> int:
        return len(self._module._modules)

    def __iter__(self) -> Iterator[View]:
        return iter(self[:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module itself, on tensors or on values of a trace (its parameters are shared, not copied)."""
        return self._module(*args, **kwargs)

    def __dir__(self) -> list[str]:
        own = ["output", "input", "inputs", "ops", "source", "path", "address", "call"]
        return sorted({*own, *self._module._modules, *dir(type(self))})

    def __repr__(self) -> str:
        return repr(self._module)

    @property
    def ops(self) -> Any:
        """The operations of the module's forward: print them, index them, find them."""
        from fxsight.ops import Operations

        return Operations.of_module(self._root, self.address)

    @property
    def source(self) -> Any:
        """The same as ``ops``."""
        return self.ops


class Model(View):
    """Any ``nn.Module``, to be read, changed and compiled; the module itself is not touched.

        model = Model(net)
        with model.trace(x) as tracer:
            hidden = model.layer1.output.save()
            model.layer2.input[:, 0] = 0
            out = model.output.save()

    cache: whether captured programs are kept on disk (``store``).
    """

    def __init__(self, module: nn.Module, *, cache: bool = True) -> None:
        super().__init__(None, module, "")
        self.__dict__["_captures"] = Captures(module, Store() if cache else None)

    def trace(
        self,
        *args: Any,
        backend: Any = "auto",  # these are Any so that f(**batch) of a typed batch is a typed call
        trace: Any = True,
        scan: Any = True,
        validate: Any = True,
        debug: Any = False,
        invoker_args: Any = None,
        **kwargs: Any,
    ) -> Any:
        """A block in which values of ``module(*args, **kwargs)`` are read and written; it runs when the block ends.

        Without input: a block of invokes, ``with tracer.invoke(x):``, that run as one batch.
        backend: "eager" is bitwise the module's own numbers; "inductor" compiles; "auto" is eager.
        trace: False for no block: simply the module's output.  invoker_args: more keyword arguments.
        scan, validate, debug: accepted; every block is checked line by line as it is written, and errors are raised
        there.

        Raises: TraceError for an unknown backend, and when the block ends without any input.
        """
        if backend not in BACKENDS:
            raise TraceError(f"no backend {backend!r}; one of {', '.join(BACKENDS)}")
        kwargs = {**kwargs, **(invoker_args or {})}
        if not trace:
            return self._module(*args, **kwargs)
        return Tracer(self._captures, (args, kwargs) if args or kwargs else None, backend)

    def scan(self, *args: Any, **kwargs: Any) -> Scan:
        """A block in which shapes and dtypes are known and nothing is run; works without weights."""
        return Scan(self._captures, (args, kwargs), "eager")

    def session(self) -> Session:
        """A block for several traces: values of one are used in the next without saving; they run when it ends."""
        return Session()


def save(value: Any) -> Any:
    """Keep every value in a structure: after the block they are plain tensors.  Returns: the structure.

    In a session a value may have become a plain tensor already, where a number was needed: it is kept as it is.

    Raises: NotSavedError for a value of a block that has ended; TraceError when there is no value in it.
    """
    from fxsight.containers import thaw
    from fxsight.value import check_usable, values_in

    values = list(values_in(thaw(value)))
    for leaf in values:
        check_usable(leaf.cell)
    if not values and isinstance(value, Saved):
        return value.save()
    if not values and here().session is not None and any(isinstance(x, torch.Tensor) for x in flatten(value)[0]):
        return value  # computed already, for a number
    if not values:
        raise TraceError("nothing to save: no value of a trace in it")
    for recorder in {id(leaf.cell.recorder): leaf.cell.recorder for leaf in values}.values():
        recorder.keep(value)
    return value


def session() -> Session:
    """A block for several traces, of one model or of several: see ``Model.session``."""
    return Session()


def apply(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call any Python function on the numbers of values, now: with the edits written so far, each computed once.

    Returns: what the function returns; its tensors are values of the trace again, to be written and saved; plain
    numbers and containers have ``.save()``.
    Raises: NeedsValueError in a scan; what the function raises.
    """
    from fxsight.value import apply_now

    return apply_now(function, args, kwargs)
