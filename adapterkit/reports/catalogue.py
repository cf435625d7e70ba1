"""The formats there are, and the answers of `explain`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from adapterkit.operations.catalogue import Answer, Format, Meaning
from adapterkit.reports.words import NARROW, Fact, facts, heading, listed
from adapterkit.stores.guards import shown

# Prose is read best in lines of about this length.
_LINE = 88


def formats_report(formats: Sequence[Format], width: int) -> RenderableType:
    return _table(formats) if width >= NARROW else _lines(formats)


def _table(formats: Sequence[Format]) -> RenderableType:
    rows = [(f.name, _directions(f), _what(f)) for f in formats]
    return listed(rows, ("format", "", "what it is, and for which base models"))


def _lines(formats: Iterable[Format]) -> RenderableType:
    rows: list[RenderableType] = []
    for one in formats:
        rows.append(heading(one.name, _directions(one)))
        rows.append(Padding(_what(one), (0, 0, 0, 2)))
    return Group(*rows)


def _what(one: Format) -> Text:
    return Text(one.summary).append(f"\n{', '.join(one.reads)}", style="dim")


def _directions(one: Format) -> str:
    return "read, write" if one.writes else "read"


def answer_report(answer: Answer, width: int) -> RenderableType:
    parts: list[RenderableType] = [heading(answer.topic)]
    if answer.text:
        parts.append(Padding(Text(answer.text), (0, max(0, width - _LINE), 0, 2)))
    for meanings in _alike(answer.meanings):
        parts.append(facts(_meaning(meanings)))
    return Group(*parts)


def _alike(meanings: Iterable[Meaning]) -> list[list[Meaning]]:
    """Meanings that differ in the base model alone, together."""
    found: dict[tuple[object, ...], list[Meaning]] = {}
    for meaning in meanings:
        same = (meaning.layout, meaning.component, meaning.naming, meaning.rows, meaning.kind, meaning.role)
        found.setdefault(same, []).append(meaning)
    return list(found.values())


def _meaning(meanings: Sequence[Meaning]) -> Iterable[Fact]:
    first = meanings[0]
    yield "format", first.layout
    yield "base", ", ".join(dict.fromkeys(meaning.family for meaning in meanings))
    yield "tensor", f"{first.role} of {first.kind}"
    yield "changes", "\n".join(f"{first.component}: {shown(row)}" for row in first.rows)
    yield "", ""
