"""What is known of the generations of one model, by what decides which calls they make."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch

from fxsight.captures import Captures
from fxsight.encoder import Encoder
from fxsight.ids import result_of
from fxsight.known import Step as Way
from fxsight.rehearsal import Known, kinds_of, rehearse
from fxsight.rows import Call
from fxsight.tree import flatten
from fxsight.watch import Watch

KEPT = 64


@dataclass(frozen=True, eq=False)
class Score:
    """The steps of one generation, and the ways that bodies have gone in them.

    result: of the ids that it returns; None where it returns more.  encoder: None where none is called.
    held: what the key names by identity.
    """

    steps: list[Known]
    result: Known | None
    encoder: Encoder | None
    watch: Watch
    held: Any
    roots: dict[Any, Way] = field(default_factory=dict[Any, Way])


class Repertoire:
    """All generations of one model that have been rehearsed."""

    def __init__(self) -> None:
        self._scores: OrderedDict[Any, Score] = OrderedDict()

    def of(self, captures: Captures, method: str, call: Call) -> Score:
        """The steps of ``module.method(*args, **kwargs)``; rehearsed where that is new.

        Raises: as ``rehearse``.
        """
        leaves, tree = flatten(call)
        config = getattr(captures.module, "generation_config", None)
        key = (
            method,
            tree,
            tuple(map(_mark, leaves)),
            str(vars(config)) if config is not None else "",
            _ends(leaves, config),
        )
        watch, found = captures.watched(), self._scores.get(key)
        if found is None or found.watch is not watch:
            found = self._scores[key] = Score(*_rehearsed(captures, method, call), captures.watched(), leaves)
            if len(self._scores) > KEPT:
                self._scores.popitem(last=False)
        self._scores.move_to_end(key)
        return found


def _rehearsed(captures: Captures, method: str, call: Call) -> tuple[list[Known], Known | None, Encoder | None]:
    steps, shape, device, encoded = rehearse(captures, method, call)
    result = None if shape is None else result_of(*shape, device)
    return steps, result, None if encoded is None else Encoder(captures, encoded)


def _mark(leaf: Any) -> Any:
    """What of an argument decides which calls are made."""
    if isinstance(leaf, torch.Tensor):
        is_mask = leaf.ndim == 2 and not leaf.is_floating_point() and bool((leaf == 1).all())
        return (*kinds_of([leaf]), is_mask)
    if hasattr(leaf, "to_dict"):
        return str(leaf.to_dict())
    return leaf if leaf is None or isinstance(leaf, (bool, int, float, str)) else id(leaf)


def _ends(leaves: list[Any], config: Any) -> Any:
    """Whether the tokens have padding among them: then a mask is made."""
    ids = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    tokens = {int(i) for found in ids if found is not None for i in torch.as_tensor(found).reshape(-1)}
    given = [x for x in leaves if isinstance(x, torch.Tensor) and x.dtype == torch.int64]
    return tuple(bool((x == token).any()) for x in given for token in sorted(tokens))
