"""The task of W1 to W3: what is patched where, and the number that is read.

Imported by the nnsight worker, too: torch only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from tests.bench import models

PROMPTS, LENGTH = 8, 15
RIGHT, WRONG = 11, 17  # the two tokens whose logits are compared


@dataclass(frozen=True)
class Task:
    """A clean and a corrupted batch of prompts, i64[prompts, length]; cells are (layer, position)."""

    clean: Tensor
    corrupted: Tensor
    layers: int
    length: int

    @staticmethod
    def of(net: Any, quick: bool) -> "Task":
        """Eight prompts of fifteen tokens and every layer; ``quick``: three positions of two layers."""
        clean, corrupted = (models.tokens(net, PROMPTS, LENGTH, seed) for seed in (3, 4))
        return Task(clean, corrupted, 2 if quick else net.config.n_layer, 3 if quick else LENGTH)

    def cells(self) -> Iterator[tuple[int, int]]:
        """Every layer with every position."""
        return product(range(self.layers), range(self.length))

    @staticmethod
    def metric(logits: Any) -> Any:
        """Logit difference at the last position, f32[prompts]; of a tensor, or of what a tool has for one."""
        return logits[:, -1, RIGHT] - logits[:, -1, WRONG]


def forget_plans(model: Any) -> None:
    """What is timed next makes its plan: an equal sweep or session before it is not remembered."""
    model._captures.plans.clear()


def stacked(cells: list[Tensor]) -> list[Tensor]:
    """All cells as one result, f32[cells, prompts]."""
    return [torch.stack(cells)]
