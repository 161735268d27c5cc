"""Every error and warning of fxsight.

    FxsightError
    ├── CaptureError            the model cannot be captured
    ├── AddressError            a name that is not an address at all (ValueError)
    │   └── UnknownAddress      an address this program does not have (AttributeError)
    ├── NotExecuted             an address that exists in the source, but that this forward never computes
    ├── CausalityError          a write that depends on its own consequences
    ├── WriteError              a written value of another structure, shape, dtype or device
    ├── NotCached               what a cache does not have (KeyError, AttributeError, IndexError)
    ├── NotSavedError           a value used after its block without having been saved (ValueError)
    ├── NeedsValueError         a body asks for a number where there is no input to compute it from
    ├── InputError              inputs that a program cannot take
    ├── EditError               an edit that cannot be made in a forward, or kept (ValueError)
    │   ├── EditFileError       a file of edits that cannot be read or written
    │   └── FoldError           an edit that cannot be put into weights
    ├── SelectionError          a selector that selects nothing, or that is none (ValueError)
    ├── LoadError               a model or tokenizer that is not where it was looked for (OSError)
    ├── RenameError             an alias for modules that cannot be given (ValueError)
    ├── TraceError              a trace used where it cannot be used
    ├── ProgramError            a program that breaks one of the rules of ``verify``
    └── TextError               text that is not a program

    FxsightWarning
    ├── LostEditWarning         an edit that nothing can see
    ├── FirstCallWarning        a plain write where the model is called several times
    ├── FirstRowWarning         an index that takes one row of the batch, where it once took a member of a tuple
    └── SweepWarning            a sweep that ended before all its cells were done

Each message says the place, the fact, the nearest right names, and the fix.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FxsightError(Exception):
    """Base of all errors raised on purpose by fxsight."""


class CaptureError(FxsightError):
    """The model cannot be captured as one graph: the message has the model's line, the cause, and what to try."""


class AddressError(FxsightError, ValueError):
    """Text that does not follow the grammar of addresses."""


class UnknownAddress(AddressError, AttributeError):
    """An address that the program does not have; the message lists the nearest ones it has."""


class NotExecuted(FxsightError, AttributeError):
    """An operation of the source on a branch that this forward does not take, or a module it does not call."""


class CausalityError(FxsightError):
    """A written value depends, through the model, on what lies downstream of the written location."""


class WriteError(FxsightError, TypeError):
    """A written value whose structure, shape, dtype or device is not that of the location."""


class NotCached(FxsightError, KeyError, AttributeError, IndexError):
    """A module or a call that is not in a cache; the message says why."""

    __str__ = Exception.__str__  # a KeyError would show its message in quotes


class NotSavedError(FxsightError, ValueError):
    """A value used after the block that made it, without ``.save()``."""


class NeedsValueError(FxsightError):
    """The body needs a number (``if``, ``.item()``, ``print``) and there is none to be had here."""


class LoadError(FxsightError, OSError):
    """A model or tokenizer that is not where it was looked for."""


class InputError(FxsightError, ValueError):
    """Inputs whose structure, sizes or dtypes the program cannot take."""


class EditError(FxsightError, ValueError):
    """An edit that this forward cannot take: the message names the places it does not have; or one that is none."""


class EditFileError(EditError):
    """A file of edits that is damaged, foreign or newer, or an edit that cannot stand in a file."""


class FoldError(EditError):
    """An edit that cannot be put into weights exactly; the message says why."""


class SelectionError(FxsightError, ValueError):
    """A selector that selects nothing, with the nearest names; or what is no selector."""


class RenameError(FxsightError, ValueError):
    """An alias that cannot be given: its key names no module, or its name is taken."""


class TraceError(FxsightError, ValueError):
    """A trace, or a value of one, used outside its block or inside another."""


class ProgramError(FxsightError):
    """A program that breaks a rule every program keeps; names the rule and the node."""


class TextError(FxsightError, ValueError):
    """Text that cannot be read as a program; names the line."""


class FxsightWarning(UserWarning):
    """Base of all warnings raised by fxsight."""


class LostEditWarning(FxsightWarning):
    """An edit that has no effect: of a stale value, or of one that nothing reads."""


class FirstCallWarning(FxsightWarning):
    """A plain write applies to the first of several calls."""


class FirstRowWarning(FxsightWarning):
    """``block.output[0]`` where the model returns one tensor: the first row of the batch, not the hidden states."""


class SweepWarning(FxsightWarning):
    """A sweep was interrupted; what is done is kept."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """``did you mean 'a', 'b'?`` for the names closest to ``name``, or an empty string."""
    found = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"did you mean {', '.join(repr(f) for f in found)}?" if found else ""
