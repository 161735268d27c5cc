# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
"""The private names of torch about graphs of Dynamo, each with its reason; all others are in ``_torch``."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental import proxy_tensor

from fxsight import _torch


def trace(gm: torch.fx.GraphModule, values: list[Any]) -> torch.fx.GraphModule:
    """The operators that a graph of Dynamo's reaches, before autograd, on its own fake values.

    Each node has ``nn_module_stack`` of the node it comes from.

    Reason: ``make_fx`` is public, its ``pre_dispatch`` and the dispatcher that keeps operators whole are not (2.1+).
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch.fx.traceback import preserve_node_meta

    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), nullcontext())
    with mode, enable_python_dispatcher(), preserve_node_meta():
        traced: torch.fx.GraphModule = proxy_tensor.make_fx(
            lambda *given: torch.fx.Interpreter(gm).run(*given), pre_dispatch=True, _allow_non_fake_inputs=True
        )(*values)
    return traced


def graph_argument(node: torch.fx.Node) -> tuple[Any, str]:
    """The value that Dynamo's placeholder stands for, and how the frame calls it: ``L['self'].up.weight``.

    Reason: no public name says which parameter an input of Dynamo's graph is (2.0+).
    """
    argument = node.meta.get("grapharg")
    if argument is None:
        return None, ""
    name = argument.source.name
    text = str(name() if callable(name) else name)
    return argument.example, re.sub(r"\._(?:modules|parameters|buffers)\[(['\"])([^'\"\]]+)\1\]", r".\2", text)


def has_example(size: Any) -> bool:
    """Whether torch knows a number that a symbolic size may have.

    Reason: no public name tells it (``SymNode.has_hint``, 2.0+).
    """
    return bool(size.node.has_hint())


def ends_in_break(gm: torch.fx.GraphModule) -> bool:
    """Whether a graph of Dynamo's ends in a graph break, not where its frame returns.

    Reason: no public name (``compile_subgraph_reason``, 2.0+).
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is None or bool(reason.graph_break)


def breaks_in_calls() -> bool:
    """Whether Dynamo may break a graph inside a call that it has inlined.

    Reason: a setting without a public name (``nested_graph_breaks``, 2.9+).
    """
    import torch._dynamo.config as config

    return bool(getattr(config, "nested_graph_breaks", False))


def is_last_recompile() -> bool:
    """Whether Dynamo, asked for one more graph of the present code, would run it uncompiled instead.

    Reason: no public name says how often a frame was compiled (``CompileContext``, 2.1+).
    """
    import torch._dynamo.config as config
    from torch._guards import CompileContext

    made = CompileContext.current_compile_id()
    limit = int(getattr(config, "recompile_limit", 8))
    return made is not None and (made.frame_compile_id or 0) + 1 >= limit


def is_grad_switch(target: Any) -> bool:
    """Whether a node of a graph switches gradients on or off: what Dynamo makes of ``with torch.no_grad()``."""
    return target is torch._C._set_grad_enabled


@contextmanager
def outside_dynamo() -> Generator[None]:
    """Capture a model inside, while Dynamo is compiling: torch.export then has fake values of its own.

    Reason: torch.export takes the fake mode of the compilation that it is called in (2.1+).
    """
    from torch._guards import tracing

    with tracing(None):
        yield


def fake_input(values: list[Any], tensor: torch.Tensor) -> torch.Tensor:
    """The fake twin of a further input of a graph of Dynamo's: of fixed sizes."""
    mode = next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)
    return tensor if mode is None else _torch.fake_of(mode, tensor)


def inner_backend(name: Any, mode: Any, options: Mapping[str, Any]) -> Callable[..., Any]:
    """The backend of ``torch.compile`` by name, with its options bound.

    Raises: as torch.compile for a name that it does not know, and for options that Inductor does not have.

    Reason: ``torch.compile`` makes it this way, and gives no name to the way (2.0+).
    """
    if name == "inductor":
        inductor: Any = torch._TorchCompileInductorWrapper
        made: Callable[..., Any] = inductor(mode or "default", dict(options) or None, None)
        return made
    wrapper: Any = torch._TorchCompileWrapper
    other: Callable[..., Any] = wrapper(name, mode, dict(options) or None, None)
    return other


def is_disabled(module: torch.nn.Module, path: str) -> bool:
    """Whether a module, or one around it, is kept from Dynamo by ``torch.compiler.disable``.

    Reason: the mark that it leaves has no public name (``_torchdynamo_disable``, 2.0+).
    """
    steps = path.split(".") if path else []
    parts = [module.get_submodule(".".join(steps[:n])) for n in range(len(steps) + 1)]
    return any(getattr(part.forward, "_torchdynamo_disable", False) for part in parts)
