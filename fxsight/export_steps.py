"""``edited.export_generation(folder, input_ids=ids)``: an edited language model as two files that generate.

``prefill.pt2`` takes prompts and returns logits and a cache of keys and values; ``decode.pt2`` takes one token for
each prompt and the cache, and returns both again. The tensors of the cache are inputs and outputs of the same names:

    out = prefill(input_ids=ids)
    for _ in range(20):
        token = out["logits"][:, -1:].argmax(-1)
        out = decode(input_ids=token, **out["past_key_values"])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fxsight.captures import Captures
from fxsight.edits import Edits
from fxsight.errors import EditError
from fxsight.export import Export, export_edited
from fxsight.export_check import check_generation
from fxsight.past import is_past
from fxsight.rows import Call

_TOKENS = 8  # that the files generate, to be compared


@dataclass(frozen=True)
class Steps:
    """The two files of a generation, and the name of the cache among what they return."""

    prefill: Export
    decode: Export
    cache: str


def export_steps(captures: Captures, edits: Edits, call: Call, folder: str | Path, check: bool) -> Steps:
    """Write the two files; see ``Model.export_generation``.

    Raises: EditError.
    """
    first, folder = _prefill_call(captures, call), Path(folder)
    calls = [first, *_others(first)]
    with torch.no_grad():
        outs = [edits.call(captures, ((), kwargs)) for kwargs in calls]
    name = _cache_name(outs[0])
    after = [_decode_call(kwargs, out, name) for kwargs, out in zip(calls, outs, strict=True)]
    made = [
        export_edited(captures, edits, ((), own), folder / f"{part}.pt2", "pt2", check, [((), o) for o in others])
        for part, (own, *others) in (("prefill", calls), ("decode", after))
    ]
    found = Steps(made[0], made[1], name)
    if check:
        wanted = [_greedy(captures, edits, kwargs, name) for kwargs in calls]
        check_generation(found.prefill.path, found.decode.path, name, list(zip(calls, wanted, strict=True)))
    return found


def _prefill_call(captures: Captures, call: Call) -> dict[str, Any]:
    """The prompts as keywords, with all that says where each token stands."""
    args, kwargs = call
    if args or "input_ids" not in kwargs:
        raise EditError("what is exported generates from token ids: edited.export_generation(folder, input_ids=ids)")
    if any(is_past(value) for value in kwargs.values()):
        raise EditError("the example is a prompt, without a cache: the export makes the cache itself")
    alone = kwargs["input_ids"].shape[0] == 1  # a size of one does not stay free: the same prompt twice
    given = {k: v.repeat(2, *[1] * (v.dim() - 1)) if alone and _has_rows(v) else v for k, v in kwargs.items()}
    found: dict[str, Any] = {**given, "use_cache": True}
    if "attention_mask" in found and "position_ids" not in found:
        found["position_ids"] = (found["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return found


def _others(call: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The same for other numbers of prompts and tokens."""
    rows, length = call["input_ids"].shape
    for more, longer in ((1, 2), (3, -1 if length > 2 else 1)):
        dice = torch.Generator().manual_seed(more)
        which = torch.randint(call["input_ids"].numel(), (rows + more, length + longer), generator=dice)
        made = {**call, "input_ids": call["input_ids"].flatten()[which.to(call["input_ids"].device)]}
        if "attention_mask" in call:
            made["attention_mask"] = torch.ones_like(made["input_ids"])
            made["position_ids"] = made["attention_mask"].cumsum(-1) - 1
        yield made


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == 1


def _cache_name(out: Any) -> str:
    found: list[str] = [name for name, value in out.items() if is_past(value)] if isinstance(out, Mapping) else []
    if len(found) != 1 or "logits" not in out:
        has = ", ".join(out) if isinstance(out, Mapping) else type(out).__name__
        raise EditError(f"generating needs logits and a cache of keys and values; this forward returns {has}")
    return found[0]


def _decode_call(call: Mapping[str, Any], out: Any, cache: str) -> dict[str, Any]:
    """The next call: the most likely token, and the cache."""
    token = out["logits"][:, -1:].argmax(-1)
    return {**_following(call, token), cache: out[cache]}


def _following(call: Mapping[str, Any], token: torch.Tensor) -> dict[str, Any]:
    """The inputs of the next step: one token for each prompt, and where it stands."""
    found = {**call, "input_ids": token}
    if "attention_mask" in call:
        found["attention_mask"] = torch.cat([call["attention_mask"], torch.ones_like(token)], -1)
    if "position_ids" in call:
        found["position_ids"] = call["position_ids"][:, -1:] + 1
    return found


def _greedy(captures: Captures, edits: Edits, call: Mapping[str, Any], cache: str) -> torch.Tensor:
    """The tokens that the edited model itself generates."""
    tokens: list[torch.Tensor] = []
    now = dict(call)
    with torch.no_grad():
        for _ in range(_TOKENS):
            out = edits.call(captures, ((), now))
            now = _decode_call({k: v for k, v in now.items() if k != cache}, out, cache)
            tokens.append(now["input_ids"])
    return torch.cat(tokens, -1)
