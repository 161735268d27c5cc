"""Operations as pages of text: a source with notes beside it, one operation, a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from fxsight.address import Address
from fxsight.book import Call, Const, SizeRef
from fxsight.facts import Facts, value_text
from fxsight.libraries import Libraries
from fxsight.look import NOTHING_CAPTURED, Body, Look, has_forward, in_words
from fxsight.program import Program
from fxsight.sites import Site
from fxsight.text import Text, node_line

NOT_EXECUTED = "not executed"


def body_text(body: Body, address: Address, operators: bool) -> Text:
    """A body with its operations beside their lines; without a source, the first line alone.

    operators: with those operators, subscripts and attributes that have a value, too.
    """
    file = f"{Libraries().short(body.source.file)}:{body.source.first_line}" if body.source is not None else ""
    header = "  ".join(filter(None, (body.title, in_words(address), file)))
    header = "\n".join(filter(None, (header, body.note)))
    if body.source is None:
        return Text(header)
    program = body.program
    if program is None:
        return Text(f"{header}\n{body.source.render()}")
    sites = {site.name: site for site in body.source.sites}
    notes = {name: _site_note(site, body, program) for name, site in sites.items()}
    notes = {name: note for name, note in notes.items() if note}
    shown = tuple(s for s in body.source.sites if s.kind == "call" or (operators and s.name in notes))
    text = replace(body.source, sites=shown).render(notes, operators=operators)
    rest = [f"{name}    # {_note(calls, program)}" for name, calls in body.calls.items() if name not in sites]
    more = ["made by decorators, attributes and constructors:", *rest] if rest else []
    return Text("\n".join([header, text, *more]))


def _site_note(site: Site, body: Body, program: Program) -> str:
    """What stands behind the line of an operation; nothing where nothing is known."""
    if site.name in body.calls:
        return _note(body.calls[site.name], program)
    return NOT_EXECUTED if site.name not in body.ran else ""


def _note(calls: Sequence[Call], program: Program) -> str:
    """The type of the first output, and how often there is one."""
    output = calls[0].output
    is_plain = output.leaves and all(isinstance(leaf, Const | SizeRef) for leaf in output.leaves)
    times = f", runs {len(calls)} times" if len(calls) > 1 else ""
    return f"{'= ' if is_plain else ''}{value_text(output, program)}{times}"


def empty_text(body: Body, module: nn.Module) -> str:
    """Why there is no source, in words."""
    if body.is_torch:
        return "made of these operators:" if body.names else "an operator of the graph: there is nothing in it"
    if has_forward(module):
        return "its forward has no source in Python to read: it is compiled, generated, or from exec"
    names = [f"[{name}].ops" if name.isdigit() else f".{name}.ops" for name, _ in module.named_children()]
    return f"it has no forward; its modules have: {', '.join(names)}" if names else "it has no forward"


def operation_text(look: Look, address: Address) -> Text:
    """One operation: its address, its facts in a column, and the lines around it."""
    facts = {"output": NOTHING_CAPTURED} if look.captured is None else _column(look, address)
    width, window = max(map(len, facts)), _window(look, address)
    column = [f"  {name:<{width}}  {fact}" for name, fact in facts.items() if fact]
    return Text("\n".join([str(address), *column, *(["", window] if window else [])]))


def _column(look: Look, address: Address) -> Mapping[str, str]:
    facts = Facts.of(look, address)
    return {
        "calls": facts.title,
        "line": facts.line,
        "inputs": facts.inputs,
        "output": facts.type,
        "runs": f"{facts.count} times" if facts.count > 1 else "",
        **_inside(look, address),
    }


def _inside(look: Look, address: Address) -> Mapping[str, str]:
    """What an operation opens to; of a torch call, what it became, since opening one takes a second."""
    places = look.places(address)
    call = places.find(address).call
    if call is None:
        return {}
    if call.kind == "torch" and call.body is None:
        return {"operators": ", ".join(places.node_places(call))}
    return {"opens to": ", ".join(look.body(address).names)}


def _window(look: Look, address: Address) -> str:
    """The lines around an operation; of an operator, its line of the program."""
    around, name = address.parent, address.steps[-1].name
    source = look.body(around).source
    if source is not None and source.find(name) is not None:
        path = f"model.{around}" if str(around) else "model"
        return source.render_site(path.replace("/", "."), name)
    facts = Facts.of(look, address)
    return "" if facts.place.call is not None else node_line(facts.node)


def table_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Text:
    """Rows in columns."""
    table = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) for row in table]
    return Text("\n".join(line.rstrip() for line in lines))
