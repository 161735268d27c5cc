"""The running of a generation: the module's own method on a twin of it, which hands each of its calls on.

It can be held before one of the calls, for a number that is asked for there. To go on, the method is called again: it
is given what the calls so far have returned, so that none is made twice, and draws the random numbers it has drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from fxsight.encoder import BEFORE
from fxsight.errors import NeedsValueError, TraceError
from fxsight.rehearsal import quiet
from fxsight.rows import Call
from fxsight.twin import twin


class _Held(Exception):
    """The call has been met, or was the last; never seen outside."""


class Performance:
    """One generation, as it runs.

    method, call: of the module.  drive: makes a call; by its number, or ``BEFORE`` for the encoder.
    last: the number of the call after which it ends; None where the method decides.
    """

    def __init__(self, module: nn.Module, method: str, call: Call, drive: Callable[[int, Call], Any]) -> None:
        self._module, self._method, self._call, self._drive = module, method, call, drive
        self.last: int | None = None
        self.made = 0
        self.returned: Any = None
        self._answers: dict[int, Any] = {}
        self._tokens: dict[int, torch.Tensor] = {}
        self._keeps = False
        self._next = 0
        self._met: Call | None = None
        self._begun: Any = None
        self._resumed: Any = None
        self._hushed = ExitStack()

    @property
    def has_run(self) -> bool:
        """Whether a call has been made, the encoder's included."""
        return bool(self._answers)

    def until(self, number: int) -> Call | None:
        """Make all calls before one.  Returns: that call, which is not made; None where it does not come to it.

        Raises: NeedsValueError where something of the user's, that would be asked twice, cannot be copied.
        """
        self._met, self._keeps = None, True
        if self.last is not None and number > self.last:
            return None
        with suppress(_Held):
            self.returned = self._run(number, self._call[0], _copied(self._call[1]))
        return self._met

    def finish(self) -> Any:
        """To the end, from where it is.  Returns: what the method returns; the ids so far where it was stopped."""
        self._keeps = False
        try:
            self.returned = self._run(None, *self._call)
        except _Held:
            self.returned = self._ids()
            streamer = self._call[1].get("streamer")
            if streamer is not None:
                streamer.end()
        self._answers.clear()
        return self.returned

    def _run(self, until: int | None, args: Any, kwargs: Mapping[str, Any]) -> Any:
        now = _random_state()
        if self._begun is None:
            self._begun = now
        else:
            self._resumed = now
            self._hushed.enter_context(quiet())  # what is said has been said
            _set_random_state(self._begun)
        self._next = 0
        made = twin(self._module, partial(self._forward, until), partial(self._encode, until))
        try:
            returned = getattr(made, self._method)(*args, **kwargs)
        finally:
            self._resume()
        if self._next < self.made:
            self._differs()
        return returned

    def _resume(self) -> None:
        """From here on nothing is repeated."""
        self._hushed.close()
        if self._resumed is not None:
            _set_random_state(self._resumed)
            self._resumed = None

    def _forward(self, until: int | None, *args: Any, **kwargs: Any) -> Any:
        number, self._next = self._next, self._next + 1
        return self._answer(until, number, (args, kwargs))

    def _encode(self, until: int | None, *args: Any, **kwargs: Any) -> Any:
        return self._answer(until, BEFORE, (args, kwargs))

    def _answer(self, until: int | None, number: int, call: Call) -> Any:
        if number in self._answers:
            self._check_same(number, call)
            answer = self._answers[number]
        else:
            self._resume()
            if number == until:
                self._met = call
                raise _Held
            if self._keeps or self.last is not None:
                self._tokens[number] = _tokens(call)
            self.made = max(self.made, number + 1)
            answer = self._drive(number, call)
            if self._keeps:
                self._answers[number] = answer
        if number == self.last:
            raise _Held
        return answer

    def _check_same(self, number: int, call: Call) -> None:
        if not torch.equal(self._tokens[number], _tokens(call)):
            self._differs()

    def _differs(self) -> NoReturn:
        raise TraceError(
            "this generation was held for a number, and has gone another way when it was gone on with: a processor or "
            "criterion of yours does not do the same when it is asked again; look at numbers after the block"
        )

    def _ids(self) -> torch.Tensor:
        """The tokens so far, the prompt included: i64[batch, length]."""
        ids, prompt = self._tokens[0], _tokens(self._call)
        if ids.shape[1] < prompt.shape[1] and not ids.shape[0] % max(prompt.shape[0], 1) and BEFORE not in self._tokens:
            ids = prompt.repeat_interleave(ids.shape[0] // prompt.shape[0], 0)  # a cache of the user's has the rest
        for number in range(1, self.made):
            new = self._tokens[number]
            ids = new if new.shape[1] == ids.shape[1] + 1 else torch.cat([ids, new[:, -1:]], dim=1)
        return ids


def _tokens(call: Call) -> torch.Tensor:
    """The tokens in a call: i64[batch, length], none where it is given embeddings."""
    args, kwargs = call
    given = [kwargs.get("decoder_input_ids"), kwargs.get("input_ids"), *args[:1]]
    found = next((x for x in given if isinstance(x, torch.Tensor) and not x.is_floating_point()), None)
    rows = next((x.shape[0] for x in kwargs.values() if isinstance(x, torch.Tensor) and x.ndim), 0)
    return torch.empty((rows, 0), dtype=torch.int64) if found is None else found


def _copied(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with copies of what the user has written to take part; a streamer is given the tokens at the end.

    Raises: NeedsValueError.
    """
    own = {name: value for name, value in kwargs.items() if name != "streamer"}
    for name in ("logits_processor", "stopping_criteria"):
        try:
            own[name] = copy.deepcopy(own.get(name))
        except Exception as error:  # whatever the copying of a user's object raises
            raise NeedsValueError(
                f"a number of a later step is needed, and {name} cannot be copied: {error}"
            ) from error
    return own


def _random_state() -> Any:
    """The state of torch's generators of random numbers."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None


def _set_random_state(state: Any) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
