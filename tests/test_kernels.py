"""What Inductor makes, taken apart and put together: the same bits; where that is not all of it, it stays whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fxsight import _torch
from fxsight.artifacts import Artifacts, traced
from fxsight.canonical import Canonical, canonical
from fxsight.folder import digest
from fxsight.kernels import Parts, put_together, take_apart
from fxsight.regions import whole
from fxsight.testing import program_of

PLAIN = """
    x: 'input 0'  # f32[batch, 8]
    w: 'weight w'  # f32[8, 8]
    made = aten.mm.default(x, w)  # f32[batch, 8]
    soft = aten.softmax.int(made, 1)  # f32[batch, 8]
    return (soft,)
"""
X, W = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.eye(8) * 2
EXPECTED = (X @ W).softmax(1)


def region(body: str) -> Canonical:
    program = program_of(body)
    specs = {node: node.meta["spec"] for node in program.graph.nodes if node.op != "output"}
    return canonical(whole(program), specs, {"batch": 5}, ())


def compiled(body: str) -> Any:
    module, example, _, _ = traced(region(body))
    return _torch.compile_graph(module, example)


@pytest.fixture(scope="module")
def plain() -> Any:
    return compiled(PLAIN)


@pytest.fixture(scope="module")
def parts(plain: Any) -> Parts:
    found = take_apart(plain)
    assert found is not None
    return found


def test_the_parts_compute_the_same_bits(plain: Any, parts: Parts) -> None:
    (ours,), (theirs,) = put_together(parts)(3, X, W), plain(3, X, W)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours, EXPECTED)


def test_the_parts_are_a_function_and_libraries(parts: Parts) -> None:
    assert parts.text.startswith("def call(args):") and "extern_kernels.mm(" in parts.text
    assert parts.libraries and all(data.startswith(b"\x7fELF") for data in parts.libraries.values())
    assert Parts.from_bytes(parts.to_bytes()) == parts
    assert parts.to_bytes() == Parts.from_bytes(parts.to_bytes()).to_bytes()


def test_no_gradients_and_no_casts_inside(parts: Parts) -> None:
    """As in what AOTAutograd makes: the function runs on plain numbers."""
    weight = W.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (result,) = put_together(parts)(3, X, weight)
    assert result.dtype == torch.float32 and not result.requires_grad
    torch.testing.assert_close(result, EXPECTED)
    (result,) = put_together(parts)(3, X, weight)
    assert not result.requires_grad


WHOLE = {
    "an input is changed": """
        x: 'input 0'  # f32[batch, 8]
        user = torch.Tensor.add_(x, 1.0)  # none
        end = aten.tanh.default(x)  # f32[batch, 8]
        return (end,)
    """,
    "a result is a view of an input": """
        x: 'input 0'  # f32[batch, 8]
        half = aten.slice.Tensor(x, 1, 0, 4)  # f32[batch, 4]  {stride='8, 1', shares='x'}
        end = aten.tanh.default(x)  # f32[batch, 8]
        return (half, end)
    """,
}


@pytest.mark.parametrize("case", WHOLE)
def test_what_needs_more_than_its_function_stays_whole(case: str, tmp_path: Path) -> None:
    assert take_apart(compiled(WHOLE[case])) is None
    for count in ((1, 0), (0, 1)):
        kept, x = Artifacts(tmp_path), X.clone()
        end = kept.of(region(WHOLE[case])).call(3, x)[-1]
        assert (kept.made, kept.read) == count
        torch.testing.assert_close(end, (X + 1).tanh() if "changed" in case else X.tanh())
        assert torch.equal(x, X + 1 if "changed" in case else X)


def test_another_function_has_no_parts() -> None:
    assert take_apart(lambda *args: args) is None


def test_what_torch_does_not_keep_is_compiled_and_not_written(tmp_path: Path) -> None:
    """Of a graph with an operator that its cache refuses, torch has nothing to write."""
    kept = Artifacts(tmp_path, lambda graph, example: _Unwritable(graph))
    assert torch.equal(kept.of(region(PLAIN)).call(3, X, W)[-1], EXPECTED)
    assert kept.made == 1 and not list(tmp_path.glob("*.region"))


class _Unwritable:
    def __init__(self, graph: Any) -> None:
        self.inner_fn = SimpleNamespace(compiled_fn=SimpleNamespace(serialize=None))
        self.graph = graph

    def __call__(self, *args: Any) -> Any:
        return self.graph(*args)


CALL = "class Runner:\n    def call(self, args):\n        x, = args\n        return ({}, )\n"
REFUSED = {
    "a name of Inductor's": "run_intermediate_hooks(x)",
    "an operator that Inductor registers": "torch.ops.inductor._mm_plus_mm(x, x, x, x)",
    "a private function": "torch._C._nn.gelu(x)",
    "a kernel that is no function of torch's": "extern_kernels.bias_addmm(x, x, x)",
    "a part of several": "self.partitions[0](x)",
    "a function in it": "(lambda y: y)(x)",
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_names_in_the_function_are_not_taken_along(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "plain_code", lambda _: (CALL.format(REFUSED[case]), {}))
    assert take_apart(None) is None
    monkeypatch.setattr(_torch, "plain_code", lambda _: (CALL.format("aten.tanh.default(x) + torch.pi"), {}))
    found = take_apart(None)
    assert found is not None and torch.equal(put_together(found)(X)[0], X.tanh() + torch.pi)


@pytest.mark.parametrize("source", ["", CALL + CALL, "def call(x, y):\n    return x\n"])
def test_other_sources_are_not_understood(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "plain_code", lambda _: (source, {}))
    assert take_apart(None) is None


def test_a_library_that_cannot_be_loaded_is_compiled_again(parts: Parts, tmp_path: Path) -> None:
    kept = Artifacts(tmp_path)
    kept.of(region(PLAIN))
    (file,) = tmp_path.iterdir()
    head, _, _ = file.read_bytes().partition(b"\n")
    data = head + b"\n" + Parts(parts.text, dict.fromkeys(parts.libraries, b"no library")).to_bytes()
    file.unlink()
    file.with_name(f"{file.name[:40]}-{digest(data)[:16]}.region").write_bytes(data)
    again = Artifacts(tmp_path)
    torch.testing.assert_close(again.of(region(PLAIN)).call(3, X, W)[0], EXPECTED)
    assert (again.made, again.read) == (1, 0)


def test_a_compiler_that_refuses_vector_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor is told that they work; where they do not, it finds out for itself."""
    told: list[Any] = []

    def compile_with(module: Any, example: Any, patches: dict[str, Any]) -> Callable[..., list[Tensor]]:
        told.append(patches.get("cpp.vec_isa_ok"))
        if told[-1]:
            raise RuntimeError("unrecognized command-line option")
        return lambda size, x, w: [EXPECTED]

    monkeypatch.setattr(_torch, "_compile_with", compile_with)
    assert compiled(PLAIN)(3, X, W) == [EXPECTED] and told == [True, None]


def test_names_that_exist_on_this_torch() -> None:
    """That the names in generated code are there is not to be found out by a slow start."""
    assert _torch.memory_functions().keys() >= {"assert_size_stride", "empty_strided_cpu", "reinterpret_tensor"}
    assert _torch.is_own_kernel("addmm") and not _torch.is_own_kernel("bias_addmm")
