"""What is really executed: the operators that run on numbers, counted."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: TID251 - the documented way to see every operator


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that are executed on numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
        if all(x.device.type != "meta" and type(x).__name__ != "FakeTensor" for x in leaves):  # those are shapes
            self.names.append(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))

    def __getitem__(self, name: str) -> int:
        return self.names.count(name)

    @property
    def linears(self) -> int:
        """How many linear layers have run."""
        return self["addmm"] + self["linear"]
