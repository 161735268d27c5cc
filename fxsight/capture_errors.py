"""Why a model cannot be captured, in words: the model's own line, the cause, and what to try.

torch.export raises what its parts raise, each in its own words and most of them about torch. What is known is said
again here in the model's terms; what is not known, the model's own errors among it, is passed on as it is.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable

from torch import fx

from fxsight import _torch
from fxsight.errors import CaptureError
from fxsight.libraries import Libraries, stack_lines

_NUMBERS = (
    "its control flow or a size depends on the numbers in a tensor",
    "use torch.where in the model, or trace a submodule that has no such branch",
)
_FUNCTIONS = (
    "it calls torch.cond or another operator that takes functions",
    "use torch.where in the model, or trace a submodule without it",
)
_RULE = "register one with torch.library.register_fake"
# Of errors that have no class of their own: what torch says, the cause (with the groups of the match), what to try.
_TEXTS = (
    (r"no fake impl registered for <CustomOpDef\((.+?)\)>", r"the operator \1 has no shape rule", _RULE),
    (r"^(\S+): attempted to run this operator with Meta tensors", r"the operator \1 has no shape rule", _RULE),
    (r"^Could not run '(.+?)' with arguments from the 'Meta' backend", r"the operator \1 has no shape rule", _RULE),
    (
        r"^\.numpy\(\) is not supported for tensor subclasses",
        "it leaves torch for numpy, which needs the numbers in a tensor",
        "write it in torch, or make it an operator with torch.library.custom_op and register_fake",
    ),
)


class Refused(Exception):
    """Something in a forward that no program can hold; becomes a ``CaptureError``.

    cause, fix: in words.  node: of the exported graph, for the model's line.
    """

    def __init__(self, cause: str, fix: str, node: fx.Node | None = None) -> None:
        super().__init__(cause)
        self.cause, self.fix, self.node = cause, fix, node


def capture_error(title: str, error: Exception) -> CaptureError:
    """What to tell the user whose module (or its method: ``Net.encode``) could not be captured because of ``error``."""
    cause, fix = _explain(error)
    place = _place(_lines(error))
    message = f"{title} cannot be captured as one graph: {cause}"
    return CaptureError(f"{message}\n  at {place}\n  {fix}" if place else f"{message}\n  {fix}")


def _explain(error: Exception) -> tuple[str, str]:
    """The cause, and what to try."""
    if isinstance(error, Refused):
        return error.cause, error.fix
    if isinstance(error, _torch.NeedsData):
        return _NUMBERS
    if isinstance(error, _torch.NoShapeRule):
        return f"the operator {error.func} has no shape rule", _RULE
    if _torch.takes_functions(error):
        return _FUNCTIONS
    text = (str(error).strip().splitlines() or [""])[0]
    for pattern, cause, fix in _TEXTS:
        found = re.search(pattern, text)
        if found is not None:
            return found.expand(cause), fix
    return (
        f"{type(error).__name__}: {text}" if text else type(error).__name__,
        "run the module itself on these inputs first; if that works, see docs/capture.md",
    )


def _lines(error: Exception) -> Iterable[tuple[str, int, str]]:
    if isinstance(error, Refused):
        return [] if error.node is None else stack_lines(error.node)
    return [(f.filename, f.lineno or 0, f.line or "") for f in traceback.extract_tb(error.__traceback__)]


def _place(lines: Iterable[tuple[str, int, str]]) -> str:
    """``file:line: code`` of the innermost line of the model; empty when there is none."""
    libraries = Libraries()
    own = [(file, number, code) for file, number, code in lines if libraries.is_model_code(file)]
    return "{}:{}: {}".format(*own[-1]) if own else ""
