"""A twin of a module: its parameters, its methods, another forward."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from fxsight.twin import twin


class Twice(nn.Module):
    """A module with a method that calls it again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """One step."""
        scaled: torch.Tensor = self.layer(x) * scale
        return scaled

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """Two steps."""
        twice: torch.Tensor = self(self(x), scale=2.0)
        return twice


def test_a_method_calls_our_forward_and_the_module_is_as_it_was() -> None:
    module, calls = Twice(), list[Any]()
    before = (type(module), dict(vars(module)))

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return module(*args, **kwargs)

    x = torch.randn(3, 2)
    made = twin(module, forward)
    assert torch.equal(made.run(x), module.run(x))
    assert [kwargs for _, kwargs in calls] == [{}, {"scale": 2.0}]
    assert (type(module), vars(module)) == before
    assert made.layer is module.layer and isinstance(made, Twice) and type(made).__name__ == "Twice"
    assert inspect.signature(made.forward) == inspect.signature(module.forward)


def test_hooks_of_the_module_run_once() -> None:
    module, seen = Twice(), list[str]()
    module.register_forward_hook(lambda *_: seen.append("hook"))
    twin(module, module)(torch.randn(1, 2))
    assert seen == ["hook"]


def test_a_weight_that_is_replaced_is_replaced_in_the_twin() -> None:
    module = Twice()
    made = twin(module, module)
    module.layer = nn.Linear(2, 2)
    assert made.layer is module.layer
