# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
"""Every private name of torch that fxsight uses, each with its reason and what to wait for.

Seen working on torch 2.11 to 2.13. Nothing else in the package may import a private torch name (ruff TID251).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import getweakrefcount

import sympy
import torch
import torch.fx.experimental._config as _shape_config
from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore
from torch._ops import HigherOrderOperator
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils._sympy import functions as _size_functions

# OpOverload: the class of ``torch.ops.aten.add.Tensor``; documented, importable only from a private module.
# split: ``aten.split.Tensor`` itself; the public ``torch.split`` is a function in Python around it.
split: Callable[..., Any] = torch._VF.split  # type: ignore[attr-defined]
# FakeTensorMode: shapes without memory. torch.export hands its own out in ``meta["val"]``; there is no public class.
FakeMode = FakeTensorMode
# Raised when a fake tensor is asked for a number or gives a size only data tells.
NeedsData: tuple[type[Exception], ...] = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
)
# Raised for an operator that cannot say the shapes of its results; its ``func`` is the operator.
NoShapeRule = UnsupportedOperatorException
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
    """How often the memory of the tensor was changed in place; 0 for inference tensors, for which nobody counts.

    Reason: the version counter of autograd (documented in ``torch.autograd`` notes, attribute private).
    """
    return 0 if tensor.is_inference() else int(tensor._version)


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


@contextmanager
def unnoticed_export() -> Generator[None]:
    """While a model's forward is exported: it is not told so, and does what it does in a plain call.

    Reason: models ask ``torch.compiler.is_exporting()`` and then choose other kernels (transformers' attention over a
    cache does), with other bits; the flags behind it are private (2.7+). Only inside the module's own call.
    """
    compiler: Any = torch.compiler
    names = [name for name in ("_is_compiling_flag", "_is_exporting_flag") if hasattr(compiler, name)]
    before = {name: getattr(compiler, name) for name in names}
    try:
        for name in names:
            setattr(compiler, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(compiler, name, value)


@contextmanager
def quiet_export() -> Generator[None]:
    """While exporting: what torch reports to those who write an exportable model is not said.

    Reason: attributes that a forward assigns are put back afterwards (``state.restored``), recurrent layers'
    ``_flat_weights`` among them; ``LeafSpec`` and ``torch.jit.script`` are torch's use of what it deprecated (2.13);
    that Dynamo cannot look into a function, or that there is no line for a number, comes with an error.
    Wait for: switches for these reports.
    """
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"The tensor attributes? .* (was|were) assigned during export", UserWarning)
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", r"Dynamo does not know how to trace", UserWarning)
        logger.addFilter(_is_news)
        try:
            yield
        finally:
            logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Unable to find user code corresponding to")


def takes_functions(error: Exception) -> bool:
    """Whether an operator that takes functions, such as ``torch.cond``, could not look into them.

    Reason: it hands them to Dynamo, whose errors are private. Imported here, since Dynamo is large.
    """
    from torch._dynamo.exc import UncapturedHigherOrderOpError, Unsupported

    return isinstance(error, (UncapturedHigherOrderOpError, Unsupported))


def takes_functions_name(target: Any) -> str:
    """The name of an operator or transform that takes functions; empty for all others.

    Reason: in an exported graph they are instances of a private class, and calls of private functions.
    """
    if isinstance(target, HigherOrderOperator):
        return str(target)
    if getattr(target, "__module__", "") != "torch._functorch.predispatch":
        return ""
    return "torch.func.jvp" if re.search("jvp|dual|grad", target.__name__) else "torch.vmap"


def is_transformed(value: Any) -> bool:
    """Whether a value lives inside ``torch.vmap`` or a transform of ``torch.func``: no tensor outside is like it.

    Reason: such tensors are told apart in a private module only (2.0+).
    """
    return isinstance(value, torch.Tensor) and is_functorch_wrapped_tensor(value)


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
    point below it (2.8+; ``aot`` 2.10+). Nothing is imported from Inductor before the first call. What ``aot`` makes is
    whole in itself; without, it is an entry of a cache, and read back as any entry of its name, whatever its guards.

    Inductor tries each vector instruction set of the processor with a program of its own, for seconds. It is told that
    they work (``cpp.vec_isa_ok``), since the graph's own kernels show it as well: they are compiled with the same
    options and loaded. Where they fail, all is forgotten, and it tries for itself.
    """
    from torch._inductor import config

    options: dict[str, Any] = {"fallback_random": True}
    if config.cpp.vec_isa_ok is None:
        try:
            return _compile_with(module, example, {**options, "cpp.vec_isa_ok": True})
        except Exception:  # what a compiler or a dynamic linker refuse comes in many classes
            _forget_vector_instructions()
    return _compile_with(module, example, options)


