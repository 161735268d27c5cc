"""nnsight's names for what fxsight has: ``import fxsight.compat.nnsight as nnsight``.

Programs written for nnsight run as they are, on fxsight's own classes; what is here are names, and the few words that
fxsight itself does not have. ``docs/coming-from-nnsight.md`` says what is different.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from torch import nn

import fxsight
from fxsight.branch import Stopped as EarlyStopException
from fxsight.cache import Cache as CacheDict
from fxsight.containers import bool as bool
from fxsight.containers import bytearray as bytearray
from fxsight.containers import bytes as bytes
from fxsight.containers import complex as complex
from fxsight.containers import dict as dict
from fxsight.containers import float as float
from fxsight.containers import int as int
from fxsight.containers import list as list
from fxsight.containers import set as set
from fxsight.containers import str as str
from fxsight.containers import tuple as tuple
from fxsight.errors import CausalityError as OutOfOrderError
from fxsight.errors import FxsightError as NNsightException
from fxsight.errors import NotExecuted as MissedProviderError
from fxsight.errors import TraceError
from fxsight.model import Model
from fxsight.sessions import Session
from fxsight.tracer import Tracer
from fxsight.verbs import apply as apply
from fxsight.verbs import save as save
from fxsight.view import View

__all__ = [
    "CONFIG",
    "CacheDict",
    "EarlyStopException",
    "Envoy",
    "LanguageModel",
    "MissedProviderError",
    "NNsight",
    "NNsightException",
    "OutOfOrderError",
    "Session",
    "Tracer",
    "__version__",
    "apply",
    "bool",
    "bytearray",
    "bytes",
    "complex",
    "dict",
    "float",
    "int",
    "list",
    "save",
    "session",
    "set",
    "str",
    "tuple",
]


class Envoy(View):
    """A ``View`` with nnsight's further words.

    ``.path`` begins with ``model``; ``.nns_output``, ``.nns_input`` and ``.nns_inputs`` are ``.output``, ``.input``
    and ``.inputs``, which are always the values here, also where a module has a child of that name.
    """

    @property
    def path(self) -> Any:
        """Dotted path: ``model`` for the root, ``model.layer1``."""
        return f"model.{self._path}" if self._path else "model"

    @property
    def nns_output(self) -> Any:
        """The same as ``output``."""
        return self.output

    @nns_output.setter
    def nns_output(self, value: Any) -> None:
        self.output = value

    @property
    def nns_input(self) -> Any:
        """The same as ``input``."""
        return self.input

    @nns_input.setter
    def nns_input(self, value: Any) -> None:
        self.input = value

    @property
    def nns_inputs(self) -> Any:
        """The same as ``inputs``."""
        return self.inputs

    @nns_inputs.setter
    def nns_inputs(self, value: Any) -> None:
        self.inputs = value

    def wait_for_input(self) -> None:
        """Accepted, and not needed: values are read and written in any order."""

    def wait_for_output(self) -> None:
        """Accepted, and not needed: values are read and written in any order."""


class NNsight(Model, Envoy):
    """A ``Model`` that is called as nnsight's is.

    envoys: what ``Model`` calls ``views``; other options are those of ``Model``.
    """

    def __init__(self, module: Any, *, envoys: Any = None, **options: Any) -> None:
        super().__init__(module, **options, **({} if envoys is None else {"views": envoys}))

    def _view_class(self, module: nn.Module, path: Any) -> type[View]:
        found = super()._view_class(module, path)
        return Envoy if found is View else found

    def trace(self, *args: Any, remote: Any = False, blocking: Any = True, **kwargs: Any) -> Any:
        """``Model.trace``.

        Raises: TraceError for ``remote``: there is no service to run on yet.
        """
        _check_local(remote)
        return super().trace(*args, **kwargs)

    def session(self, share: Any = True, *, remote: Any = False, blocking: Any = True) -> Session:
        """``Model.session``.

        Raises: TraceError for ``remote``: there is no service to run on yet.
        """
        _check_local(remote)
        return super().session(share)


class LanguageModel(NNsight, fxsight.LanguageModel):
    """``fxsight.LanguageModel``, called as nnsight's is."""

    def generate(self, *args: Any, remote: Any = False, blocking: Any = True, **kwargs: Any) -> Any:
        """``fxsight.LanguageModel.generate``.

        Raises: TraceError for ``remote``: there is no service to run on yet.
        """
        _check_local(remote)
        return super().generate(*args, **kwargs)


def session(remote: Any = False) -> Session:
    """A block for traces of one model or several.

    Raises: TraceError for ``remote``: there is no service to run on yet.
    """
    _check_local(remote)
    return Session()


def _check_local(remote: Any) -> None:
    if remote:
        raise TraceError(f"remote={remote!r}: there is no service to run on yet; leave it out, and the block runs here")


@dataclass(frozen=True)
class Config:
    """Settings that nnsight has. They are kept as they are set, and change nothing."""

    APP: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(DEBUG=False, REMOTE_LOGGING=True))
    API: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(APIKEY="", HOST="", COMPRESS=True))

    def set_default_api_key(self, key: Any) -> None:
        """Set ``API.APIKEY``."""
        self.API.APIKEY = key

    def set_default_app_debug(self, debug: Any = True) -> None:
        """Set ``APP.DEBUG``."""
        self.APP.DEBUG = debug

    def save(self) -> None:
        """Accepted; nothing is written to disk."""


CONFIG = Config()
__version__ = fxsight.__version__
