"""The names that interpretability has for values, whatever a model calls its modules: ``model.blocks[3].resid_pre``.

``families.py`` says where they are. What is not known to be what its name says is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from fxsight.errors import UnknownAddress, nearest
from fxsight.families import COMMON, FAMILIES, NAMES, PARALLEL, Family

_INSIDE = ("q", "k", "v", "z", "pattern")
_FUSED = "torch_nn_functional_scaled_dot_product_attention_0"
_SCALES = ("residual_multiplier", "attention_multiplier_out", "alpha", "attn_multiplier", "resid_scale")


class Block:
    """One block of a language model, with names for its values; all else is that of its view.

    In a trace, each is read and written like ``.output``. b: prompts, n: tokens, h: heads, d: width.

        resid_pre, resid_mid, resid_post   the residual stream before, between and after the parts   [b, n, d]
        attn_out, mlp_out                  what attention and MLP add to it                          [b, n, d]
        q, k, v                            as the attention function gets them: rotated, by heads    [b, h, n, d_head]
        z                                  what each head has read                                   [b, n, h, d_head]
        pattern                            who looks where; fused attention is opened for it         [b, h, n, n]

    Raises: UnknownAddress for a name that this kind of block does not have, with the reason.
    """

    def __init__(self, view: Any) -> None:
        self.__dict__["view"] = view
        self.__dict__["_family"] = _family_of(view._module)

    def __getattr__(self, name: str) -> Any:
        if name not in NAMES:
            return self._of_view(name)
        return _first(_keyed(*self._place(name)))

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in NAMES:
            setattr(self.view, name, value)
            return
        place, port, keys = self._place(name)
        now = _keyed(place, port, keys[:-1])
        if keys:
            now[keys[-1]] = value
        elif isinstance(now, tuple):
            now[0] = value  # type: ignore[index]
        else:
            setattr(place, port, value)

    def __dir__(self) -> list[str]:
        return sorted({*NAMES, *dir(self.view)})

    def __repr__(self) -> str:
        return repr(self.view)

    def _of_view(self, name: str) -> Any:
        try:
            return getattr(self.view, name)
        except AttributeError as error:
            raise AttributeError(f"{error}; {nearest(name, NAMES) or f'names of values are {NAMES}'}") from None

    # -- where -------------------------------------------------------------------------------------------------------

    def _place(self, name: str) -> tuple[Any, str, tuple[Any, ...]]:
        """The view or operation, the port, and the keys of what is there."""
        if name in _INSIDE:
            return self._inside(name)
        places = {**COMMON, **({} if self._family is None else self._family.places)}
        if name not in places:
            raise self._unknown(name, "it is not known where, in a block with such parts")
        place = places[name]
        if name == "resid_mid" and self._family is not None and _says(self.view._module, self._family.flag):
            place = PARALLEL
        if place.startswith("!"):
            raise self._unknown(name, place[1:])
        path, _, port = place.rpartition(":")
        return (self.view[path] if path else self.view), port, ()

    def _inside(self, name: str) -> tuple[Any, str, tuple[Any, ...]]:
        """In the call of the attention function, ``attention_interface(module, q, k, v, mask, ...)``."""
        ops = None if self._family is None else self.view[self._family.attention].ops
        found = [] if ops is None else [op for op in ops if op.name.startswith("attention_interface_")]
        if len(found) != 1:
            raise self._unknown(name, f"{len(found)} calls of an attention function run in it")
        if name in ("q", "k", "v"):
            return found[0], "inputs", (0, 1 + "qkv".index(name))
        if name == "z":
            return found[0], "output", (0,)
        return self._pattern([op.name for op in found[0].ops], found[0]), "output", ()

    def _pattern(self, names: Sequence[str], attention: Any) -> Any:
        if _FUSED in names:
            return attention.ops[_FUSED].ops["softmax_0"]
        used = [name for name in ("nn_functional_dropout_0", "nn_functional_softmax_0") if name in names]
        if not used:
            raise self._unknown("pattern", f"its attention function has {', '.join(names)}")
        return attention.ops[used[0]]

    def _unknown(self, name: str, why: str) -> UnknownAddress:
        module: nn.Module = self.view._module
        has = ", ".join([name for name, _ in module.named_children()])
        return UnknownAddress(
            f"{self.view.address}: no {name}, {why}\n  it has {has}: name the place itself, or use print(block.source)"
        )


class Blocks(Sequence[Block]):
    """The blocks of a language model, in order."""

    def __init__(self, views: Any) -> None:
        self._views = list(views)

    def __getitem__(self, key: Any) -> Any:
        return [Block(view) for view in self._views[key]] if isinstance(key, slice) else Block(self._views[key])

    def __len__(self) -> int:
        return len(self._views)

    def __iter__(self) -> Iterator[Block]:
        return iter(self[:])


def blocks_path(module: nn.Module) -> str:
    """The path of the list of a model's blocks: the only one, or the only one as long as its config says.

    Raises: UnknownAddress where there is none, or several.
    """
    lists: list[str] = [
        path for path, part in module.named_modules() if isinstance(part, nn.ModuleList) and _has_parts(part)
    ]
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    config: Any = getattr(module, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    found = outer if len(outer) == 1 else [path for path in outer if len(module.get_submodule(path)) == count]  # type: ignore[arg-type]
    if len(found) != 1:
        raise UnknownAddress(f"which are the blocks? lists of modules: {', '.join(outer) or 'none'}; use them by name")
    return found[0]


def _has_parts(part: nn.ModuleList) -> bool:
    return len(part) > 0 and any(True for _ in part[0].children())


def _family_of(module: nn.Module) -> Family | None:
    """The family of a block; None for one that scales what its parts add, or that is not known."""
    children = {name for name, _ in module.named_children()}
    if any(hasattr(module, name) for name in _SCALES):
        return None
    return next((family for family in FAMILIES if family.children <= children), None)


def _says(module: nn.Module, flag: str) -> bool:
    return bool(flag) and bool(getattr(module, flag, False))


def _keyed(place: Any, port: str, keys: tuple[Any, ...]) -> Any:
    found = getattr(place, port)
    for key in keys:
        found = found[key]
    return found


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value
