"""Grids as pictures: with matplotlib where it is installed, and as text anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxsight.errors import InputError

SHADES = " ░▒▓█"


@dataclass(frozen=True)
class Axis:
    """One side of a picture: its name, and what stands at its ticks."""

    name: str
    labels: tuple[str, ...]


def sides(values: Any, axes: Sequence[tuple[str, Sequence[Any]]]) -> tuple[torch.Tensor, Axis, Axis]:
    """A tensor as rows and columns: f64[rows, columns] and what they are called; sides of one are left out.

    axes: the names and labels of the first sides; the others are ``dim_0`` …, by number.

    Raises: InputError for what has more than two sides, or is no tensor.
    """
    if not isinstance(values, torch.Tensor):
        raise InputError("a picture is of one number for each place: choose a member, grid['name']")
    inner = [(f"dim_{d}", range(size)) for d, size in enumerate(values.shape[len(axes) :])]
    named = [Axis(name, tuple(map(str, labels))) for name, labels in [*axes, *inner]]
    kept = [axis for axis in named if len(axis.labels) != 1]
    if len(kept) > 2:
        shape = ", ".join(f"{axis.name} {len(axis.labels)}" for axis in kept)
        raise InputError(
            f"a picture has two sides, and this grid has {len(kept)} ({shape}): choose with "
            f"grid.at({kept[0].name}=...), or add up, grid.map(lambda value: value.sum(0))"
        )
    kept = [Axis("", ("",))] * (2 - len(kept)) + kept if len(kept) < 2 else kept
    rows, columns = reversed(kept) if not kept[0].name else kept
    numbers = values.detach().cpu().to(torch.float64).reshape(len(rows.labels), len(columns.labels))
    return numbers, rows, columns


def as_text(numbers: torch.Tensor, rows: Axis, columns: Axis) -> str:
    """A heat map of characters: a shade for the size of each number, ``-`` before those below zero, ``?`` for NaN."""
    largest = float(torch.nan_to_num(numbers).abs().max()) if numbers.numel() else 0.0
    wide = max(map(len, (rows.name, *rows.labels)))
    lines = [f"{rows.name:{wide}} | {columns.name} {columns.labels[0]} … {columns.labels[-1]}".rstrip(" …")]
    for label, row in zip(rows.labels, numbers.tolist(), strict=True):
        lines.append(f"{label:{wide}} |{''.join(_shade(number, largest) for number in row)}|")
    return "\n".join([*lines, f"{SHADES[-1]} is {largest:.3g}"])


def _shade(number: float, largest: float) -> str:
    if number != number:
        return " ?"
    level = round(abs(number) / largest * (len(SHADES) - 1)) if largest else 0
    return ("-" if number < 0 and level else " ") + SHADES[level]


def draw(numbers: torch.Tensor, rows: Axis, columns: Axis, axes: Any = None) -> Any:
    """A heat map of matplotlib's, blue below zero and red above.  Returns: its ``Axes``.

    Raises: ImportError without matplotlib.
    """
    try:
        from matplotlib import pyplot  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise ImportError(
            "plot() needs matplotlib: pip install matplotlib; print(grid.to_text()) needs nothing"
        ) from None
    plot: Any = pyplot
    if axes is None:
        _, axes = plot.subplots()
    largest = float(torch.nan_to_num(numbers).abs().max()) or 1.0
    image = axes.imshow(numbers.tolist(), cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    for axis, setters in ((columns, (axes.set_xlabel, axes.set_xticks)), (rows, (axes.set_ylabel, axes.set_yticks))):
        setters[0](axis.name)
        step = max(1, len(axis.labels) // 32)
        setters[1](list(range(0, len(axis.labels), step)), labels=list(axis.labels[::step]))
    axes.tick_params(axis="x", rotation=90)
    axes.figure.colorbar(image, ax=axes)
    return axes
