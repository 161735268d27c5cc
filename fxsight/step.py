"""One step of a generation: a trace of its own, over the program that this call of the module has; it is driven here.

Its body is written before anything is generated (``step_body``); ``drive`` runs it on the inputs of the real call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from fxsight.address import Address
from fxsight.ahead import SMALL
from fxsight.around import Around
from fxsight.become import become
from fxsight.captures import Captures
from fxsight.cell import not_saved
from fxsight.edit import Edit
from fxsight.errors import TraceError
from fxsight.inputs import PLAIN
from fxsight.invoke import Batch
from fxsight.leave import Returned
from fxsight.place import Location
from fxsight.record import Recorder
from fxsight.rehearsal import Known
from fxsight.rows import Call
from fxsight.run import Executable
from fxsight.sizes import bind_sizes
from fxsight.step_body import StepBody
from fxsight.tree import flatten
from fxsight.value import Value


class Step(StepBody):
    """Step ``number`` of a generation, of which the program and the sizes are known before it runs.

    The arguments are those of its body.
    """

    def __init__(
        self, around: Around, number: int, known: Known, captures: Captures, edits: Sequence[Edit] = ()
    ) -> None:
        super().__init__(around, number, known, captures, edits)
        self._is_closed = self._is_complete = False
        self._constants: Sequence[torch.Tensor] = ()
        self._output: Sequence[Any] = ()

    def close(self) -> None:
        """The body has ended."""
        if self._is_closed:
            return
        self._is_closed, walk = True, self._walk
        if self._around.is_last(self.number):
            self._returned = None
        finish = walk.step.finish if walk.fast and walk.step is not None else None
        if finish is not None:
            self._finished, self._constants = finish, walk.constants(finish)
        else:
            self._written  # noqa: B018 - it is written down now
            self._complete()

    def _complete(self) -> None:
        recorder = self._written
        recorder.rows = None
        self._finish(recorder)
        if self._returned is not None:
            place = self.captures.places(self._captured).find(Address(""))
            found = self._places.locations(place, "output")[1]
            self._kept.append(self._returned.save(partial(self._node, recorder, found)))
        self._is_complete = True

    def _node(self, recorder: Recorder, found: Sequence[Location | None], number: int) -> fx.Node:
        location = found[number]
        assert location is not None, "what a module returns is a value of the graph"
        return recorder.node_at(location, "")

    @property
    def _is_cut(self) -> bool:
        """Whether nothing is returned, though the module does."""
        return self._returned is None and self._step.returned is not None

    @property
    def foreign(self) -> list[Value]:
        """The values of other steps that this one needs."""
        constants: list[Any] = [] if self._recorder is None else self._recorder.body.constants
        return [x for x in constants if isinstance(x, Value)]

    def drive(self, call: Call, wanted: Sequence[Value]) -> Any:
        """Run on the real inputs.  Returns: what the module returns, with the edits of this step.

        wanted: values that later steps use.

        Raises: TraceError where the body has looked at sizes that are others now.
        """
        self._batch = Batch([call], False, PLAIN)
        leaves = self._step.leaves(call)
        if leaves is None:
            self._meet(call)
        if self._finished is not None and leaves is not None:
            self._run_known(leaves, call)
        else:
            for value in self.foreign:
                raise not_saved(value.cell)
            self.run(wanted)
            if self._executable is not None and not self._updates and not self.is_decided and not self._is_cut:
                self._walk.remember(self._executable, self._written.constants, self._numbers)
        output = None
        if self._returned is not None:
            output = self._returned.build(self._output, call, self._sizes, self.captures.weight)
        self.end()
        return output

    def _made(self, executable: Executable) -> None:
        """What runs once a token is compiled in one piece if it is small: calls of regions take a tenth of its time."""
        if self.number > 0 and executable.tier == "inductor" and len(executable.program.nodes) <= SMALL:
            executable.compile_whole()

    def _run_known(self, leaves: list[Any], call: Call) -> None:
        finish = self._finished
        assert finish is not None
        executable = finish.executable
        results = executable.run(leaves, self._constants, call, self._around.prepared(executable))
        self._output = results[len(results) - self._outputs :]
        values = self._walk.values
        for index, place in finish.results:
            become(values[index], results[place])

    @property
    def _outputs(self) -> int:
        return 0 if self._returned is None else self._returned.count

    def _fill(self, results: Sequence[torch.Tensor]) -> None:
        stop = len(results) - len(self._updates)
        self._output = results[stop - self._outputs : stop]
        super()._fill(results)

    def _meet(self, call: Call) -> None:
        """The inputs are not those that were expected: another size, or another way through the model."""
        program, sizes = self._find_now(call)
        self._finished = None
        recorder = self._written
        if self._known:
            raise TraceError(f"{self.title} has other inputs than those of which its body has seen numbers")
        if recorder.body.looked:
            others = [name for name in self._sizes if sizes.get(name) != self._sizes[name]]
            changed = ", ".join(f"{name} = {sizes.get(name)}, not {self._sizes[name]}" for name in others)
            raise TraceError(
                f"{self.title} of this generation has other sizes than it was written for ({changed}), and its "
                "body depends on them"
            )
        if program is not self._captured and self._returned is not None:
            self._returned = Returned(program)
        self._go_on(recorder, program, sizes)
        if not self._is_complete:
            self._complete()

    def _find_now(self, call: Call) -> tuple[Any, Mapping[str, int]]:
        if self._step.returned is not None:
            return self.captures.find(*call)
        return self._captured, bind_sizes(self._captured, flatten(call)[0])

    def unreached(self, why: str) -> None:
        """It does not run: what it keeps stays unset."""
        recorder = self._written
        recorder.unreached = why
        for keeper in self._keepers:
            keeper.void(why)
        recorder.phase = "done"
        self.end()

    def end(self) -> None:
        """Nothing is kept alive that was not saved."""
        if self._recorder is not None:
            self._recorder.phase = "done"
        self.captures.attached_calls.forget(self)
        self._walk.end()
        self.forget()
        self._output, self._constants = (), ()
