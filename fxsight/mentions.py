"""What the code of a forward mentions: whether an attribute that is added later can be seen by it (``Book.names``)."""

from __future__ import annotations

import re
from types import CodeType, FrameType

from torch import nn

from fxsight.book import LISTS, PARTIAL

# Code of torch that goes through the parts of a module, and names under which the model's own code can do so.
LISTING = frozenset(f.__code__ for f in (nn.Module.named_modules, nn.Module.named_children, nn.Module.state_dict))
_LISTING_NAMES = frozenset(["_modules", "__dict__", "vars", "dir"])


class Mentions:
    """Collects the names, from the frames in which the model's own functions are called."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._listing: dict[CodeType, bool] = {}  # whether code could list the parts of a module

    def note(self, frame: FrameType) -> None:
        """Write down what the code mentions, and whether it can go through the parts of a module that it was given."""
        listing = self._listing.get(frame.f_code)
        if listing is None:
            listing = self._listing[frame.f_code] = not _LISTING_NAMES.isdisjoint(frame.f_code.co_names)
            self.names |= _mentioned(frame.f_code)
        if listing and any(isinstance(value, nn.Module) for value in frame.f_locals.values()):
            self.names.add(LISTS)


def _mentioned(code: CodeType) -> set[str]:
    """What the code of a function mentions: see ``Book.names``."""
    texts = {value for value in code.co_consts if isinstance(value, str) and re.fullmatch(r"[\w.]{1,60}", value)}
    found = {*code.co_names, *texts}
    if not found.isdisjoint(("getattr", "hasattr", "get_submodule")):
        found |= {PARTIAL + text for text in texts}
    return found
