# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
"""Every private name of torch that fxsight uses, each with its reason and what to wait for.

Seen working on torch 2.11 to 2.13. Nothing else in the package may import a private torch name (ruff TID251).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import sympy
import torch
import torch.fx.experimental._config as _shape_config
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils._sympy import functions as _size_functions

# OpOverload: the class of ``torch.ops.aten.add.Tensor``; documented, importable only from a private module.
# FakeTensorMode: shapes without memory. torch.export hands its own out in ``meta["val"]``; there is no public class.
FakeMode = FakeTensorMode
# Raised when a fake tensor is asked for a number or gives a size only data tells.
NeedsData: tuple[type[Exception], ...] = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
)
# Sizes come back as sympy expressions over torch's own functions, which sympy alone cannot read back.
floor_div: Callable[..., Any] = _size_functions.FloorDiv
mod: Callable[..., Any] = _size_functions.Mod
SIZE_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(_size_functions, name) for name in _size_functions.__all__},
    "floor": sympy.floor,
    "ceiling": sympy.ceiling,
    "Max": sympy.Max,
    "Min": sympy.Min,
    "Eq": sympy.Eq,
    "Ne": sympy.Ne,
}


def schema(operator: OpOverload) -> Any:
    """The schema of an operator: its arguments, and which of them it changes.

    Reason: ``OpOverload._schema`` has no public spelling (1.13+).
    """
    return operator._schema


def storage_key(tensor: torch.Tensor) -> int | None:
    """A number two tensors share when they share memory; None for layouts without storage.

    Reason: ``UntypedStorage`` of a fake tensor has no data pointer; ``_cdata`` is its identity (2.0+).
    Wait for: a public identity of storages.
    """
    if tensor.layout is not torch.strided:
        return None
    return int(tensor.untyped_storage()._cdata)


def version(tensor: torch.Tensor) -> int:
    """How often the memory of the tensor was changed in place.

    Reason: the version counter of autograd (documented in ``torch.autograd`` notes, attribute private).
    """
    return int(tensor._version)


def size_expr(value: Any) -> Any:
    """The sympy expression of a ``SymInt``, ``SymBool`` or ``SymFloat``; numbers as sympy numbers.

    Reason: ``SymNode.expr`` has no public spelling (2.0+).
    """
    return value.node.expr if hasattr(value, "node") else sympy.sympify(value)


def export_node(tensor: torch.Tensor) -> torch.fx.Node | None:
    """The graph node that makes a value while ``torch.export`` is tracing; None outside, and for untracked tensors.

    Reason: ``get_proxy_slot`` is the only way from a value to its node. Wait for: provenance in torch.export.
    """
    mode = proxy_tensor.get_proxy_mode()
    if mode is None:
        return None
    slot: Any = proxy_tensor.get_proxy_slot(tensor, mode.tracer, None)  # pyright: ignore
    if slot is None:
        return None
    node: torch.fx.Node = slot.proxy.node if hasattr(slot, "proxy") else slot.node
    return node


def export_graph() -> torch.fx.Graph | None:
    """The graph being traced by ``torch.export``; None outside."""
    mode = proxy_tensor.get_proxy_mode()
    return None if mode is None else mode.tracer.graph


def honest_sizes() -> AbstractContextManager[Any]:
    """While exporting: sizes 0 and 1 stay symbolic, and only code that asks excludes them.

    Reason: without it every dynamic size is declared at least 2, so a program captured on two prompts would say
    nothing about one. Wait for: ``torch.export`` to take it as an argument.
    """
    if hasattr(_shape_config, "backed_size_oblivious"):
        return _shape_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined, no-any-return, unused-ignore]
    return nullcontext()


def shape_env(value: Any) -> ShapeEnv | None:
    """The environment that holds the guards of a traced graph, from any of its fake values."""
    mode = getattr(value, "fake_mode", None)
    return mode.shape_env if mode is not None else None


def set_grad_region() -> Any:
    """The operator torch.export makes of ``with torch.no_grad()`` in a model."""
    return torch.ops.higher_order.wrap_with_set_grad_enabled


def autocast_region() -> Any:
    """The operator torch.export makes of ``with torch.autocast()`` in a model."""
    return torch.ops.higher_order.wrap_with_autocast


def fake_of(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    """The fake twin of a real tensor: same dtype, shape, strides, device, aliasing; no data."""
    return mode.from_tensor(tensor, static_shapes=True)


@contextmanager
def plain_function_calls() -> Any:
    """No ``__torch_function__`` of subclasses inside: what a wrapper calls on its inner values."""
    with torch._C.DisableTorchFunctionSubclass():
        yield


def compile_graph(module: torch.fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
    """Compile a graph with Inductor, for the (symbolic) sizes of the fake example inputs.

    Random operators stay torch's own.

    Reason: ``torch.compile`` would capture the graph a second time with Dynamo and guard every call; this is the entry
    point below it (2.8+). Nothing is imported from Inductor before the first call.
    """
    from torch._inductor import standalone_compile

    options = {"config_patches": {"fallback_random": True}}
    compiled: Callable[..., Any] = standalone_compile(module, example, dynamic_shapes="from_graph", options=options)
    return compiled


def save_compiled(compiled: Any, path: str) -> None:
    """Write what ``compile_graph`` made into a file.

    Reason: ``CompiledArtifact`` is documented, its home is private (2.8+).

    Raises: RuntimeError, AttributeError where it cannot be written.
    """
    compiled.save(path=path, format="binary")


def load_compiled(path: str) -> Callable[..., Any]:
    """What ``save_compiled`` wrote, ready to be called; it runs code in that file.

    Reason: see there.  Raises: anything, for files that are damaged or of another torch.
    """
    from torch._inductor.standalone_compile import CompiledArtifact

    return CompiledArtifact.load(path=path, format="binary")


def compiler_settings() -> str:
    """A hash of the settings of Inductor that may change what it makes.

    Reason: no public name says what a compiled artifact depends on (``get_hash``, 2.3+).
    """
    from torch._inductor import config

    return config.get_hash().hex()


def symbolic_mode() -> FakeTensorMode:
    """A fake mode whose tensors may have symbolic sizes."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False)


def symbolic(mode: FakeTensorMode, tensor: torch.Tensor, free: list[bool]) -> torch.Tensor:
    """The fake twin of a tensor whose dimensions marked ``free`` are symbols; equal numbers are one symbol."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    dims = [DimDynamic.DUCK if is_free else DimDynamic.STATIC for is_free in free]
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims))


def symbolic_sizes(mode: FakeTensorMode, sizes: Mapping[str, int]) -> dict[str, Any]:
    """A ``SymInt`` for each name; the numbers are examples, all different.

    Reason: only ``ShapeEnv`` makes symbols that no tensor's shape brings along (2.1+).
    """
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    made: dict[str, Any] = {}
    env = mode.shape_env
    assert env is not None
    for name, number in sizes.items():
        source = ConstantSource(name)
        expr = env.create_symbol(number, source, dynamic_dim=DimDynamic.DYNAMIC)
        made[name] = env.create_symintnode(expr, hint=number, source=source)
    return made


def symbolic_number(mode: FakeTensorMode, expr: Any, number: int) -> Any:
    """The ``SymInt`` of an expression over symbols of the mode; ``number`` is its example.

    Reason: see ``symbolic_sizes``.
    """
    env = mode.shape_env
    assert env is not None
    return env.create_symintnode(expr, hint=number)
