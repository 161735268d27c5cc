"""One architecture: captured, read and written at every block and in every mixer, compared with hooks bit for bit."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxsight.model import Model
from fxsight.tree import flatten
from tests.coverage.recipes import inputs, make

FIRST, SECOND = (2, 9), (3, 13)
MIXER = re.compile(
    r"attn|attention|mixer|mamba|ssm|conv|temporal|recurrent|retention|lightning|self_attn|tm|rwkv", re.I
)


@dataclass
class Report:
    """What was found.  fails: the first thing that did not hold, with its cause; empty when all did."""

    kind: str
    fails: str = ""
    cause: str = ""
    blocks: int = 0
    mixers: int = 0
    operations: int = 0
    captures: int = 0
    seconds: float = 0.0


def probe(kind: str) -> dict[str, Any]:
    """The report on one architecture, as plain data."""
    report = Report(kind)
    try:
        _probe(report)
    except Exception as error:
        report.cause = f"{type(error).__name__}: {str(error).strip()}"[:600]
    else:
        report.fails = ""
    return asdict(report)


def _probe(report: Report) -> None:
    report.fails = "config"
    net = make(report.kind)
    report.fails = "plain forward"
    first, second = inputs(report.kind, *FIRST), inputs(report.kind, *SECOND)
    with torch.no_grad():
        net(**first)
        expected = _logits(net(**second))
    report.fails = "capture"
    began = time.perf_counter()
    model: Any = Model(net, cache=False)
    model.capture(**first)
    report.seconds = round(time.perf_counter() - began, 1)
    blocks, mixers = _parts(model, net)
    report.blocks, report.mixers = len(blocks), len(mixers)
    with torch.no_grad():
        report.fails = "second size"
        with model.trace(**second):
            logits = _logits(model.output).save()
        _same(logits, expected, "logits")
        report.captures = model._captures.made
        report.fails = "blocks"
        _check(model, net, second, dict.fromkeys(blocks, ""))
        report.fails = "mixers"
        inner = {path: _operation(model, path) for path in mixers}
        report.operations = sum(bool(name) for name in inner.values())
        _check(model, net, second, inner)
    report.fails = "parts"
    if not blocks or not mixers:
        raise ValueError(
            f"{len(blocks)} blocks and {len(mixers)} mixers found in {[n for n, _ in net.named_children()]}"
        )


def _parts(model: Any, net: nn.Module) -> tuple[list[str], list[str]]:
    """The paths of the blocks that run, and of the inner part of each mixer: its last child that runs."""
    called = {path for path, number in model._captures.latest.book.modules if number == 0}
    lists = [
        p
        for p, m in net.named_modules()
        if isinstance(m, nn.ModuleList) and any(f"{p}.{n}" in called for n, _ in m.named_children())
    ]
    outer = [p for p in lists if not any(p.startswith(f"{q}.") for q in lists)]
    blocks = [
        f"{p}.{n}"
        for p in outer
        for n, m in net.get_submodule(p).named_children()
        if f"{p}.{n}" in called and list(m.children())
    ]
    mixers = []
    for block in blocks:
        names = [n for n, _ in net.get_submodule(block).named_modules() if n and f"{block}.{n}" in called]
        found = next((n for n in names if MIXER.search(n.rpartition(".")[2]) and "norm" not in n.lower()), None)
        found = "" if MIXER.search(block.split(".")[-2]) else found  # a list of mixers
        below = [n for n in names if found is not None and n.startswith(f"{found}." if found else "")]
        last = next(
            (
                n
                for n in reversed(below)
                if isinstance(net.get_submodule(f"{block}.{n}"), nn.Linear)
                or "Conv1D" in type(net.get_submodule(f"{block}.{n}")).__name__
            ),
            None,
        )
        if found is not None:
            mixers.append(f"{block}.{last or (below[-1] if below else found)}")
    return blocks, mixers


def _operation(model: Any, path: str) -> str:
    """The name of the operation in the source of the parent that calls a module; empty where it is called otherwise."""
    parent, _, name = path.rpartition(".")
    ops = model[parent].ops
    found = [op.name for op in ops if re.fullmatch(rf"self_{re.escape(name)}_\d+", op.name) and _runs(op)]
    return found[0] if len(found) == 1 else ""


def _runs(op: Any) -> bool:
    try:
        return bool(op.type) and op.shape is not None
    except Exception:
        return False


def _check(model: Any, net: nn.Module, kwargs: Any, places: dict[str, str]) -> None:
    """Reads, then writes: a half of the first tensor that each place returns; against hooks."""
    reads, plain = _hooked(net, kwargs, list(places), lambda x: x)
    writes, edited = _hooked(net, kwargs, list(places), lambda x: x * 0.5)
    for expected, logits, scale in ((reads, plain, None), (writes, edited, 0.5)):
        found: dict[str, Any] = {}
        with model.trace(**kwargs):
            for path, name in places.items():
                place = model[path] if not name else model[path.rpartition(".")[0]].ops[name]
                value = place.output
                if scale is not None:
                    place.output = _scaled(value, scale)
                    value = place.output
                found[path] = _first(value).save()
            out = _logits(model.output).save()
        for path in places:
            _same(found[path], expected[path], path)
        _same(out, logits, "logits")


def _scaled(value: Any, scale: float) -> Any:
    leaves, tree = flatten(value)
    place = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    return tree.build([leaf * scale if i == place else leaf for i, leaf in enumerate(leaves)])


def _hooked(net: nn.Module, kwargs: Any, paths: list[str], change: Callable[[Tensor], Tensor]) -> Any:
    found: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        def run(module: nn.Module, args: Any, output: Any) -> Any:
            if path in found:
                return None  # the first call alone, as a view without a number
            leaves, tree = flatten(output)
            place = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
            leaves[place] = change(leaves[place])
            found[path] = leaves[place].clone()
            return tree.build(leaves)

        return run

    handles = [net.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    try:
        logits = _logits(net(**kwargs))
    finally:
        for handle in handles:
            handle.remove()
    return found, logits


def _logits(output: Any) -> Any:
    return output["logits"] if "logits" in output else _first(output)


def _first(value: Any) -> Any:
    return next(leaf for leaf in flatten(value)[0] if isinstance(leaf, Tensor))


def _same(found: Tensor, expected: Tensor, what: str) -> None:
    if found.shape != expected.shape:
        raise ValueError(f"{what}: {list(found.shape)} where hooks have {list(expected.shape)}")
    if not torch.equal(found, expected) and not (found.isnan() == expected.isnan()).all():
        raise ValueError(f"{what}: NaN at other places")
    if not torch.equal(torch.nan_to_num(found), torch.nan_to_num(expected)):
        raise ValueError(f"{what}: differs from hooks by {(found - expected).abs().max().item():.1e}")
