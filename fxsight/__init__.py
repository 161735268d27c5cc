"""See and edit every operation of a PyTorch model.

The model is captured once with ``torch.export``; edits are recorded as data and compiled in as a graph rewrite.
"""

from fxsight.address import Address as Address
from fxsight.cache import Cache as Cache
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
from fxsight.diff import Diff as Diff
from fxsight.diff import diff as diff
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
from fxsight.model import apply as apply
from fxsight.model import save as save
from fxsight.model import session as session
from fxsight.plan import Plan as Plan
from fxsight.program import Program as Program
from fxsight.rewrite import Pass as Pass
from fxsight.rewrite import Pipeline as Pipeline
from fxsight.session import Session as Session
from fxsight.version import __version__ as __version__
from fxsight.view import View as View
