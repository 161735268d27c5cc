"""What stands behind a line of a program, read back: ``# f32[batch, 64]  h.0.mlp  {call=4, line='gpt2.py:8'}``."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from fxsight.errors import TextError
from fxsight.node import Origin
from fxsight.spec import Dim, SizeSpec, Spec, TensorSpec, contiguous_stride, parse_dims, parse_expr, parse_tensor


def read_literal(node: ast.expr) -> Any:
    """A plain value, as it is written.

    Raises: TextError.
    """
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value=str() as text)]):
            return float(text)
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="torch"), attr="device"),
            args=[ast.Constant(value=str() as text)],
        ):
            return torch.device(text)
        case ast.Attribute(value=ast.Name(id="torch"), attr=name):
            found = getattr(torch, name, None)
            if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
                return found
        case _:
            pass
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise TextError(f"line {node.lineno}: not an argument: {ast.unparse(node)!r}") from None


def read_expression(text: str) -> Any:
    """A size, or a condition on sizes."""
    return parse_expr(ast.parse(text, mode="eval").body)


_NOTE = re.compile(
    r"(?P<spec>none|size [^{]*?|\(.*?\)|[\w]+\[[^\]]*\])(?:  (?P<address>[^{]\S*))?(?:  \{(?P<extras>.*)\})?$"
)


def read_note(note: str, name: str, line: int) -> dict[str, Any]:
    """Spec and origin, by these names; nothing of an empty note.

    Raises: TextError.
    """
    if not note:
        return {}
    match = _NOTE.match(note)
    if match is None:
        raise TextError(f"line {line}: cannot read the note {note!r}; write for example '# f32[batch, 64]'")
    extras = _extras(match["extras"] or "")
    origin = {key: extras[key] for key in vars(Origin()) if key in extras}
    return {"spec": _spec(match["spec"], extras, name), "origin": Origin(**origin)}


_EXTRA = re.compile(r"(\w+)=(?:(0|[1-9]\d*)|'([^'\\]*)')(?:, |$)")


def _extras(text: str) -> dict[str, Any]:
    """``call=4, line='gpt2.py:8'`` as a dictionary: most are numbers and plain text."""
    extras: dict[str, Any] = {}
    at = 0
    while at < len(text):
        match = _EXTRA.match(text, at)
        if match is None:
            call = ast.parse(f"dict({text})", mode="eval").body
            assert isinstance(call, ast.Call)
            return {k.arg: read_literal(k.value) for k in call.keywords if k.arg}
        extras[match[1]] = match[3] if match[2] is None else int(match[2])
        at = match.end()
    return extras


def _spec(text: str, extras: Mapping[str, Any], name: str) -> Spec:
    if text == "none":
        return None
    if text.startswith("size "):
        return SizeSpec(read_expression(text.removeprefix("size ")))
    if text.startswith("("):
        members = _split(text[1:-1])
        parts = extras.get("parts", [{}] * len(members))
        if not isinstance(parts, list) or len(parts) != len(members) or not all(isinstance(p, dict) for p in parts):
            raise TextError(f"the note of {name} has {len(members)} members, and says this of them: {parts!r}")
        return tuple(_spec(m, p, f"{name}[{i}]") for i, (m, p) in enumerate(zip(members, parts, strict=True)))
    return read_tensor(text, extras, name)


def _split(text: str) -> list[str]:
    """Split at commas outside brackets."""
    return [part.strip() for part in re.findall(r"(?:[^,\[(]|\[[^\]]*\]|\([^)]*\))+", text)]


def read_tensor(text: str, extras: Mapping[str, Any], name: str) -> TensorSpec:
    """A tensor's spec; ``name``: of the node, whose storage it has where nothing else is said."""
    dtype, shape, stride = _layout(text, extras.get("stride"))
    return TensorSpec(dtype, shape, stride, extras.get("device", "cpu"), extras.get("shares", name))


@lru_cache(4096)  # most values of a model have one of a few shapes
def _layout(text: str, stride: str | None) -> tuple[torch.dtype, tuple[Dim, ...], tuple[Dim, ...]]:
    dtype, shape = parse_tensor(text)
    return dtype, shape, contiguous_stride(shape) if stride is None else parse_dims(stride)
