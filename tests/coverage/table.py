"""Reports as a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_HEAD = """# Which architectures work

Every causal language model of `transformers` {version} ({count} model types), made small and random, captured, and
compared with PyTorch hooks, bit for bit, at a batch and a length that it was not captured with. Made by
`python -m tests.coverage`.

For each: all blocks are read, and written; so is the last operation in each block's attention or mixer, by its name in
the source where its source calls it once. **{works} of {count} work.** Of the others, {unmade} could not be made small
by our recipes or do not run so, which says nothing about them; {broken} cannot be captured, or differ from hooks.

A row is of the last run of its architecture; a run may be of a few. What fails in `transformers` itself: `blt`, `dbrx`,
`longcat_flash` and `qwen4_exp` decide in Python by the numbers in a tensor how they go on (which experts have tokens,
where a patch of bytes ends, how many blocks are full), which no graph can hold; `gemma3n` needs timm and PIL; a
`gemma4_assistant` must share the keys of all its layers, and its config refuses that no layer makes them.

"again" marks those that are captured a second time for other sizes, because their code asks about sizes.

| model type | blocks | mixers | by source | captured in | result |
|---|---|---|---|---|---|
"""
_UNMADE = ("config", "plain forward", "parts")
_ROW = re.compile(r"^\| (?!model type)(\S+) (\| .*\|\n)", re.M)


def table(reports: Sequence[dict[str, Any]], page: str = "") -> str:
    """The page.  page: what it was; rows of architectures without a report stay."""
    import transformers

    found = dict(_ROW.findall(page)) | {str(report["kind"]): _line(report) for report in reports}
    results = [line.rstrip(" |\n").rpartition(" | ")[2] for line in found.values()]
    works = sum(result.startswith("works") for result in results)
    unmade = sum(result.startswith(_UNMADE) for result in results)
    head = _HEAD.format(
        version=transformers.__version__,
        count=len(found),
        works=works,
        unmade=unmade,
        broken=len(found) - works - unmade,
    )
    return head + "".join(f"| {kind} {line}" for kind, line in sorted(found.items()))


def _line(report: dict[str, Any]) -> str:
    found = [str(report.get(name) or "") for name in ("blocks", "mixers", "operations")]
    seconds = f"{report['seconds']} s" if report.get("seconds") else ""
    said = "works" + (", again" if report.get("captures", 1) > 1 else "")
    result = f"{report['fails']}: {_short(report.get('cause', ''))}" if report["fails"] else said
    return f"| {' | '.join(found)} | {seconds} | {result} |\n"


def _short(cause: str) -> str:
    """The first lines of an error, without paths of this machine."""
    text = re.sub(r"\S*/site-packages/", "", " ".join(cause.split()))
    return re.sub(r"[|`<>\[\]*_]", " ", text)[:160].strip()
