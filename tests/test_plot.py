"""Grids as pictures."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from fxsight.errors import InputError
from fxsight.grid import Grid
from fxsight.tree import LEAF

NAN = float("nan")


def _grid(values: torch.Tensor, **axes: tuple[Any, ...]) -> Grid:
    done = torch.ones([len(x) for x in axes.values()], dtype=torch.bool)
    return Grid(axes, LEAF, [values], done, "exact")


def test_a_picture_of_characters() -> None:
    grid = _grid(torch.tensor([[[2.0, -1.0, NAN]], [[0.0, 0.5, -2.0]]]), place=("h.0", "h.11"))
    assert grid.to_text().splitlines() == ["place | dim_1 0 … 2", "h.0   | █-▒ ?|", "h.11  |   ░-█|", "█ is 2"]


def test_one_side_and_none() -> None:
    assert _grid(torch.tensor([1.0, -1.0]), place=("a", "b")).to_text().splitlines()[1:3] == [
        "a     | █|",
        "b     |-█|",
    ]
    assert _grid(torch.tensor([0.0]), place=("a",)).to_text().endswith("█ is 0")


def test_more_sides_are_refused_and_can_be_added_up() -> None:
    grid = _grid(torch.arange(12.0).reshape(2, 2, 3), place=("a", "b"))
    message = r"this grid has 3 \(place 2, dim_0 2, dim_1 3\): choose with grid.at\(place=...\), or add up, grid.map"
    with pytest.raises(InputError, match=message):
        grid.to_text()
    summed = grid.map(lambda value: value.sum(0))
    assert torch.equal(summed.values, grid.values.sum(1))
    assert summed.at(place="b").to_text().splitlines()[0] == "dim_0 |"
    with pytest.raises(InputError, match="the cells would have shapes"):
        grid.map(lambda value: value[: int(value[0, 0] > 0)])


def test_without_matplotlib_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plot\(\) needs matplotlib: .*print\(grid.to_text\(\)\) needs nothing"):
        _grid(torch.zeros(2, 3), place=("a", "b")).plot()


class _Axes:
    """What a picture is drawn on, written down."""

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}
        self.figure = self

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.said.setdefault(name, (args, kwargs))


def test_with_matplotlib_it_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    made, package, pyplot = _Axes(), types.ModuleType("matplotlib"), types.ModuleType("matplotlib.pyplot")
    pyplot.subplots = lambda: (None, made)  # type: ignore[attr-defined]
    package.pyplot = pyplot  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "matplotlib", package)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    grid = _grid(torch.tensor([[1.0, -3.0]]).expand(2, 2), layer=("a", "b"))
    assert grid.plot() is made
    (numbers,), options = made.said["imshow"]
    assert numbers == [[1.0, -3.0], [1.0, -3.0]]
    assert (options["vmin"], options["vmax"]) == (-3.0, 3.0)
    assert made.said["set_ylabel"] == (("layer",), {})
    assert made.said["set_yticks"] == (([0, 1],), {"labels": ["a", "b"]})
