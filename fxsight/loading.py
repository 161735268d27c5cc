"""Models and tokenizers of ``transformers``, from a repository or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_OF_FILES = ("revision", "cache_dir", "local_files_only", "token", "subfolder", "trust_remote_code")


def load(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The model at a place, in evaluation mode.

    Raises: OSError.
    """
    from transformers import AutoModelForCausalLM

    module: nn.Module = AutoModelForCausalLM.from_pretrained(name, **options)
    return module


def load_tokenizer(name: Any, options: Mapping[str, Any]) -> Any:
    """The tokenizer at a place: padding on the left, with the end token where it has no padding token; or, as it is,
    a tokenizer itself."""
    if not isinstance(name, str):
        return name
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, **{k: v for k, v in options.items() if k in _OF_FILES})
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