def _compile_with(module: torch.fx.GraphModule, example: list[Any], patches: dict[str, Any]) -> Callable[..., Any]:
    from torch._inductor import standalone_compile

    options = {"config_patches": patches}
    compiled: Callable[..., Any] = standalone_compile(
        module, example, dynamic_shapes="from_graph", options=options, aot=True
    )
    return compiled


def _forget_vector_instructions() -> None:
    """Let Inductor find out anew which vector instruction sets work."""
    from torch._inductor import cpu_vec_isa

    remembered = [cpu_vec_isa.valid_vec_isa_list, *(type(isa).__bool__ for isa in cpu_vec_isa.supported_vec_isa_list)]
    for function in remembered:
        clear = getattr(function, "cache_clear", None)
        if clear is not None:
            clear()


def plain_code(compiled: Any) -> tuple[str, dict[str, str]] | None:
    """The Python that Inductor has written for a graph, and the files of the kernels in it, by name.

    None where something else is needed to call it: inputs that are changed, results that share memory with inputs,
    constants, devices other than the processor; and where this is not how torch keeps what it has compiled.

    Reason: nothing public says what a compiled artifact consists of (2.10+).
    """
    try:
        from torch._inductor.codecache import PyCodeCache

        if _unwritable(compiled):
            return None
        entry = compiled.inner_fn.compiled_fn.serialize()
        told, inner = entry.runtime_metadata, entry.compiled_fw.result
        is_plain = (
            entry.compiled_bw is None
            and set(inner.device_types) == {"cpu"}
            and not any((inner.constants, inner.torchbind_constants, inner.frozen_param_names, inner.partition_maps))
            and not any((inner.mutated_input_idxs, inner.inputs_to_check, entry.indices_of_inps_to_detach))
            and not any((told.mutated_inp_runtime_indices, told.tokens, told.num_intermediate_bases))
            and not torch.is_autocast_enabled("cpu")
            and entry.maybe_subclass_meta is None
            and all(result.output_type.name in ("non_alias", "unsafe_view_alias") for result in told.output_info)
        )
        if not is_plain:
            return None
        module = next(m for m in reversed(PyCodeCache.modules) if getattr(m, "key", None) == inner.cache_key)
        found = {name: value for name, value in vars(module).items() if getattr(value, "__name__", "") == "kernel"}
        return inner.source_code, {name: str(kernel.__self__.__file__) for name, kernel in found.items()}
    except (AttributeError, ImportError, StopIteration):
        return None


def _unwritable(compiled: Any) -> bool:
    """Whether torch keeps nothing of a compiled graph that can be written: its cache refuses an operator in it."""
    return getattr(getattr(compiled.inner_fn, "compiled_fn", None), "serialize", 0) is None


