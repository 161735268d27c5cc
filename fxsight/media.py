"""Images, videos and sounds among the inputs of a block: the model's processor makes tensors of them and the text."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from fxsight.errors import InputError

MEDIA = ("images", "videos", "audio")


def media_in(kwargs: Mapping[str, Any], accepted: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The media among keyword arguments.  accepted: names of the module's own arguments, which are none."""
    return {name: kwargs[name] for name in MEDIA if kwargs.get(name) is not None and name not in accepted}


def processed(processor: Any, given: Any, media: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a processor makes of a text, or a list of texts, and its media: tensors by name.

    processor: called with ``text``, the media and ``return_tensors``, as those of ``transformers`` are.

    Raises: InputError without a processor, and for anything but texts; what the processor raises.
    """
    names = ", ".join(f"{name}=" for name in media)
    if processor is None:
        raise InputError(
            f"{names} needs the model's processor, and there is none: LanguageModel(module, processor=...), or give "
            "what a processor has made, model.trace(inputs)"
        )
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{names} needs a text to stand in, or a list of texts, not {given!r}")
    padding = {"padding": True} if len(texts) > 1 else {}
    made = processor(text=list(texts), **media, **{**padding, **options, "return_tensors": "pt"})
    return {name: torch.as_tensor(value) for name, value in made.items()}


def only_accepted(tensors: Mapping[str, Any], forward: Callable[..., Any]) -> dict[str, Any]:
    """Those that a forward takes."""
    parameters = inspect.signature(forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(tensors)
    return {name: value for name, value in tensors.items() if name in parameters}
