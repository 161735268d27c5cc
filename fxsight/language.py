"""``LanguageModel``: a model of ``transformers`` with its tokenizer; blocks are given texts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from fxsight.auto import check_backend
from fxsight.context import open_block
from fxsight.edit_text import edits_of
from fxsight.errors import TraceError
from fxsight.generation import Generation
from fxsight.inputs import check_inputs
from fxsight.invokes import own_arguments
from fxsight.loading import Pending, Source
from fxsight.media import media_in
from fxsight.model import Model
from fxsight.names import Blocks, blocks_path
from fxsight.plan import Plan
from fxsight.prompted import Prompted
from fxsight.prompts import Prompts
from fxsight.rename import Rename
from fxsight.repertoire import Repertoire
from fxsight.tokens import Tokens
from fxsight.value import values_in


class Generator:
    """The method that generates, as if it were a module."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model

    @property
    def output(self) -> Any:
        """All ids, prompt included: i64[batch, length].

        Raises: TraceError outside a generation.
        """
        generation = open_block(self._model._captures.shared)
        if not isinstance(generation, Generation):
            raise TraceError("model.generator.output has a value only inside a generation: with model.generate(...):")
        return generation.result


class LanguageModel(Model):
    """A language model and its tokenizer: traces, scans, sweeps and invokes take prompts.

        model = LanguageModel("openai-community/gpt2")
        with model.trace("The Eiffel Tower is in the city of"):
            logits = model.lm_head.output[:, -1].save()

    A model that is given by its name has no weights at first: it can be browsed and scanned, and the first trace, or
    ``dispatch()``, loads them. A view, or a module of the model, that was taken before is then the loaded one; a
    parameter is not.

    model: a repository id or a local folder, loaded with ``from_pretrained``; or a loaded module.
    tokenizer: of a loaded module; or what is used instead of the one at that place: itself, a repository id, a folder.
    processor: of a model that takes images: called with ``text`` and ``images``, as those of ``transformers`` are; its
    tokenizer is the model's where no other is given. One that is not given is looked for where the model was loaded.
    dispatch: load the weights now.
    automodel: a class with ``from_pretrained``, or the name of one in ``transformers``; None for the one of causal,
    sequence-to-sequence, image-text and masked language models that the model was saved as.
    options: ``views``, ``methods``, ``narrow`` and ``background`` of ``Model``; all others are arguments of
    ``from_pretrained``
    (``revision``, ``dtype``, ``device_map``, ``attn_implementation``, ``quantization_config``, ...).
    import_edits: the name of edits to begin with (``export_edits``); True for those with the model's own name.

    A prompt is a text, a list of texts, token ids (a list, nested or not, or a tensor), or what a tokenizer returns.
    Keyword arguments that the forward does not have are the tokenizer's (``max_length``, ``truncation``, ...).
    ``images=``, ``videos=`` and ``audio=`` beside a text are given to the processor with it.

    Raises: LoadError when there is nothing to load; TypeError for arguments of ``from_pretrained`` with a loaded
    module; RenameError.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        *,
        tokenizer: Any = None,
        processor: Any = None,
        rename: Rename | None = None,
        dispatch: bool = False,
        cache: bool = True,
        import_edits: bool | str = False,
        automodel: Any = None,
        **options: Any,
    ) -> None:
        own = {name: options.pop(name) for name in ("views", "methods", "narrow", "background") if name in options}
        if isinstance(model, nn.Module):
            if options or automodel is not None:
                names = ", ".join([*options, *(["automodel"] if automodel is not None else [])])
                raise TypeError(f"{names}: for loading a model, and this one is loaded already")
            source, module = None, model
        else:
            source = Source(os.fspath(model), automodel, options)
            module = source.load() if dispatch else source.empty()
        super().__init__(module, cache=cache, rename=rename, **own)
        found = source or Source("")
        is_given = source is None and not isinstance(tokenizer, (str, os.PathLike))
        if processor is not None and tokenizer is None:
            tokenizer, is_given = getattr(processor, "tokenizer", None), True
        tokenizer = tokenizer if is_given else found.tokenizer(tokenizer)
        look = None if source is None else source.processor
        self.__dict__["_inputs"] = Prompts(module, tokenizer, processor, look)
        self.__dict__["_weights"] = Pending(module, source)
        self.__dict__["_repertoire"] = Repertoire()
        if import_edits:
            own_name = type(module).__name__ if source is None else source.name
            self.import_edits(import_edits if isinstance(import_edits, str) else own_name)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; None for a model without one."""
        return self._inputs.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._inputs.tokenizer = tokenizer

    @property
    def processor(self) -> Any:
        """What makes tensors of images and texts; None for a model without one.

        Raises: LoadError where it needs a library that is not there.
        """
        return self._inputs.processor

    def dispatch(self) -> LanguageModel:
        """Load the weights, if that has not been done.  Returns: this model.

        Raises: LoadError; what ``from_pretrained`` raises.
        """
        with self._captures.lock:
            self._weights.load()
        return self

    def tokens(self, *args: Any, **kwargs: Any) -> Tokens:
        """The tokens of a prompt, as a block has them: ``model.tokens(prompt)("Eiffel Tower").last``; print them.

        In a block it is ``tracer.tokens("Eiffel Tower")``.  Raises: InputError.
        """
        return self._inputs.tokens(self._inputs.prepare(args, kwargs))  # type: ignore[no-any-return]

    @property
    def blocks(self) -> Blocks:
        """The blocks, with names for their values: ``model.blocks[3].resid_pre``, ``.attn_out``, ``.pattern``.

        Raises: UnknownAddress where it is not clear which they are.
        """
        return Blocks(self[blocks_path(self._module)])

    @property
    def logits(self) -> Any:
        """In a trace: the logits, a value of shape [rows, length, vocabulary]."""
        return self.output["logits"]

    @logits.setter
    def logits(self, value: Any) -> None:
        self.output["logits"][:] = value

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """``Model.trace``, of prompts."""
        self.dispatch()
        return super().trace(*args, **kwargs)

    def plan(self, body: Any, *args: Any, **kwargs: Any) -> Plan:
        """``Model.plan``, of prompts."""
        self.dispatch()
        return super().plan(body, *args, **kwargs)

    def __call__(self, *args: Any, hook: Any = None, **kwargs: Any) -> Any:
        """The module's own output for a prompt."""
        self.dispatch()
        args, kwargs = self._inputs.prepare(args, kwargs)
        return super().__call__(*args, hook=hook, **kwargs)

    def generate(self, *args: Any, backend: Any = "eager", trace: Any = True, **kwargs: Any) -> Any:
        """A block over all steps of a generation: ``with model.generate("Hello", max_new_tokens=3) as tracer:``.

        args: prompts; none where each ``tracer.invoke`` brings its own.
        kwargs: of the ``generate`` of ``transformers``, which drives.
        backend: "eager" or "inductor", as for ``trace``; "auto" is eager here.
        trace: False for no block: simply the result, with the edits of this model.

        Raises: TraceError for an unknown backend, and for no prompt and no block; what ``generate`` raises for its
        arguments.
        """
        check_backend(backend)
        own_arguments(self._module, "generate", {name: kwargs[name] for name in ("mode",) if name in kwargs})
        has_prompt = self._inputs.are_given(args, kwargs)
        if not trace and not has_prompt:
            raise TraceError("generate needs a prompt: model.generate('Hello', max_new_tokens=3, trace=False)")
        self.dispatch()
        check_inputs((args, kwargs))
        for value in values_in((args, kwargs)):  # of an earlier trace of the session
            value.cell.recorder.force()
        media = media_in(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in media}
        call = self._inputs.prepare(args, media) if has_prompt or media else None
        prompts = Prompted(call, kwargs, self._inputs)
        if not trace and not self._edits and backend != "inductor":
            return self._module.generate(*prompts.call[0], **prompts.call[1])
        generation = Generation(self._captures, prompts, backend, self._edits, self._repertoire)
        return generation if trace else generation.alone()

    @property
    def generator(self) -> Generator:
        """What a generation returns, inside its block: ``model.generator.output`` are the ids."""
        return Generator(self)

    def _example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ([[0] * 8] * 2,), {}

    def __reduce__(self) -> tuple[Any, ...]:
        edits = super().__reduce__()[1][-1]
        tools = (self.tokenizer, self._inputs.known_processor)
        return _again, (type(self), self._module, tools, self._weights.source, self._options, edits)


def _again(
    cls: type[LanguageModel],
    module: nn.Module,
    tools: tuple[Any, Any],
    source: Source | None,
    options: Mapping[str, Any],
    edits: Any,
) -> LanguageModel:
    """A model that was copied or pickled."""
    model = cls(module, tokenizer=tools[0], processor=tools[1], **options)
    model.__dict__["_weights"] = Pending(module, source)
    if edits is not None:
        model.edits.load(edits_of(*edits), module)
    return model
