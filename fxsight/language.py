"""``LanguageModel``: a model of ``transformers`` with its tokenizer; blocks are given texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fxsight.edit_text import edits_of
from fxsight.loading import load, load_tokenizer
from fxsight.model import Model
from fxsight.prompts import Prompts
from fxsight.rename import Rename


class LanguageModel(Model):
    """A language model and its tokenizer: traces, scans, sweeps and invokes take prompts.

        model = LanguageModel("openai-community/gpt2")
        with model.trace("The Eiffel Tower is in the city of"):
            logits = model.lm_head.output[:, -1].save()

    model: a repository id or a local folder, loaded with ``AutoModelForCausalLM.from_pretrained``; or a loaded module.
    tokenizer: of a loaded module; or what is used instead of the one at that place: itself, a repository id, a folder.
    options: arguments of ``from_pretrained`` (``revision``, ``dtype``, ``device_map``, ``attn_implementation``, ...).

    import_edits: the name of edits to begin with (``export_edits``); True for those with the model's own name.

    A prompt is a text, a list of texts, token ids (a list, nested or not, or a tensor), or what a tokenizer returns.
    Keyword arguments that the forward does not have are the tokenizer's (``max_length``, ``truncation``, ...).

    Raises: OSError when there is nothing to load; TypeError for arguments of ``from_pretrained`` with a loaded module.
    """

    def __init__(
        self,
        model: str | nn.Module,
        *,
        tokenizer: Any = None,
        rename: Rename | None = None,
        dispatch: bool = False,
        cache: bool = True,
        import_edits: bool | str = False,
        **options: Any,
    ) -> None:
        own = {name: options.pop(name) for name in ("views", "methods") if name in options}
        if isinstance(model, nn.Module) and options:
            raise TypeError(f"{', '.join(options)}: arguments for loading, and the model is loaded already")
        name = model if isinstance(model, str) else None
        module = load(model, options) if isinstance(model, str) else model
        super().__init__(module, cache=cache, rename=rename, **own)
        if name is not None or isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer or name, options)
        self.__dict__["_inputs"] = Prompts(module, tokenizer)
        if import_edits:
            self.import_edits(import_edits if isinstance(import_edits, str) else (name or type(module).__name__))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; None for a module that was given without one."""
        return self._inputs.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.__dict__["_inputs"] = Prompts(self._module, tokenizer)

    def __reduce__(self) -> tuple[Any, ...]:
        edits = super().__reduce__()[1][-1]
        return _again, (type(self), self._module, self.tokenizer, self._options, edits)


def _again(
    cls: type[LanguageModel], module: nn.Module, tokenizer: Any, options: Mapping[str, Any], edits: Any
) -> LanguageModel:
    model = cls(module, tokenizer=tokenizer, **options)
    if edits is not None:
        model.edits.load(edits_of(*edits), module)
    return model
