"""W2, W3, W21: grids of patches and ablations; one forward a cell with hooks, and one sweep for all."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from tests.bench import hooks, models
from tests.bench.case import (
    CAREFUL,
    CLOSE,
    COMPILED,
    FAST,
    FAST_PLAN,
    HOOKS,
    PLAN,
    SWEEP,
    Bench,
    Case,
    Options,
    Workload,
    compile_seconds,
    compiled,
    difference_table,
    paid_table,
)
from tests.bench.grid import Task, forget_plans, stacked
from tests.bench.report import Table, paired_table
from tests.bench.timing import Job

NOTE = (
    "Every cell has been compared with the hooks' first: bit for bit in mode exact, within 1e-4 in mode fast. "
    "A sweep makes its plan; a plan is made before it is timed. "
    "Patterns: the hooks compute one head anew, fxsight writes the fused attention of one layer out, which is another "
    "formula: within 1e-4 in both modes. Careful hooks ask for the last logits only. nnsight: a trace a cell. "
    "torch.compile: the bare module, as often as there are cells, without edits."
)
Edit = Callable[..., Any]  # of one cell: a block (of hooks, or of a trace), what is kept of the clean run, two labels


def _clean(net: Any, task: Task, modules: Callable[[Any], nn.Module], port: str) -> list[Tensor]:
    """What a module of each block gets or gives in the clean run."""
    kept: list[Tensor] = []
    with ExitStack() as stack:
        for block in net.transformer.h[: task.layers]:
            module = modules(block)

            def keep(_m: nn.Module, args: Any, out: Any = None) -> None:
                value = args[0] if out is None else out
                kept.append(value[0] if isinstance(value, tuple) else value)

            made = module.register_forward_pre_hook(keep) if port == "input" else module.register_forward_hook(keep)
            stack.callback(made.remove)
        net(task.clean)
    return kept


@contextmanager
def _changed(module: nn.Module, port: str, change: Callable[[Tensor], None]) -> Iterator[None]:
    """While open, a copy of the module's input or output is changed."""

    def changed(value: Any) -> Any:
        own = (value[0] if isinstance(value, tuple) else value).clone()
        change(own)
        return (own, *value[1:]) if isinstance(value, tuple) else own

    with hooks.inputs(module, changed) if port == "input" else hooks.outputs({module: changed}):
        yield


def _hooks(net: Any, task: Task, cells: Sequence[tuple[Any, ...]], hooked: Callable[..., Any]) -> dict[str, Job]:
    """One forward a cell; the careful ones ask for the last logits only."""
    careful = _naive(net, task, cells, hooked, logits_to_keep=1)
    return {HOOKS: _naive(net, task, cells, hooked), CAREFUL: careful}


def _naive(net: Any, task: Task, cells: Sequence[tuple[Any, ...]], hooked: Callable[..., Any], **asked: int) -> Job:
    """One forward a cell; ``hooked(cell)`` is a context in which the forward is edited."""

    def job() -> list[Tensor]:
        found: list[Tensor] = []
        for cell in cells:
            with hooked(*cell):
                found.append(task.metric(net(task.corrupted, **asked).logits))
        return stacked(found)

    return job


def _jobs(model: Any, task: Task, body: Any, axes: dict[str, Any]) -> dict[str, Job]:
    def swept(mode: str) -> Job:
        def job() -> list[Tensor]:
            forget_plans(model)
            return [_flat(model.sweep(body, task.corrupted, mode=mode, **axes), len(axes))]

        return job

    def planned(mode: str) -> Job:
        plan = model.plan(body, task.corrupted, mode=mode, **axes)
        return lambda: [_flat(plan.run(), len(axes))]

    return {SWEEP: swept("exact"), FAST: swept("fast"), PLAN: planned("exact"), FAST_PLAN: planned("fast")}


def _flat(grid: Any, axes: int) -> Tensor:
    values: Tensor = grid.values.flatten(0, axes - 1)
    return values


# -- W2 --------------------------------------------------------------------------------------------------------------

