"""What `inspect` found, on one screen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from adapterkit.operations.inspect import Component, Inspection, KeyGroup, Problem, ScaleCount
from adapterkit.reports.words import (
    NARROW,
    Fact,
    counted,
    facts,
    heading,
    listed,
    percent,
    quantity,
    shape_words,
    shortened,
    size,
    tally,
)
from adapterkit.specs.layouts import layouts
from adapterkit.stores.guards import shown

_VALUE_LENGTH = 200
_HASH_LENGTH = 16


def inspection_report(found: Inspection, width: int) -> RenderableType:
    components = _table(found.components) if width >= NARROW else _lines(found.components)
    parts: list[RenderableType] = [heading(found.path), _what(found), components, facts(_facts(found))]
    if found.problems:
        parts.append(_problems(found.problems))
    return Group(*parts)


def inspection_line(found: Inspection) -> Text:
    """The file in one line, for many files."""
    return heading(found.path, f"{_title(found)}, {size(found.size)}")


def _what(found: Inspection) -> RenderableType:
    text = Text(_title(found), style="cyan")
    if found.also:
        text.append(f"; {' or '.join(found.also)} would fit as well (say --family)", style="yellow")
    return Padding(text, (0, 0, 0, 2))


def _title(found: Inspection) -> str:
    spelled = " and ".join(layouts()[name].title for name in found.layouts)
    return f"{_kind_titles(found)} for {found.title}, {spelled} format"


def _kind_titles(found: Inspection) -> str:
    """What people would call the file: `LoRA`, `DoRA`, `LoKr + whole delta`."""
    titles: dict[str, None] = {}
    for component in found.components:
        titles.update(dict.fromkeys(component.kinds))
    name = " + ".join(titles) or "nothing whole"
    return f"{name} with DoRA" if any(c.magnitudes for c in found.components) else name


def _table(components: Sequence[Component]) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("component", no_wrap=True)
    table.add_column("modules", justify="right", no_wrap=True)
    table.add_column("kind")
    table.add_column("rank")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("of the base", no_wrap=True)
    for one in components:
        table.add_row(
            one.name, str(one.modules), _kinds(one), _ranks(one), quantity(one.parameters), _share(one)
        )
    return Padding(table, (1, 0, 1, 2))


def _lines(components: Iterable[Component]) -> RenderableType:
    rows: list[RenderableType] = []
    for one in components:
        rank = f", rank {_ranks(one)}" if one.ranks else ""
        share = f", {_share(one)}" if one.base_parameters else ""
        details = f"{counted(one.modules, 'module')}, {_kinds(one)}{rank}\n"
        details += f"{quantity(one.parameters)} parameters{share}"
        rows += [Text(one.name), Padding(Text(details), (0, 0, 0, 2))]
    return Padding(Group(*rows), (1, 0, 1, 2))


def _kinds(component: Component) -> str:
    text = tally(component.kinds)
    if not component.magnitudes:
        return text
    every = component.magnitudes == component.modules
    return f"{text}, with DoRA" if every else f"{text}, {component.magnitudes} with DoRA"


def _ranks(component: Component) -> str:
    return (
        tally({str(rank): count for rank, count in component.ranks.items()}, most=3)
        if component.ranks
        else "–"
    )


def _share(component: Component) -> str:
    if not component.base_parameters:
        return "–"
    return (
        f"{percent(component.parameters, component.base_parameters)} of {quantity(component.base_parameters)}"
    )


def _facts(found: Inspection) -> Iterator[Fact]:
    yield "evidence", found.certainty
    if found.scales:
        yield "scale", scale_words(found.scales)
    yield "dtype", tally({name.lower(): count for name, count in found.dtypes.items()})
    yield "file", f"{size(found.size)}, {found.container}, {counted(found.tensors, 'tensor')}"
    if found.passengers:
        kinds: dict[str, int] = {}
        for what in found.passengers.values():
            kinds[what] = kinds.get(what, 0) + 1
        yield "carried", ", ".join(f"{count} × {shown(what)}" for what, count in kinds.items())
    yield from found.hashes.items()
    if found.embedded_hashes:
        hashes = {key: _hash(value) for key, value in found.embedded_hashes.items()}
        yield "embedded", _pairs(hashes)
    if found.metadata_keys:
        notes = {_label(key): shortened(value, _VALUE_LENGTH) for key, value in found.notes.items()}
        text = _pairs(notes)
        more = f"{counted(found.metadata_keys, 'key')}, --metadata shows them"
        yield "metadata", text.append(f"\n({more})" if notes else more, style="dim")


def _pairs(values: Mapping[str, str]) -> Text:
    """A name and its value, line by line; the values are safe to show."""
    text = Text()
    for number, (key, value) in enumerate(values.items()):
        text.append(f"{chr(10) if number else ''}{key} ", style="dim").append(value)
    return text


def _label(key: str) -> str:
    """The part of a well-known key that says something."""
    return key.removeprefix("modelspec.").removeprefix("ss_")


def _hash(value: str) -> str:
    return shown(value) if len(value) <= _HASH_LENGTH else f"{shown(value[:_HASH_LENGTH])}…"


def scale_words(scales: Sequence[ScaleCount], most: int = 4) -> str:
    """Values by where they come from: 0.5 (200), 1 (28) from `.alpha`."""
    by_source: dict[str, dict[str, int]] = {}
    for scale in scales:
        values = by_source.setdefault(scale.source, {})
        text = f"{scale.value:.4g}"
        values[text] = values.get(text, 0) + scale.count
    return "; ".join(f"{tally(values, most)}{_origin(source)}" for source, values in by_source.items())


def _origin(source: str) -> str:
    """` from .alpha`, but `, none given`."""
    return f", {shown(source)}" if source.startswith("none") else f" from {shown(source)}"


def _problems(problems: Iterable[Problem]) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="yellow bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for problem in problems:
        text = Text(shown(problem.message)).append(f" ({problem.code})", style="dim")
        if problem.hint:
            text.append(f"\nhint: {shown(problem.hint)}")
        grid.add_row(Text("!"), text)
    return Padding(grid, (1, 0, 0, 2))


def keys_report(groups: Sequence[KeyGroup], width: int) -> RenderableType:
    """Every key, in patterns: how many, their dtype and shape."""
    rows = [
        (str(g.count), "/".join(g.dtypes).lower(), shape_words(g.shapes), shown(g.pattern)) for g in groups
    ]
    table = listed(rows, ("keys", "dtype", "shape", "pattern"), numbers=1)
    if _fits(table, width - 2):
        return Padding(table, (1, 0, 0, 2))
    return _named((pattern, f"{count} × {dtype} {shape}") for count, dtype, shape, pattern in rows)


def metadata_report(metadata: Mapping[str, str], width: int) -> RenderableType:
    """Every key with its value, long ones shortened."""
    if not metadata:
        return Padding(Text("no metadata"), (1, 0, 0, 2))
    rows = [(shown(key), shortened(metadata[key], _VALUE_LENGTH)) for key in sorted(metadata)]
    table = facts(rows)
    return Padding(table, (1, 0, 0, 0)) if _fits(table, width) else _named(rows)


def _fits(table: RenderableType, width: int) -> bool:
    """Whether nothing in it would have to wrap."""
    console = Console(width=width)
    return Measurement.get(console, console.options.update(width=10_000), table).maximum <= width


def _named(rows: Iterable[tuple[str, str]]) -> RenderableType:
    """Names too long for a column: what is said of each stands below it."""
    lines: list[RenderableType] = []
    for name, value in rows:
        lines += [Text(name), Padding(Text(value, style="dim"), (0, 0, 0, 2))]
    return Padding(Group(*lines), (1, 0, 0, 2))
