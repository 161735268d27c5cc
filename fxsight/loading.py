"""Models and tokenizers of ``transformers``, from a repository or a folder: their parts first, weights when needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxsight.errors import LoadError

_OF_FILES = ("revision", "cache_dir", "local_files_only", "token", "force_download", "proxies", "trust_remote_code")
_OF_CODE = ("trust_remote_code", "code_revision")
_KINDS = ("CausalLM", "Seq2SeqLM", "ImageTextToText", "MaskedLM")  # what a model is loaded as, the first that there is


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    name: repository id or folder.  automodel: a class with ``from_pretrained``, or the name of one of transformers';
    None for the head that the repository was saved with.  options: the arguments of ``from_pretrained``.
    """

    name: str
    automodel: Any = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def load(self) -> nn.Module:
        """The model with its weights, in evaluation mode.

        Raises: LoadError when there is nothing to load; what ``from_pretrained`` raises.
        """
        config, options = self._found(self._config), dict(self.options)
        where = options.get("device_map")
        alone = isinstance(where, str) and find_spec("accelerate") is None  # then one device is what there can be
        if alone:
            del options["device_map"]
        module: nn.Module = self._found(lambda: self._class(config).from_pretrained(self.name, **options))
        best = "cuda" if torch.cuda.is_available() else "cpu"
        return module.to(best if where == "auto" else where) if alone else module

    def empty(self) -> nn.Module:
        """The model without weights (on the device "meta"), in evaluation mode; with them where its constructor needs
        numbers.

        Raises: LoadError; what ``from_pretrained`` raises.
        """
        config = self._found(self._config)
        given = {"dtype": self.options.get("torch_dtype"), **self.options}
        names = ("dtype", "attn_implementation", "experts_implementation", *_OF_CODE)
        options = {name: given[name] for name in names if given.get(name) not in (None, "auto")}
        loaded_as = self._class(config)
        make = loaded_as.from_config if hasattr(loaded_as, "from_config") else loaded_as._from_config
        try:
            with torch.device("meta"):
                module: nn.Module = make(config, **options)
        except (RuntimeError, NotImplementedError):  # what operators without a meta kernel, and .item() there, raise
            return self.load()
        return module.eval()

    def tokenizer(self, instead: Any = None) -> Any:
        """The tokenizer, with padding on the left, and the end token where it has no padding token; None where there
        is none.  instead: a tokenizer, which is left as it is, or another place to look.

        Raises: LoadError for another place without one.
        """
        if instead is not None and not isinstance(instead, (str, os.PathLike)):
            return instead
        place = self.name if instead is None else os.fspath(instead)
        options = {name: value for name, value in self.options.items() if name in _OF_FILES}
        try:
            tokenizer = _tokenizer(place, options)
        except (OSError, ValueError, ImportError) as error:
            if instead is None:
                return None
            raise LoadError(_missing(place, self.options, error)) from error
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def processor(self) -> Any:
        """What makes tensors of images and texts; None where there is none.

        Raises: LoadError where it needs a library that is not there.
        """
        from transformers import AutoProcessor

        options = {name: value for name, value in self.options.items() if name in _OF_FILES}
        try:
            found: Any = AutoProcessor.from_pretrained(self.name, **options)
        except ImportError as error:
            raise LoadError(f"the processor of {self.name!r} needs a library: {str(error).strip()}") from error
        except (OSError, ValueError):
            return None
        return found if hasattr(found, "tokenizer") else None  # a model without one gets its tokenizer

    # -- how ---------------------------------------------------------------------------------------------------------

    def _config(self) -> Any:
        from transformers import AutoConfig

        given = self.options.get("config")
        if given is not None:
            return given
        skipped = ("dtype", "torch_dtype", "quantization_config")
        options = {name: value for name, value in self.options.items() if name not in skipped}
        found: Any = AutoConfig.from_pretrained(self.name, return_unused_kwargs=True, **options)
        return found[0]

    def _class(self, config: Any) -> Any:
        import transformers

        if self.automodel is not None:
            return getattr(transformers, self.automodel) if isinstance(self.automodel, str) else self.automodel
        saved = (getattr(config, "architectures", None) or [""])[0]
        kinds = [getattr(transformers, f"AutoModelFor{kind}") for kind in _KINDS]
        known = [kind for kind in kinds if type(config) in kind._model_mapping]
        same = [kind for kind in known if saved in _names(kind._model_mapping[type(config)])]
        return [*same, *known, transformers.AutoModelForCausalLM if not saved else transformers.AutoModel][0]

    def _found(self, what: Callable[[], Any]) -> Any:
        """Raises: LoadError for a place where there is nothing."""
        try:
            return what()
        except OSError as error:
            raise LoadError(_missing(self.name, self.options, error)) from error
        except ValueError as error:
            if "Unrecognized model in" not in str(error):
                raise
            raise LoadError(_missing(self.name, self.options, error)) from error