PLACES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "resid": (lambda block: block, "input"),
    "attn": (lambda block: block.attn, "output"),
    "mlp": (lambda block: block.mlp, "output"),
}


def w2(net: Any, model: Any, task: Task) -> tuple[dict[str, Job], str]:
    clean = {name: _clean(net, task, *place) for name, place in PLACES.items()}

    def hooked(kind: str, layer: int, position: int) -> Any:
        find, port = PLACES[kind]

        def change(value: Tensor) -> None:
            value[:, position] = clean[kind][layer][:, position]

        return _changed(find(net.transformer.h[layer]), port, change)

    def body(kind: str, layer: int, position: int) -> Any:
        find, port = PLACES[kind]
        value = getattr(find(model.transformer.h[layer]), port)
        value = value[0] if kind == "attn" else value
        value[:, position] = clean[kind][layer][:, position]
        return task.metric(model.lm_head.output)

    axes = {"kind": list(PLACES), "layer": range(task.layers), "position": range(task.length)}
    naive = _hooks(net, task, list(product(*axes.values())), hooked)
    return {**naive, **_jobs(model, task, body, axes)}, f"3 × {task.layers} × {task.length} cells"


# -- W3 and W21 ------------------------------------------------------------------------------------------------------


def _heads(net: Any) -> int:
    count: int = net.config.n_head
    return count


def w3(net: Any, model: Any, task: Task) -> tuple[dict[str, Job], str]:
    width, size = net.config.n_embd, net.config.n_embd // net.config.n_head
    mixed = _clean(net, task, lambda block: block.attn.c_attn, "output")
    z = _clean(net, task, lambda block: block.attn.c_proj, "input")

    def hooked(kind: str, layer: int, head: int) -> Any:
        attention, first = net.transformer.h[layer].attn, "qkvz".index(kind) % 3 * width + head * size
        own = slice(first, first + size)

        def change(value: Tensor) -> None:
            value[..., own] = (z if kind == "z" else mixed)[layer][..., own]

        return _changed(
            attention.c_proj if kind == "z" else attention.c_attn, "input" if kind == "z" else "output", change
        )

    def heads(value: Tensor) -> Tensor:
        return value.reshape(*value.shape[:-1], -1, size).transpose(1, 2)

    parts = [dict(zip("qkv", map(heads, torch.split(m, width, -1)), strict=True)) for m in mixed]

    def body(kind: str, layer: int, head: int) -> Any:
        attention = model.transformer.h[layer].attn
        if kind == "z":
            own = slice(head * size, (head + 1) * size)
            attention.c_proj.input[..., own] = z[layer][..., own]
        else:
            value = attention.source.attention_interface_0.inputs[0]["qkv".index(kind) + 1]
            value[:, head] = parts[layer][kind][:, head]
        return task.metric(model.lm_head.output)

    axes = {"kind": list("zqkv"), "layer": range(task.layers), "head": range(_heads(net))}
    naive = _hooks(net, task, list(product(*axes.values())), hooked)
    return {**naive, **_jobs(model, task, body, axes)}, f"4 × {task.layers} × {_heads(net)} cells"


def w3_pattern(net: Any, model: Any, task: Task) -> tuple[dict[str, Job], str]:
    """The attention pattern of one head: the fused attention of one layer is written out."""
    size = net.config.n_embd // net.config.n_head
    mixed = _clean(net, task, lambda block: block.attn.c_attn, "output")

    def parts(value: Tensor) -> list[Tensor]:
        return [x.reshape(*x.shape[:-1], -1, size).transpose(1, 2) for x in torch.split(value, net.config.n_embd, -1)]

    clean = [_pattern(*parts(value)[:2]) for value in mixed]

    def hooked(layer: int, head: int) -> Any:
        attention, values, own = net.transformer.h[layer].attn, list[Tensor](), slice(head * size, (head + 1) * size)
        stack = ExitStack()
        handle = attention.c_attn.register_forward_hook(lambda _m, _a, out: values.append(parts(out)[2]))
        stack.callback(handle.remove)

        def change(value: Tensor) -> None:
            value[..., own] = clean[layer][:, head] @ values[0][:, head]

        stack.enter_context(_changed(attention.c_proj, "input", change))
        return stack

    def body(layer: int, head: int) -> Any:
        call = model.transformer.h[layer].attn.ops.attention_interface_0
        softmax = call.ops.torch_nn_functional_scaled_dot_product_attention_0.ops.softmax_0
        softmax.output[:, head] = clean[layer][:, head]
        return task.metric(model.lm_head.output)

    axes = {"layer": range(task.layers), "head": range(_heads(net))}
    cells = list(product(*axes.values()))
    jobs = {**_hooks(net, task, cells, hooked), **_jobs(model, task, body, axes)}
    return jobs, f"pattern: {task.layers} × {_heads(net)} cells"