def load_kernel(name: str, path: str) -> Callable[..., Any]:
    """The function in a shared library that Inductor's C++ compiler made, under a name of its own.

    Reason: these libraries look for the address of one of torch's functions in the environment (2.1+).

    Raises: ImportError for a library that cannot be loaded; it runs code in it.
    """
    guards: Any = getattr(torch._C, "_dynamo").guards  # noqa: B009
    os.environ["_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"] = str(guards._torchinductor_pyobject_tensor_data_ptr)
    spec = importlib.util.spec_from_file_location(f"{name}.kernel", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no shared library {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel: Callable[..., Any] = module.kernel
    return kernel


def memory_functions() -> dict[str, Any]:
    """What the Python that Inductor writes calls to allocate, view and check tensors, by the names it has there.

    Reason: they are fast doubles of public functions, without public names (2.1+; ``assert_alignment`` 2.8+).
    """
    guards: Any = getattr(torch._C, "_dynamo").guards  # noqa: B009
    names = {
        "assert_size_stride": "assert_size_stride",
        "assert_alignment": "assert_alignment",
        "empty_strided_cpu": "_empty_strided_cpu",
        "reinterpret_tensor": "_reinterpret_tensor",
    }
    return {name: getattr(guards, own) for name, own in names.items() if hasattr(guards, own)}


def is_own_kernel(name: str) -> bool:
    """Whether what Inductor calls ``extern_kernels.NAME`` is ``torch.NAME`` itself.  Imports Inductor."""
    from torch._inductor.select_algorithm import extern_kernels

    return getattr(extern_kernels, name, None) is getattr(torch, name, NotImplemented)


def save_compiled(compiled: Any, path: str) -> None:
    """Write what ``compile_graph`` made into a file.

    Reason: ``CompiledArtifact`` is documented, its home is private (2.8+).

    Raises: RuntimeError, AttributeError where it cannot be written.
    """
    if hasattr(compiled, "inner_fn") and _unwritable(compiled):
        raise RuntimeError("torch keeps nothing of this graph that can be written")
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


def numbers_of_tensors(mode: FakeTensorMode) -> AbstractContextManager[Any]:
    """While operators run on fake values: the number of a tensor is a symbol, and a result of none of them.

    Reason: a compiler asks where each new symbol comes from, and is told by the graph (``ShapeEnv``, 2.3+).
    """
    env = mode.shape_env
    assert env is not None
    found: AbstractContextManager[Any] = env.ignore_fresh_unbacked_symbols()
    return found


def symbolic(mode: FakeTensorMode, tensor: torch.Tensor, free: list[bool]) -> torch.Tensor:
    """The fake twin of a tensor whose dimensions marked ``free`` are symbols; equal numbers are one symbol."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    dims = [DimDynamic.DUCK if is_free else DimDynamic.STATIC for is_free in free]
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims))


def use_count(tensor: Any) -> int:
    """How many hold a tensor's memory description: 1 for a tensor that only Python knows."""
    count: int = tensor._use_count()
    return count


def swap(value: torch.Tensor, tensor: torch.Tensor) -> None:
    """Exchange the contents and classes of two tensors, so that ``value`` is what ``tensor`` was, for all who hold it.

    Reason: ``torch.utils.swap_tensors`` (2.3+) is the public form; it looks through the slots of both classes each
    time, 4 µs for what takes 1. It is used wherever anything but a plain tensor that nobody else holds is exchanged.
    """
    if type(tensor) is torch.Tensor and use_count(tensor) == 1 and not getweakrefcount(value):
        kind = type(value)
        vars(value).clear()
        value.__class__, tensor.__class__ = torch.Tensor, kind
        torch._C._swap_tensor_impl(value, tensor)
    else:
        public: Any = torch.utils.swap_tensors
        public(value, tensor)


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


def write_aoti(exported: Any, path: Any) -> None:
    """Compile an exported program to an AOTInductor package (``torch._inductor.aoti_compile_and_package``, 2.6 on).

    The only way to such a package; torch documents it under this private name.
    """
    from torch._inductor import aoti_compile_and_package

    aoti_compile_and_package(exported, package_path=str(path))


def history(tensor: torch.Tensor) -> tuple[Any, int]:
    """The function of autograd that has made a tensor, and which of its results it is; below torch's functions.

    Reason: ``DisableTorchFunctionSubclass`` is the documented way to see a subclass as a plain tensor (2.0+).
    """
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.grad_fn, tensor.output_nr


def forget_history(tensor: torch.Tensor) -> None:
    """Let a tensor be a leaf that requires no gradient; below torch's functions.

    Reason: as ``history``.
    """
    with torch._C.DisableTorchFunctionSubclass():
        tensor.detach_()


def result_shapes(context: Any) -> list[Any]:
    """Of each result of a called ``torch.autograd.Function``: shape, dtype and device; None for one without gradient.

    Reason: nothing public tells how many gradients its backward takes (``Node._input_metadata``, 2.1+).
    """
    return [None if x is None else (tuple(x.shape), x.dtype, x.device) for x in context._input_metadata]


def trace_dynamo(gm: torch.fx.GraphModule, values: list[Any]) -> torch.fx.GraphModule:
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
    return tensor if mode is None else fake_of(mode, tensor)


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
