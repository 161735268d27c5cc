"""See and edit every operation of a PyTorch model.

The model is captured once with ``torch.export``; edits are recorded as data and compiled in as a graph rewrite.

Each public name is loaded when it is first asked for: ``import fxsight`` alone does not even import torch.
"""

import builtins
from typing import TYPE_CHECKING

from fxsight.version import __version__ as __version__

if TYPE_CHECKING:
    from fxsight.address import Address as Address
    from fxsight.background import Background as Background
    from fxsight.cache import Cache as Cache
    from fxsight.compare import Diff as Diff
    from fxsight.compare import diff as diff
    from fxsight.compare import save_program as save_program
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
    from fxsight.edit import Edit as Edit
    from fxsight.errors import CaptureError as CaptureError
    from fxsight.errors import CausalityError as CausalityError
    from fxsight.errors import EditError as EditError
    from fxsight.errors import FxsightError as FxsightError
    from fxsight.errors import FxsightWarning as FxsightWarning
    from fxsight.errors import InputError as InputError
    from fxsight.errors import LoadError as LoadError
    from fxsight.errors import NotCached as NotCached
    from fxsight.errors import NotExecuted as NotExecuted
    from fxsight.errors import NotSavedError as NotSavedError
    from fxsight.errors import SweepWarning as SweepWarning
    from fxsight.errors import TraceError as TraceError
    from fxsight.errors import UnknownAddress as UnknownAddress
    from fxsight.errors import WriteError as WriteError
    from fxsight.grid import Grid as Grid
    from fxsight.language import LanguageModel as LanguageModel
    from fxsight.model import Model as Model
    from fxsight.plan import Plan as Plan
    from fxsight.program import Program as Program
    from fxsight.rewrite import Pass as Pass
    from fxsight.rewrite import Pipeline as Pipeline
    from fxsight.sessions import Session as Session
    from fxsight.verbs import apply as apply
    from fxsight.verbs import save as save
    from fxsight.verbs import session as session
    from fxsight.view import View as View

_HOMES = {
    "address": "Address",
    "background": "Background",
    "cache": "Cache",
    "containers": "bool bytearray bytes complex dict float int list set str tuple",
    "compare": "Diff diff save_program",
    "edit": "Edit",
    "errors": "CaptureError CausalityError EditError FxsightError FxsightWarning InputError LoadError "
    "NotCached NotExecuted NotSavedError SweepWarning TraceError UnknownAddress WriteError",
    "grid": "Grid",
    "language": "LanguageModel",
    "model": "Model",
    "plan": "Plan",
    "program": "Program",
    "rewrite": "Pass Pipeline",
    "sessions": "Session",
    "verbs": "apply save session",
    "view": "View",
}


def __getattr__(name: builtins.str) -> object:
    """A public name, or a module of the package, loaded now."""
    from importlib import import_module

    home = next((home for home, names in _HOMES.items() if name in names.split()), None)
    if home is not None:
        return getattr(import_module(f"fxsight.{home}"), name)
    if not name.startswith("_"):
        try:
            return import_module(f"fxsight.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"fxsight.{name}":
                raise
    raise AttributeError(f"module 'fxsight' has no attribute {name!r}")


def __dir__() -> builtins.list[builtins.str]:
    return sorted([*globals(), *(name for names in _HOMES.values() for name in names.split())])
