"""Prompts → the call of a language model: texts, token ids or a tokenizer's result, as tensors of one length.

A single prompt gives what ``model(**tokenizer(prompt, return_tensors="pt"))`` gives. Prompts of different lengths are
padded here, not by the tokenizer, so that a tokenizer needs no padding token and keeps its settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import fx, nn

from fxsight.errors import InputError, TraceError
from fxsight.inputs import Inputs
from fxsight.media import media_in, only_accepted, processed
from fxsight.padding import Padding
from fxsight.program import Program
from fxsight.rows import Call
from fxsight.tokens import Tokens

_HIDES_NOTHING = "does not look at an attention mask, which could hide the padding; use a trace for each"


class Prompts(Inputs):
    """What the blocks of a language model ask of inputs.

    module: the model as it is now; its forward says which arguments are its own, all others are the tokenizer's.
    tokenizer: None where the model has none; then token ids are the only inputs.
    processor: what makes tensors of images.  look: where it is looked for, once, when there are images.
    """

    def __init__(
        self, module: nn.Module, tokenizer: Any, processor: Any = None, look: Callable[[], Any] | None = None
    ) -> None:
        self.module, self.tokenizer = module, tokenizer
        self.known_processor, self._look = processor, look

    @property
    def processor(self) -> Any:
        """The processor; None where the model has none.

        Raises: LoadError where it needs a library that is not there.
        """
        if self.known_processor is None and self._look is not None:
            self.known_processor, self._look = self._look(), None
        return self.known_processor

    @cached_property
    def accepted(self) -> frozenset[str]:
        """The names of the arguments of the module's forward."""
        return frozenset(inspect.signature(type(self.module).forward).parameters)

    def _is_word(self, name: str) -> bool:
        """Whether an argument is the tokenizer's."""
        kind: Any = type(self.tokenizer)
        return self.tokenizer is not None and name in _arguments(kind) - self.accepted

    @property
    def padding(self) -> Padding:
        """How this model is padded."""
        return Padding.of(self.module, self.tokenizer, self.accepted)

    def are_given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether there is an input in the arguments of a block; without, the invokes in it bring theirs."""
        return bool(args or media_in(kwargs)) or any(isinstance(x, torch.Tensor) for x in kwargs.values())

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """The call of the module: keyword arguments with the tokens in them.

        Raises: InputError for a text without a tokenizer, for no tokens, for what is neither text nor tokens, and for
        images without a processor or a text.
        """
        words = {name: value for name, value in kwargs.items() if self._is_word(name)}
        media = media_in(kwargs, self.accepted)
        own = {name: value for name, value in kwargs.items() if name not in words and name not in media}
        if media:
            made = processed(self.processor, args[0] if len(args) == 1 else args, media, words)
            return (), self._on_device({**only_accepted(made, type(self.module).forward), **own})
        if isinstance(own.get("labels"), (str, list)):
            own["labels"] = self._tokens(own["labels"], words)["input_ids"]
        if len(args) != 1 or (isinstance(args[0], torch.Tensor) and not _is_ids(args[0])):
            return args, self._on_device(own)
        return (), self._on_device(self._with_start({**self._tokens(args[0], words), **own}))

    def join(self, calls: Sequence[Call]) -> Call:
        """One call with the rows of several; those of different lengths are padded.

        Raises: TraceError where they cannot be one batch.
        """
        return super().join(self.padding.to_one_length(calls))

    def check(self, program: Program, call: Call) -> None:
        """Whether the model looks at the mask that hides padding.

        Raises: TraceError for a padded batch on a model that does not.
        """
        mask, node = call[1].get("attention_mask"), program.nodes.get("attention_mask")
        if isinstance(mask, torch.Tensor) and node is not None and not _is_used(node) and not bool(mask.all()):
            raise TraceError(f"prompts of different lengths in one batch: {program.name} {_HIDES_NOTHING}")

    def tokens(self, call: Call) -> Tokens:
        """The tokens in a call.

        Raises: TraceError where it has no token ids.
        """
        args, kwargs = call
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            raise TraceError("the input of this block has no token ids")
        mask = kwargs.get("attention_mask")
        kept = (
            mask.bool() if isinstance(mask, torch.Tensor) and mask.shape == ids.shape else torch.ones_like(ids).bool()
        )
        places = torch.arange(ids.shape[1]) - (ids.shape[1] if self.padding.side == "left" else 0)
        rows = [(row[keep].tolist(), places[keep.cpu()].tolist()) for row, keep in zip(ids, kept, strict=True)]
        return Tokens([ids for ids, _ in rows], [positions for _, positions in rows], self.tokenizer)

    # -- one prompt --------------------------------------------------------------------------------------------------

    def _tokens(self, given: Any, words: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the module that are made of a prompt."""
        if isinstance(given, Mapping) or hasattr(given, "input_ids"):
            return {name: torch.as_tensor(value) for name, value in given.items()}
        if isinstance(given, torch.Tensor):
            return {"input_ids": _checked(given if given.ndim > 1 else given[None], given)}
        if isinstance(given, (list, tuple)) and any(isinstance(x, (list, tuple)) and not x for x in given):
            raise InputError(f"a prompt in {given!r} has zero tokens: a model needs at least one")
        if _is_texts(given):
            return self._encoded([given] if isinstance(given, str) else list(given), words)
        if isinstance(given, (list, tuple)) and given and all(isinstance(x, int) for x in given):
            return {"input_ids": torch.tensor([given])}
        if isinstance(given, (list, tuple)) and given and all(map(_is_row, given)):
            return self.padding.of_rows({"input_ids": [torch.as_tensor(x).tolist() for x in given]})
        raise InputError(f"a prompt is a text, a list of texts, token ids or a tokenizer's result; this is {given!r}")

    def _encoded(self, texts: list[str], words: Mapping[str, Any]) -> dict[str, Any]:
        if self.tokenizer is None:
            raise InputError(
                "a text needs a tokenizer, and this model has none: LanguageModel(module, tokenizer=...), or give "
                "token ids"
            )
        rows = self.tokenizer(texts, **{k: v for k, v in words.items() if k != "return_tensors"})
        empty = next((text for text, ids in zip(texts, rows["input_ids"], strict=True) if not len(ids)), None)
        if empty is not None:
            raise InputError(f"the prompt {empty!r} has zero tokens: a model needs at least one")
        return self.padding.of_rows({name: value for name, value in rows.items() if name in self.accepted})

    def _with_start(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """An encoder-decoder decodes from somewhere: without anything else, from the token that it begins with."""
        config: Any = getattr(self.module, "config", None)
        start = (
            getattr(config, "decoder_start_token_id", None) if getattr(config, "is_encoder_decoder", False) else None
        )
        if start is None or "labels" in kwargs or any(name.startswith("decoder_input") for name in kwargs):
            return kwargs
        return {**kwargs, "decoder_input_ids": torch.full((kwargs["input_ids"].shape[0], 1), start)}

    def _on_device(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        if device.type == "meta":
            return dict(kwargs)
        return {k: v.to(device) if type(v) is torch.Tensor and v.device != device else v for k, v in kwargs.items()}


@cache
def _arguments(tokenizer: Hashable) -> frozenset[str]:
    """The names of the arguments of a tokenizer's call."""
    call: Any = tokenizer.__call__  # type: ignore[operator]
    return frozenset(inspect.signature(call).parameters) - {"self", "kwargs"}


def _is_used(node: fx.Node) -> bool:
    """Whether anything but a module's border has a value."""
    return any(
        user.op != "output" and (user.target is not torch.ops.aten.alias.default or _is_used(user))
        for user in node.users
    )


def _is_texts(given: Any) -> bool:
    return isinstance(given, str) or (
        isinstance(given, (list, tuple)) and bool(given) and all(isinstance(x, str) for x in given)
    )


def _is_ids(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and tensor.ndim in (1, 2)


def _is_row(given: Any) -> bool:
    return isinstance(given, torch.Tensor) or (
        isinstance(given, (list, tuple)) and all(isinstance(x, int) for x in given)
    )


def _checked(ids: torch.Tensor, given: Any) -> torch.Tensor:
    if ids.shape[-1] == 0:
        raise InputError(f"the prompt {given!r} has zero tokens: a model needs at least one")
    return ids
