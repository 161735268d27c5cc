"""The encoder of an encoder-decoder model: a generation calls it once, before its steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from fxsight.address import Address
from fxsight.captures import Captures
from fxsight.edit import Edit
from fxsight.errors import EditError, TraceError
from fxsight.leave import Returned
from fxsight.program import Program
from fxsight.rehearsal import Known, kinds_of
from fxsight.rows import Call
from fxsight.tree import flatten
from fxsight.twin import encoder_path

BEFORE = -1  # the number of the step that it is


def step_title(number: int) -> str:
    """A step in messages."""
    return "the encoder" if number == BEFORE else f"step {number}"


class Encoder:
    """What is known of the encoder's call: it is captured when something is asked of it.

    captures: of the whole model.  call: what it is called with, in shape.
    """

    def __init__(self, captures: Captures, call: Call) -> None:
        self.path = encoder_path(captures.module)
        self.captures = captures.of(self.path)
        self._call = call
        parts = captures.module.get_submodule(self.path).modules()
        self._parts = {id(part) for part in parts}

    def has(self, address: Address) -> bool:
        """Whether the encoder calls a module."""
        path = address.module
        return bool(path) and id(self.captures.module.get_submodule(path)) in self._parts

    def is_alone(self, address: Address, decoder: Program) -> bool:
        """Whether the decoder does not call a module.  decoder: the program of a step."""
        return (address.module, 0) not in decoder.book.modules

    def is_meant(self, address: Address, decoder: Program) -> bool:
        """Whether a module is the encoder's.  decoder: the program of a step.

        Raises: TraceError for one that the decoder calls, too.
        """
        if not self.has(address):
            return False
        if not self.is_alone(address, decoder):
            raise TraceError(
                f"{address.place} is called by the encoder and by the decoder, and in a generation these are two "
                "forwards; read or write what it is given or returns where one of them uses it, such as the input of "
                "the first block"
            )
        return True

    def own(self, edits: Sequence[Edit], decoder: Program) -> list[Edit]:
        """Those of some edits that are made in the encoder.

        Raises: EditError for one that has to do with both the encoder and the decoder.
        """
        found: list[Edit] = []
        for edit in edits:
            try:
                inside = [self.is_meant(address, decoder) for address in edit.used]
            except TraceError as error:
                raise EditError(f"{edit.title} cannot be made in a generation: {error}") from None
            if any(inside) and not all(inside):
                raise EditError(
                    f"{edit.title} cannot be made in a generation: it has to do with both the encoder and the decoder, "
                    "which run one after the other; make two edits, or write it in the block of the generation"
                )
            found += [edit] if any(inside) else []
        return found

    @cached_property
    def known(self) -> Known:
        """Its program, and what its inputs are like.

        Raises: CaptureError.
        """
        program, sizes = self.captures.find(*self._call)
        leaves, tree = flatten(self._call)
        return Known(program, sizes, tree, kinds_of(leaves), {}, Returned(program))
