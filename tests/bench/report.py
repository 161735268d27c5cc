"""Tables, on the terminal and as Markdown."""

import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from tests.bench.figure import Figure
from tests.bench.timing import Paired


@dataclass(frozen=True)
class Table:
    """Text in rows; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    figure: Figure | None = None

    def show(self, console: Console) -> None:
        """On the terminal."""
        shown = RichTable(title=self.title, caption=self.note or None, title_justify="left")
        for number, column in enumerate(self.columns):
            shown.add_column(column, justify="right" if number else "left", overflow="fold")
        for row in self.rows:
            shown.add_row(*row)
        console.print(shown)

    def markdown(self) -> str:
        """As a section of a page."""
        head = ["| " + " | ".join(self.columns) + " |", "|---" + "|---:" * (len(self.columns) - 1) + "|"]
        body = ["| " + " | ".join(row) + " |" for row in self.rows]
        drawn = [f"![{self.figure.title}](figures/{self.figure.name}.svg)", ""] if self.figure else []
        return "\n".join([f"### {self.title}", "", *([self.note, ""] if self.note else []), *drawn, *head, *body, ""])


def duration(seconds: float) -> str:
    """In the unit that reads best."""
    sign, size = ("−" if seconds < 0 else ""), abs(seconds)
    unit, one = next((u for u in (("s", 1.0), ("ms", 1e-3)) if size >= u[1]), ("µs", 1e-6))
    digits = max(0, 2 - int(math.log10(max(size / one, 1.0))))
    return f"{sign}{size / one:.{digits}f} {unit}"


def _cell(paired: Paired) -> str:
    plus = "+" if paired.over >= 0 else ""
    return f"{paired.ratio:.2f}× ({plus}{duration(paired.over)})"


def paired_table(title: str, rows: Iterable[tuple[str, Mapping[str, Paired]]], reference: str, note: str = "") -> Table:
    """A row for each case: the reference's time, and for each contender ratio and difference."""
    rows = list(rows)
    names = list(dict.fromkeys(name for _, times in rows for name in times if name != reference))
    names.sort(key=lambda name: name.startswith("fxsight"))
    body = [
        [case, duration(times[reference].median), *(_cell(times[n]) if n in times else "" for n in names)]
        for case, times in rows
    ]
    return Table(title, ["", reference, *names], body, note)


def machine(nnsight: str) -> str:
    """Cores, processor, versions: one line each."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    beside = f", nnsight {nnsight}" if nnsight else ""
    hardware = f"{os.cpu_count()} cores of {_processor()}"
    return f"{datetime.now(UTC):%Y-%m-%d}; {hardware}; Python {platform.python_version()}, {packages}{beside}."


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def replace_between(page: str, name: str, text: str) -> str:
    """The page with what stands between ``<!-- name -->`` and ``<!-- end name -->`` exchanged.

    Raises: ValueError when the marks are not there.
    """
    start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    before, found, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page lacks {start} … {end}")
    return f"{before}{start}\n\n{text.strip()}\n\n{end}{after}"
