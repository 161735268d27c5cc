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

"again" marks those that are captured a second time for other sizes, because their code asks about sizes.

| model type | blocks | mixers | by source | captured in | result |
|---|---|---|---|---|---|
"""
_UNMADE = ("config", "plain forward", "parts")


def table(reports: Sequence[dict[str, Any]]) -> str:
    """The page."""
    import transformers

    works = sum(not report["fails"] for report in reports)
    unmade = sum(report["fails"] in _UNMADE for report in reports)
    head = _HEAD.format(
        version=transformers.__version__,
        count=len(reports),
        works=works,
        unmade=unmade,
        broken=len(reports) - works - unmade,
    )
    return head + "".join(map(_line, sorted(reports, key=lambda report: str(report["kind"]))))


def _line(report: dict[str, Any]) -> str:
    found = [str(report.get(name) or "") for name in ("blocks", "mixers", "operations")]
    seconds = f"{report['seconds']} s" if report.get("seconds") else ""
    said = "works" + (", again" if report.get("captures", 1) > 1 else "")
    result = f"{report['fails']}: {_short(report.get('cause', ''))}" if report["fails"] else said
    return f"| {report['kind']} | {' | '.join(found)} | {seconds} | {result} |\n"


def _short(cause: str) -> str:
    """The first lines of an error, without paths of this machine."""
    text = re.sub(r"\S*/site-packages/", "", " ".join(cause.split()))
    return re.sub(r"[|`<>\[\]*_]", " ", text)[:160].strip()
