"""Compiled regions by their canonical text: made once, kept in memory and on disk.

    FXSIGHT_CACHE_DIR/compiled, else in the platform's cache folder
    └── 77aa…-02fe….region      text and environment, contents; a line of JSON, and what Inductor compiled (``kernels``)

A file holds for one canonical text in one ``environment``: versions, settings of the compiler, processor. One that is
damaged, foreign or refused by torch is removed, and the region compiled again. Unlike a captured program a file of
these is code, as everything in a compiler's cache is: who can write the folder can have it run.
"""

from __future__ import annotations

import ast
import copy
import functools
import json
import platform
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxsight import _torch
from fxsight.canonical import Canonical, read_spec, write_spec
from fxsight.effects import is_random
from fxsight.fakes import Fakes, propagate
from fxsight.folder import Folder, cache_folder, digest, remove
from fxsight.identity import library_versions
from fxsight.kernels import Parts, put_together, take_apart
from fxsight.spec import Spec, TensorSpec, contiguous_stride, parse_expr
from fxsight.straight import straight

FORMAT = 5
KEPT = 256  # artifacts in memory
_CATS = (torch.ops.aten.cat.default, torch.cat)
Compiler = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


@dataclass(frozen=True, eq=False)
class Artifact:
    """A compiled region.

    call: of the sizes, then the inputs; returns the results.  results: their specs, in canonical names.
    guards: the conditions on sizes under which it holds.
    """

    call: Callable[..., Sequence[Any]]
    results: tuple[Spec, ...]
    guards: tuple[Any, ...] = ()


class NotReady(Exception):
    """What is not compiled yet, where nothing may be compiled."""


class Artifacts:
    """Compiled regions: those in memory, those in a folder, and new ones.

    folder: None for memory alone.  compiler: makes a function of a graph with fake values and its fake inputs.
    limit: how many are kept in memory.  made, read: how many were compiled here, how many came from disk.
    """

    def __init__(
        self, folder: Path | None = None, compiler: Compiler = _torch.compile_graph, limit: int = KEPT
    ) -> None:
        self.made = self.read = 0
        self._compiler, self._limit = compiler, limit
        self._files = None if folder is None else Folder(folder, ".region", "compiled regions")
        self._kept: OrderedDict[str, Artifact] = OrderedDict()

    @staticmethod
    def on_disk() -> Artifacts:
        """Those of the cache folder (``folder.cache_folder``)."""
        return Artifacts(cache_folder() / "compiled")

    @property
    def folder(self) -> Path | None:
        """Where they are kept on disk."""
        return None if self._files is None else self._files.path

    def ready(self) -> Artifacts:
        """The same, of which none is compiled here: where one would be, NotReady is raised."""
        found = copy.copy(self)
        found._compiler = _refuse
        return found

    def check_may_compile(self) -> None:
        """Raises: NotReady where nothing may be compiled."""
        if self._compiler is _refuse:
            raise NotReady

    def of(self, region: Canonical) -> Artifact:
        """The artifact of a region: from memory, else from disk, else compiled now.

        Raises: InputError where a size depends on numbers; Untraceable where torch refuses an operator; NotReady.
        """
        key = region.text + _ambient()
        found = self._kept.get(key) or self._load(region)
        if found is None:
            found = self._compile(region)
        self._kept[key] = found
        self._kept.move_to_end(key)
        if len(self._kept) > self._limit:
            self._kept.popitem(last=False)
        return found

    def _compile(self, region: Canonical) -> Artifact:
        if _is_fused(region):
            self.check_may_compile()
        module, example, results, fakes = traced(region)
        has_tensors = any(isinstance(spec, TensorSpec) for spec in results)
        if not region.is_compiled or not has_tensors or any(map(is_random, region.graph.nodes)):
            # Sizes, or a buffer's update: nothing to fuse. Random numbers: Inductor keeps no order among draws.
            found = Artifact(straight(region.graph), results, fakes.guards())
            return self._keep(region, found, "calls", bytes)
        compiled = self._compiler(module, example)
        self.made += 1
        parts = take_apart(compiled)
        found = Artifact(compiled if parts is None else put_together(parts), results, fakes.guards())
        if parts is not None:
            return self._keep(region, found, "parts", parts.to_bytes)
        return self._keep(region, found, "whole", lambda: _written(compiled))

    def _keep(self, region: Canonical, found: Artifact, form: str, write: Callable[[], bytes | None]) -> Artifact:
        """Write what has been made, where there is a folder.

        form: ``calls``, nothing but the operators; ``parts``, of ``kernels``; ``whole``, as torch writes it.
        write: makes the contents; None for what cannot be written.
        """
        if self._files is not None and (data := write()) is not None:
            told = {"results": [write_spec(spec) for spec in found.results], "guards": [str(g) for g in found.guards]}
            header = {**_identity(region), **told, "form": form}
            self._files.write(_name(region), json.dumps(header).encode() + b"\n" + data)
        return found

    def _load(self, region: Canonical) -> Artifact | None:
        for path, data in () if self._files is None else self._files.read(_name(region)):
            try:
                found = _decode(data, region)
            except Exception:  # whatever a foreign file makes json, the parser, torch or a dynamic linker raise
                remove(path)
                continue
            self.read += 1
            if self._files is not None:
                self._files.used(path)
            return found
        return None


