"""See and edit every operation of a PyTorch model.

The model is captured once with ``torch.export``; edits are recorded as data and compiled in as a graph rewrite.
"""

from fxsight.address import Address as Address
from fxsight.errors import CaptureError as CaptureError
from fxsight.errors import CausalityError as CausalityError
from fxsight.errors import FxsightError as FxsightError
from fxsight.errors import FxsightWarning as FxsightWarning
from fxsight.errors import InputError as InputError
from fxsight.errors import NotExecuted as NotExecuted
from fxsight.errors import NotSavedError as NotSavedError
from fxsight.errors import TraceError as TraceError
from fxsight.errors import UnknownAddress as UnknownAddress
from fxsight.errors import WriteError as WriteError
from fxsight.model import Model as Model
from fxsight.model import View as View
from fxsight.model import save as save
from fxsight.program import Program as Program
from fxsight.rewrite import Pass as Pass
from fxsight.rewrite import Pipeline as Pipeline
from fxsight.version import __version__ as __version__
