"""A model's modules as text: what ``print(net)`` shows, with the names by which a view reaches them.

(layers/h): ModuleList(       has the alias ``layers``
(["output"]): BertOutput(     ``.output`` is a value: this child is ``view["output"]``
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

Label = Callable[[str, nn.Module, str], str]  # path and module of the parent, name of the child
More = Callable[[str], list[tuple[str, str]]]  # what else stands below a path: label, and path


def outline(module: nn.Module, path: str, label: Label, more: More, root: nn.Module) -> str:
    """The text of a module and all below it.

    path: of the module.  label: what stands in the parentheses of a child.  more: modules that are mounted on it.
    """
    if type(module).__repr__ not in (nn.Module.__repr__, nn.ModuleList.__repr__):
        return repr(module)
    title = str(module._get_name())  # type: ignore[no-untyped-call]
    rows: list[tuple[str, str]] = []
    children: dict[str, nn.Module | None] = vars(module)["_modules"]
    for name, child in children.items():
        text = "None" if child is None else outline(child, _join(path, name), label, more, root)
        rows.append((label(path, module, name), text))
    rows += [(shown, outline(root.get_submodule(target), target, label, more, root)) for shown, target in more(path)]
    if isinstance(module, nn.ModuleList):
        rows = _folded(rows)
    extra = [line for line in module.extra_repr().split("\n") if line]
    lines = [*extra, *(_indented(f"({shown}): {text}") for shown, text in rows)]
    if not lines:
        return f"{title}()"
    if len(extra) == 1 and not rows:
        return f"{title}({extra[0]})"
    inside = "\n  ".join(lines)
    return f"{title}(\n  {inside}\n)"


def _folded(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Neighbours that are alike in one row: ``(0-11): 12 x GPT2Block(``."""
    runs: list[list[tuple[str, str]]] = []
    for shown, text in rows:
        alike = runs and shown.isdecimal() and runs[-1][0][0].isdecimal() and runs[-1][0][1] == text
        runs[-1].append((shown, text)) if alike else runs.append([(shown, text)])
    return [run[0] if len(run) == 1 else (f"{run[0][0]}-{run[-1][0]}", f"{len(run)} x {run[0][1]}") for run in runs]


def _indented(text: str) -> str:
    return text.replace("\n", "\n  ")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
