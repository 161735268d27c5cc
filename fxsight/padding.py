"""Prompts of different lengths as one batch: padded so that each has the values that it has alone.

On the left, as for generation, with a mask and with the position of each token; on the right in models that take no
positions and count them from the left (encoder-decoders).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fxsight.errors import TraceError
from fxsight.rows import Call


@dataclass(frozen=True)
class Padding:
    """How prompts of one model are made equally long.

    token: what stands at padded positions, hidden by the mask.  mask, positions: whether the forward takes them.
    """

    side: Literal["left", "right"]
    token: int
    mask: bool
    positions: bool

    @staticmethod
    def of(module: nn.Module, tokenizer: Any, accepted: frozenset[str]) -> Padding:
        """That of a model whose forward accepts these arguments."""
        config: Any = getattr(module, "config", None)
        # RoBERTa and its kin count positions themselves, from the tokens that are not the config's padding.
        counts = any(hasattr(part, "create_position_ids_from_input_ids") for part in module.modules())
        tokens = [getattr(tokenizer, "pad_token_id", None), getattr(config, "pad_token_id", None)]
        tokens = [*(tokens[::-1] if counts else tokens), getattr(tokenizer, "eos_token_id", None)]
        return Padding(
            "right" if getattr(config, "is_encoder_decoder", False) else "left",
            next((int(token) for token in tokens if token is not None), 0),
            "attention_mask" in accepted,
            "position_ids" in accepted and not counts,
        )

    def of_rows(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, torch.Tensor]:
        """Arguments by name, given row by row, as tensors of one length."""
        lengths = [len(row) for row in rows["input_ids"]]
        if len(set(lengths)) == 1:
            return {name: torch.tensor(value) for name, value in rows.items()}
        singles = [
            ((), {name: torch.tensor(value[i])[None] for name, value in rows.items()}) for i in range(len(lengths))
        ]
        return stacked(self.to_one_length(singles))

    def to_one_length(self, calls: Sequence[Call]) -> list[Call]:
        """The same calls with tokens of one length, and with one set of arguments.

        Raises: TraceError where the model has no attention mask that could hide the padding.
        """
        tokens = [kwargs.get("input_ids") for args, kwargs in calls if not args]
        if len(tokens) != len(calls) or any(not isinstance(x, torch.Tensor) for x in tokens):
            return list(calls)
        lengths = [int(x.shape[1]) for x in tokens]  # type: ignore[union-attr]
        names = {tuple(kwargs) for _, kwargs in calls}
        if len(set(lengths)) == 1 and len(names) == 1:
            return list(calls)
        if not self.mask:
            raise TraceError(
                f"prompts of {' and '.join(map(str, lengths))} tokens in one batch: this model takes no attention "
                "mask, which could hide the padding; use a trace for each"
            )
        padded = len(set(lengths)) > 1
        return [((), self._padded(kwargs, max(lengths), padded)) for _, kwargs in calls]

    def _padded(self, kwargs: Mapping[str, Any], length: int, positions: bool) -> dict[str, Any]:
        ids = kwargs["input_ids"]
        own = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **kwargs}
        if positions and self.positions and "position_ids" not in own:
            own["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape).clone()
        return {name: self._longer(name, value, ids.shape[1], length) for name, value in own.items()}

    def _longer(self, name: str, value: Any, now: int, length: int) -> Any:
        """One argument; those with an entry for each token get more of them."""
        if not isinstance(value, torch.Tensor) or value.ndim < 2 or value.shape[1] != now:
            return value
        fill = {"input_ids": self.token, "labels": -100}.get(name, 0)
        if name == "labels" and self.side == "left" and now < length:
            value = torch.cat([value.new_full((len(value), 1), fill), value[:, 1:]], 1)  # nothing predicts the first
        more = value.new_full((value.shape[0], length - now, *value.shape[2:]), fill)
        return torch.cat([more, value] if self.side == "left" else [value, more], dim=1)


def stacked(calls: Sequence[Call]) -> dict[str, torch.Tensor]:
    """The rows of calls with equal arguments, one below the other."""
    return {name: torch.cat([kwargs[name] for _, kwargs in calls]) for name in calls[0][1]}
