"""``At``: the values of one place inside a trace, by address."""

from __future__ import annotations

from typing import Any, Protocol

from fxsight.address import Address


class Reading(Protocol):
    """What is needed of a trace."""

    def read(self, address: Address, port: str) -> Any:
        """The value at a port."""
        ...

    def write(self, address: Address, port: str, value: Any) -> None:
        """Let a port have another value."""
        ...


class At:
    """The values of one place inside a trace."""

    def __init__(self, tracer: Reading, address: Address) -> None:
        self._tracer, self._address = tracer, address

    @property
    def output(self) -> Any:
        """What it returns."""
        return self._tracer.read(self._address, "output")

    @output.setter
    def output(self, value: Any) -> None:
        self._tracer.write(self._address, "output", value)

    @property
    def input(self) -> Any:
        """Its first argument."""
        return self._tracer.read(self._address, "input")

    @input.setter
    def input(self, value: Any) -> None:
        self._tracer.write(self._address, "input", value)

    @property
    def inputs(self) -> Any:
        """All its arguments: ``(args, kwargs)``."""
        return self._tracer.read(self._address, "inputs")

    @inputs.setter
    def inputs(self, value: Any) -> None:
        self._tracer.write(self._address, "inputs", value)