def _names(classes: Any) -> list[str]:
    return [cls.__name__ for cls in (classes if isinstance(classes, tuple) else (classes,))]


def _tokenizer(place: str, options: Mapping[str, Any]) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place, **options)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made of nothing but the model's config
        raise ValueError("it has no tokens")
    return tokenizer


def _missing(name: str, options: Mapping[str, Any], error: Exception) -> str:
    """What was looked for, and where."""
    from huggingface_hub import constants

    folder = Path(name)
    if folder.is_dir():
        held = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        return f"the folder {folder.resolve()} is no complete model or tokenizer: {error}\n  it holds {held}"
    cached = options.get("cache_dir") or constants.HF_HUB_CACHE
    offline = constants.HF_HUB_OFFLINE or options.get("local_files_only")
    hub = "the hub was not asked (offline mode)" if offline else "the hub did not give it"
    return (
        f"{name!r} (revision {options.get('revision') or 'main'}) was not found: there is no folder "
        f"{folder.absolute()}, it is not in the cache {cached}, and {hub}\n  transformers says: {error}"
    )


# -- weights for a model that is in use ----------------------------------------------------------------------------


class Pending:
    """Weights that are still to be loaded, if any.

    They are loaded into the module objects that are there, so what holds a part of the model holds the loaded part.
    What was attached in the meantime stays, and so do ``requires_grad`` and ``training``.
    """

    def __init__(self, module: nn.Module, source: Source | None) -> None:
        self._module = module
        self.source = source if any(parameter.is_meta for parameter in module.parameters()) else None
        self._parts = {id(part) for part in module.modules()}

    def load(self) -> None:
        """Load them, if that has not been done.

        Raises: LoadError; what ``from_pretrained`` raises.
        """
        if self.source is not None:
            _adopt(self._module, self.source.load(), self._parts, {})
            self.source = None


def _adopt(target: nn.Module, source: nn.Module, parts: set[int], done: dict[int, nn.Module]) -> nn.Module:
    """Give a module the state of another, and so on below it, where it is one of ``parts``."""
    if id(source) in done:
        return done[id(source)]
    done[id(source)] = target
    own, state = target.__dict__, source.__dict__
    for name, child in state["_modules"].items():
        mine = own["_modules"].get(name)
        if mine is not None and id(mine) not in parts:
            state["_modules"][name] = mine  # put there by the user
        elif mine is not None and child is not None:
            state["_modules"][name] = _adopt(mine, child, parts, done)
    for kind in ("_modules", "_parameters", "_buffers"):
        state[kind].update({name: value for name, value in own[kind].items() if name not in state[kind]})
    for name, parameter in own["_parameters"].items():
        now = state["_parameters"].get(name)
        if parameter is not None and now is not None and now.is_floating_point():
            now.requires_grad_(parameter.requires_grad)
    state["training"] = own["training"]
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        own[name].update(state[name])
        state[name] = own[name]  # handles of the user's hooks know this very table
    target.__class__ = type(source)
    own.clear()
    own.update(state)
    source.__dict__ = own  # what refers to the other module, a hook of accelerate's for instance, means this one
    return target