def _is_fused(region: Canonical) -> bool:
    """Whether there is certainly something for a compiler in it; to be asked before it is traced."""
    returned: Any = region.graph.output_node().args[0]
    has_tensors = any(node.meta.get("is_tensor") for node in returned)
    return region.is_compiled and has_tensors and not any(map(is_random, region.graph.nodes))


def _refuse(module: fx.GraphModule, example: list[Any]) -> Callable[..., Any]:
    raise NotReady


def traced(region: Canonical) -> tuple[fx.GraphModule, list[Any], tuple[Spec, ...], Fakes]:
    """What a compiler takes: a graph with fake values, the fake inputs; the specs of the results; what made the values.

    Raises: InputError where a size depends on numbers; Untraceable where torch refuses an operator.
    """
    module = fx.GraphModule(torch.nn.Module(), _with_methods(region.graph))
    fakes = Fakes(region.sizes)
    example = [fakes.of(node.meta["spec"]) for node in region.graph.nodes if node.op == "placeholder"]
    results = tuple(map(fakes.spec, propagate(module, fakes.mode, example)))
    if _lay_out(module, results):
        propagate(module, fakes.mode, example)
    return module, example, results, fakes


def _lay_out(module: fx.GraphModule, results: Sequence[Spec]) -> bool:
    """Let the results of ``cat`` lie row by row where they do: a compiler may lay them out as what was put together.

    Returns: whether there are any.
    """
    output = module.graph.output_node()
    found: Any = output.args[0]
    made = [node for node, spec in zip(found, results, strict=True) if node.target in _CATS and _is_plain(spec)]
    with module.graph.inserting_before(output):
        plain = {node: module.graph.call_method("contiguous", (node,)) for node in made}
    output.args = (type(found)(plain.get(node, node) for node in found),)
    module.recompile()
    return bool(plain)


def _is_plain(spec: Spec) -> bool:
    return isinstance(spec, TensorSpec) and tuple(spec.stride) == tuple(contiguous_stride(spec.shape))


def _with_methods(graph: fx.Graph) -> fx.Graph:
    """A copy in which ``torch.Tensor.mul_(x, 2)`` is ``x.mul_(2)``: torch writes no artifact of the former."""
    new = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        made[node] = new.node_copy(node, made.__getitem__)
        made[node].meta = {}
        owner = getattr(node.target, "__objclass__", None)
        if owner is not None and issubclass(torch.Tensor, owner) and node.args and isinstance(node.args[0], fx.Node):
            made[node].op, made[node].target = "call_method", node.target.__name__
    return new


def _written(compiled: Any) -> bytes | None:
    """What torch writes of a compiled region; None where it cannot."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "compiled"
            _torch.save_compiled(compiled, str(path))
            return path.read_bytes()
    except (RuntimeError, AttributeError, OSError):
        return None


def _decode(data: bytes, region: Canonical) -> Artifact:
    """The artifact in a file.

    Raises: anything, when it is not one of this region in this environment.
    """
    line, _, compiled = data.partition(b"\n")
    header = json.loads(line)
    if any(header[key] != value for key, value in _identity(region).items()):
        raise ValueError("the artifact of another region")
    results = tuple(map(read_spec, header["results"]))
    guards = tuple(parse_expr(ast.parse(text, mode="eval").body) for text in header["guards"])
    if header["form"] == "calls":
        return Artifact(straight(region.graph), results, guards)
    if header["form"] == "parts":
        return Artifact(put_together(Parts.from_bytes(compiled)), results, guards)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "compiled"
        path.write_bytes(compiled)
        return Artifact(_torch.load_compiled(str(path)), results, guards)


# ------------------------------------------------------------------------------------------------------ identity


def _name(region: Canonical) -> str:
    return digest(json.dumps(_identity(region)).encode())[:40]


def _identity(region: Canonical) -> dict[str, Any]:
    return {"format": FORMAT, "text": region.text, "environment": environment()}


def environment() -> dict[str, str]:
    """All that decides what a compiler makes of a text: versions, its settings, the devices, torch's settings."""
    versions = library_versions()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **{name: versions[name] for name in ("python", "torch", "fxsight")},
        "settings": _torch.compiler_settings(),
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "devices": ", ".join([*devices, str(torch.version.cuda)]),
        "ambient": _ambient(),
    }


def _ambient() -> str:
    """Torch's own settings that a compiler looks at."""
    return json.dumps(
        [
            torch.get_num_threads(),  # a number in the code that it writes
            str(torch.get_default_dtype()),  # of what a region makes without one
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.backends.mkldnn.enabled,
        ]
    )


@functools.cache
def _processor() -> str:
    """The processor and what it can do: code is compiled for the machine it is compiled on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    said = [line for line in lines if line.split("\t")[0] in ("model name", "flags", "Features", "CPU part")]
    return f"{platform.machine()} {digest(''.join(said).encode())[:16]}"
