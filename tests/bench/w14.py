"""W14: the logit lens, ``lm_head(ln_f(h))`` of every block's output, at every position and at the last one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from tests.bench import hooks
from tests.bench.case import BARE, CAREFUL, HOOKS, PROGRAM, TRACE, Bench, Case, Workload
from tests.bench.language import BATCH, LENGTH, Setting
from tests.bench.report import Table, paired_table
from tests.bench.timing import Job

NOTE = (
    f"Batch {BATCH} × {LENGTH} tokens; one forward, and one unembedding a block. Every block's logits have been "
    "compared with those of hooks first. Careful hooks leave out the model's own logits. Ratio of one call to the "
    "bare module's, and the difference: medians over paired rounds."
)
POSITIONS = {"every position": slice(None), "last position": slice(-1, None)}


def _run(bench: Bench) -> Iterator[Table]:
    name = "toy" if bench.options.quick else "gpt2"
    rows = bench.compare("w14", _cases(bench, name))
    title = f"W14: logit lens at every block, {'2 layers of width 64' if name == 'toy' else 'GPT-2 small'}"
    yield paired_table(title, [(row.name, row.times) for row in rows], BARE, NOTE)


def _cases(bench: Bench, name: str) -> Iterator[Case]:
    setting = Setting(name)
    for title, where in POSITIONS.items():
        program = traced(setting, where)[1].program
        jobs: dict[str, Job] = {
            **setting.bare(bench),
            HOOKS: partial(by_hand, setting, where, whole=True),
            CAREFUL: partial(by_hand, setting, where, whole=False),
            TRACE: lambda where=where: traced(setting, where)[0],  # type: ignore[misc]
            PROGRAM: partial(program, setting.ids),
        }
        yield Case(title, jobs, f"w14 {name} {title}", rounds=9)


def by_hand(s: Setting, where: slice, whole: bool) -> list[Tensor]:
    """Hooks on the blocks; without ``whole`` the forward ends before the model's own logits."""
    kept: list[Tensor] = []
    with hooks.outputs(dict.fromkeys(s.net.transformer.h, kept.append)):
        (s.net if whole else s.net.transformer)(s.ids)
    return [s.net.lm_head(s.net.transformer.ln_f(hidden[:, where])) for hidden in kept]


def traced(s: Setting, where: slice) -> tuple[list[Tensor], Any]:
    """As a researcher writes it."""
    inner = s.model.transformer
    with s.model.trace(s.ids, backend="eager") as tracer:
        lens = [s.model.lm_head(inner.ln_f(block.output[:, where])).save() for block in inner.h]
    return lens, tracer


WORKLOAD = Workload("w14", "logit lens: every block, every position or the last", _run)