def _pattern(query: Tensor, key: Tensor) -> Tensor:
    """Causal attention, f32[prompts, heads, length, length]."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    pattern: Tensor = scores.masked_fill(future, float("-inf")).softmax(-1)
    return pattern


def w21(net: Any, model: Any, task: Task) -> tuple[dict[str, Job], str]:
    size = net.config.n_embd // net.config.n_head

    def own(head: int) -> slice:
        return slice(head * size, (head + 1) * size)

    def hooked(layer: int, head: int) -> Any:
        def change(value: Tensor) -> None:
            value[..., own(head)] = 0

        return _changed(net.transformer.h[layer].attn.c_proj, "input", change)

    def body(layer: int, head: int) -> Any:
        model.transformer.h[layer].attn.c_proj.input[..., own(head)] = 0
        return task.metric(model.lm_head.output)

    axes = {"layer": range(task.layers), "head": range(_heads(net))}
    naive = _hooks(net, task, list(product(*axes.values())), hooked)
    return {**naive, **_jobs(model, task, body, axes)}, f"{task.layers} × {_heads(net)} cells"


# -- the tables ------------------------------------------------------------------------------------------------------

Make = Callable[[Any, Any, Task], tuple[dict[str, Job], str]]


def _workload(name: str, about: str, *makes: Make) -> Workload:
    def run(bench: Bench) -> Iterator[Table]:
        rows = bench.compare(name, (case for make in makes for case in _case(name, make, bench.options)))
        size = "4 layers of width 256" if bench.options.quick else "GPT-2 small"
        yield paired_table(f"{name.upper()}: {about}, {size}", [(row.name, row.times) for row in rows], HOOKS, NOTE)
        yield difference_table(f"{name.upper()}: the largest difference from the naive hooks", rows)
        if bench.options.compiled:
            yield paid_table(f"{name.upper()}: torch.compile", rows, lambda row: count_of(row.name))

    return Workload(name, f"{about} (minutes)", run, default=False)


def _case(name: str, make: Make, options: Options) -> Iterator[Case]:
    from fxsight.model import Model

    size = "small" if options.quick else "gpt2"
    net: Any = models.MODELS[size]()
    task = Task.of(net, False)
    with torch.no_grad():
        jobs, title = make(net, Model(net, cache=False), task)
    opened = make is w3_pattern  # attention written out is another formula than the fused one
    remote = "" if opened else f"{name} {size}"
    rounds = 3 if options.quick else 1
    made: dict[str, float] = {}
    if options.compiled:
        made[COMPILED] = compile_seconds(net, task.corrupted)
        jobs[COMPILED] = compiled(net, lambda fast: fast(task.corrupted), count_of(title))
    close = CLOSE | {SWEEP, PLAN} if opened else CLOSE
    yield Case(title, jobs, remote, HOOKS, close, rounds, 1, made=made)


def count_of(title: str) -> int:
    """``"3 × 4 × 15 cells"`` is 180."""
    return math.prod(int(word) for word in title.split() if word.isdigit())


W2 = _workload("w2", "resid, attention and MLP patched, layer × position", w2)
W3 = _workload("w3", "z, q, k, v and pattern of each head patched", w3, w3_pattern)
W21 = _workload("w21", "each head zeroed", w21)
