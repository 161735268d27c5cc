"""From what a user gives to the call of the module: the seam at which prompts become tokens.

A model has one ``Inputs``. Plain models have this one, which takes tensors as they are; a language model has
``prompts.Prompts``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fxsight.cell import check_usable
from fxsight.errors import TraceError
from fxsight.program import Program
from fxsight.rows import Call, join
from fxsight.tree import plain_leaves
from fxsight.value import values_in


class Inputs:
    """What the blocks of a model ask of inputs."""

    def are_given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether there is an input in the arguments of a block; without, the invokes in it bring theirs."""
        return bool(args or kwargs)

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call of the module for the arguments of a block, values of other blocks left as they are."""
        return args, kwargs

    def join(self, calls: Sequence[Call]) -> Call:
        """One call with the rows of several.

        Raises: TraceError where they cannot be one batch.
        """
        return join(calls)

    def check(self, program: Program, call: Call) -> None:
        """Whether a program can be run on a call that holds rows of several lengths.

        Raises: TraceError.
        """

    def tokens(self, call: Call) -> Any:
        """The tokens in a call, to be found by their text.

        Raises: TraceError where inputs are no prompts.
        """
        raise TraceError("this model has no tokenizer: tokens are found by their text in a LanguageModel")


PLAIN = Inputs()


def check_inputs(call: Call | None) -> None:
    """Values of an ended block of this session can be inputs.

    Raises: TraceError for a value of an open block, NotSavedError.
    """
    if call is None or plain_leaves(*call) is not None:
        return
    for value in values_in(call):
        check_usable(value.cell)
        if value.cell.recorder.is_open:
            raise TraceError(
                f"{value.cell.what} is a value of a block that has not ended, and cannot be the input of another; "
                "end the block first: with model.session(): one trace after the other"
            )
