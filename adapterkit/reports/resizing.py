"""The receipt of `resize`, and the choices that `--plan` lays out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import cast

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from adapterkit.errors import Json
from adapterkit.operations.resize import Point, Resizable, Resizing
from adapterkit.reports.conversion import (
    conversion_json,
    file_facts,
    loss_facts,
    note,
    notes_of,
    plan_json,
    receipt_words,
    result_of,
    target_words,
    verified_words,
)
from adapterkit.reports.ranks import (
    blocks_table,
    kept_words,
    rank_words,
    reduction_facts,
    reduction_json,
    rule_words,
    worst_place,
)
from adapterkit.reports.words import Fact, counted, error_words, facts, heading, listed, size
from adapterkit.specs.layouts import layouts
from adapterkit.stores.guards import shown

# The plot: columns between two points, and lines.
_STEP = 7
_HEIGHT = 10


def resizing_report(source: str, resized: Resizing) -> RenderableType:
    """Ranks and sizes before and after, the error, the blocks, and the receipt of the file."""
    planned = resized.conversion is None
    title = heading(source, "(a plan; nothing is written)") if planned else heading(source)
    plan, family = resized.plan, resized.source.family
    return Group(
        title,
        facts(_facts(resized)),
        blocks_table(family, resized.reduction),
        Text(),
        facts(_receipt(resized)),
        *map(note, notes_of(plan)),
    )


def _facts(resized: Resizing) -> Iterator[Fact]:
    plan, reduction = resized.plan, resized.reduction
    spelled = " and ".join(layouts()[name].title for name in resized.source.layouts)
    yield "from", f"{spelled} for {resized.source.family.label}: {counted(len(resized.source), 'module')}"
    yield "to", target_words(plan)
    yield "asked", rule_words(resized.rule)
    yield "rank", f"{_before(resized)} → {rank_words(tuple(sorted(reduction.ranks.values())))}"
    yield "size", f"{_size_before(resized)} → {size(reduction.size)}"
    yield from reduction_facts(plan.adapter, reduction, resized.rule)
    if resized.stayed:
        kinds = ", ".join(f"{count} {title}" for title, count in resized.stayed.items())
        yield "as it was", f"{kinds}: no sum of ranks; what was kept is a share of the others"
    if resized.faulty:
        names = ", ".join(shown(resized.source.natives.get(p, "")) for p in resized.faulty[:3])
        text = f"{counted(len(resized.faulty), 'module')} with numbers that are not finite: {names}"
        yield "as it was", Text(text, style="yellow")


def _before(resized: Resizing) -> str:
    return rank_words(tuple(sorted(resized.before.values())))


def _size_before(resized: Resizing) -> str:
    store = resized.source.store
    return size(store.size) if store is not None else "in memory"


def _receipt(resized: Resizing) -> Iterator[Fact]:
    plan, done = resized.plan, resized.conversion
    yield "tensors", f"{receipt_words(plan)}; {len(plan.header())} out"
    yield from loss_facts(plan)
    if done is None:
        return
    yield "verified", verified_words(done)
    if resized.measured is not None:
        yield "measured", f"error {error_words(resized.measured)} of the written file, all modules together"
    yield from file_facts(done)


def resizing_line(resized: Resizing) -> Text:
    """`rank 64 → 19 (median, 4–64), 228.5 MB → 49.0 MB, kept 98.7 %`, and where it is."""
    reduction = resized.reduction
    text = (
        f"rank {_before(resized)} → {rank_words(tuple(sorted(reduction.ranks.values())))}, "
        f"{_size_before(resized)} → {size(reduction.size)}, kept {kept_words(reduction.energy)}"
    )
    if worst := worst_place(reduction):
        name = shown(resized.plan.adapter.natives.get(worst, worst.span[0].module))
        text += f" (least of `{name}`: {kept_words(1 - reduction.errors[worst] ** 2)})"
    where = shown(result_of(resized.conversion)) if resized.conversion is not None else "planned"
    return Text(f"{where}: {text}")


def resizings_report(source: str, found: Sequence[Resizing]) -> RenderableType:
    """A line for each of several results."""
    rows = [
        (
            size(one.reduction.size),
            rank_words(tuple(sorted(one.reduction.ranks.values()))),
            kept_words(one.reduction.energy),
            error_words(one.reduction.error if one.measured is None else one.measured),
            shown(result_of(one.conversion)) if one.conversion is not None else rule_words(one.rule),
        )
        for one in found
    ]
    before = f"rank {_before(found[0])}, {_size_before(found[0])}"
    table = listed(rows, ("size", "rank", "kept", "error", "written"), numbers=4)
    return Group(heading(source, before), Padding(table, (1, 0, 0, 2)))


def choices_report(source: str, ready: Resizable, points: Sequence[Point]) -> RenderableType:
    """Size against error: one rank for all, and the same bytes where they save most."""
    rows = [
        (str(point.rank), size(point.size), error_words(point.error), error_words(point.shared), "")
        for point in points
    ]
    header = ("rank", "size", "error, one rank for all", "error, --size", "")
    store = ready.source.store
    before = size(store.size) if store is not None else "in memory"
    return Group(
        heading(source, before, "(a plan; nothing is written)"),
        Padding(listed(rows, header, numbers=4), (1, 0, 1, 2)),
        Padding(Text(plot(points), no_wrap=True), (0, 0, 0, 2)),
        note("--size, --energy and --error give each module the ranks that save most per byte"),
    )


def plot(points: Sequence[Point]) -> str:
    """Relative error over rank, in plain characters: o one rank for all, * the same size shared out."""
    width = _STEP * len(points)
    lines = [[" "] * width for _ in range(_HEIGHT + 1)]
    for column, point in enumerate(points):
        for sign, error in (("o", point.error), ("*", point.shared)):
            line = _HEIGHT - round(_HEIGHT * min(error, 1.0))
            at = _STEP * column + _STEP // 2
            lines[line][at] = "*" if lines[line][at] == "o" and sign == "*" else sign
    text = [f"{_label(number):>4} |{''.join(line).rstrip()}" for number, line in enumerate(lines)]
    ranks = "".join(str(point.rank).center(_STEP) for point in points)
    return "\n".join(
        [*text, f"     +{'-' * width}", f"rank  {ranks.rstrip()}", "error  o one rank for all  * --size"]
    )


def _label(line: int) -> str:
    return f"{1 - line / _HEIGHT:.1f}" if line % (_HEIGHT // 2) == 0 else ""


def choices_json(source: str, points: Sequence[Point]) -> dict[str, Json]:
    return cast(dict[str, Json], {"source": source, "choices": [asdict(point) for point in points]})


def resizing_json(source: str, resized: Resizing) -> dict[str, Json]:
    """Ranks, errors and sizes, module by module, and the facts of the file as of a conversion's."""
    plan, done = resized.plan, resized.conversion
    file = plan_json(source, plan) if done is None else conversion_json(source, done)
    store = resized.source.store
    before = sorted(resized.before.values())
    content = {
        **file,
        **reduction_json(resized.source.family, plan.adapter, resized.reduction, resized.rule),
        "ranks_before": {"least": before[0], "most": before[-1]} if before else None,
        "measured": resized.measured,
        "stayed": dict(resized.stayed),
        "nonfinite": [resized.source.natives.get(place, "") for place in resized.faulty],
        "bytes": {"in": store.size if store is not None else None, "out": resized.reduction.size},
    }
    return cast(dict[str, Json], content)
