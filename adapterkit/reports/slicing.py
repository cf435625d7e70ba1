"""What `slice` kept of an adapter, block by block, and where it is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import cast

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from adapterkit.blocks import blocks_of
from adapterkit.errors import Json
from adapterkit.operations.convert import Conversion
from adapterkit.operations.slice import AT_ZERO, IN_THE_OTHER, LEFT_OUT, Fate, Slicing
from adapterkit.plan import Plan
from adapterkit.reports.conversion import (
    conversion_json,
    file_facts,
    note,
    notes_of,
    output_size,
    plan_json,
    receipt_words,
    result_of,
    target_words,
    verified_words,
    written_size,
)
from adapterkit.reports.words import Fact, counted, facts, heading, listed, size
from adapterkit.specs.families import Family
from adapterkit.specs.layouts import layouts
from adapterkit.stores.guards import shown

_AS_ASKED = (LEFT_OUT, AT_ZERO, IN_THE_OTHER)


@dataclass(frozen=True)
class BlockShare:
    """Blocks in a row that fared alike: "IN01–IN08"; strengths of what is kept, each once."""

    component: str
    blocks: str
    kept: int
    left: int
    strengths: tuple[float, ...]


def slicing_report(source: str, sliced: Slicing) -> RenderableType:
    """What was kept and at which strength, and the receipt of each file, or what it would hold."""
    planned = sliced.conversion is None
    title = heading(source, "(a plan; nothing is written)") if planned else heading(source)
    parts: list[RenderableType] = [title, facts([("from", _source(sliced))]), _table(sliced)]
    for plan, done in _files(sliced):
        parts += [Text(), facts(_file_rows(plan, done)), *map(note, notes_of(plan))]
    return Group(*parts)


def slicing_line(sliced: Slicing) -> Text:
    """Where the results are, and nothing else."""
    return Text("\n".join(shown(result_of(done)) for _, done in _files(sliced) if done is not None))


def slicing_json(source: str, sliced: Slicing) -> dict[str, Json]:
    """Every change with its strength (null: left out), and the facts of each file as of a conversion's."""
    first, *rest = (
        plan_json(source, plan) if done is None else conversion_json(source, done)
        for plan, done in _files(sliced)
    )
    content = {
        "source": source,
        "changes": [asdict(fate) for fate in sliced.fates],
        "part": first,
        "rest": rest[0] if rest else None,
    }
    return cast(dict[str, Json], content)


def block_shares(family: Family, fates: Iterable[Fate]) -> list[BlockShare]:
    """The changes counted by component and block, neighbours that fared alike together."""
    by_block: dict[tuple[str, str], list[Fate]] = {}
    for fate in fates:
        by_block.setdefault((fate.component, fate.block), []).append(fate)
    rows = sorted(by_block.items(), key=lambda row: _place(family, *row[0]))
    return [
        _share([block for (_, block), _ in alike], [fate for _, found in alike for fate in found])
        for _, group in groupby(rows, key=lambda row: (row[0][0], _treatment(row[1])))
        if (alike := list(group))
    ]


def _share(blocks: Sequence[str], fates: Sequence[Fate]) -> BlockShare:
    name = blocks[0] if len(blocks) == 1 else f"{blocks[0]}–{blocks[-1]}"
    kept = sum(map(_is_kept, fates))
    return BlockShare(fates[0].component, name, kept, len(fates) - kept, _treatment(fates)[1])


def _treatment(fates: Iterable[Fate]) -> tuple[frozenset[bool], tuple[float, ...]]:
    """Whether changes are kept, left out, or some of both, and the strengths of those that are kept."""
    several = list(fates)
    strengths = {fate.strength for fate in several if fate.strength is not None and _is_kept(fate)}
    return frozenset(map(_is_kept, several)), tuple(sorted(strengths))


def _is_kept(fate: Fate) -> bool:
    return fate.strength not in (None, 0.0)


def _place(family: Family, component: str, block: str) -> tuple[int, int, list[tuple[int, str]]]:
    """The component's order in the family, the block's in its table, and its number."""
    blocks = blocks_of(family)
    labels = blocks.labels if blocks is not None else ()
    natural = [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", block)]
    return (
        list(family.components).index(component),
        labels.index(block) if block in labels else len(labels),
        natural,
    )


def _table(sliced: Slicing) -> RenderableType:
    rows = [
        (
            str(share.kept),
            str(share.left),
            ", ".join(f"{strength:g}" for strength in share.strengths) or "–",
            f"{share.component} {share.blocks}" if share.blocks != share.component else share.component,
        )
        for share in block_shares(sliced.plan.adapter.family, sliced.fates)
    ]
    return Padding(listed(rows, ("kept", "left out", "strength", "blocks"), numbers=3), (1, 0, 0, 2))


def _files(sliced: Slicing) -> Iterator[tuple[Plan, Conversion | None]]:
    yield sliced.plan, sliced.conversion
    if sliced.rest is not None:
        yield sliced.rest, sliced.rest_conversion


def _source(sliced: Slicing) -> str:
    adapter = sliced.plan.adapter
    spelled = " and ".join(layouts()[name].title for name in adapter.layouts)
    amount = size(adapter.store.size) if adapter.store is not None else "in memory"
    return f"{spelled} for {adapter.family.label}: {counted(len(sliced.fates), 'change')}, {amount}"


def _file_rows(plan: Plan, done: Conversion | None) -> Iterator[Fact]:
    amount = f"{size(output_size(plan))} of tensors" if done is None else written_size(done)
    yield "to", f"{target_words(plan)}, {amount}"
    yield "tensors", receipt_words(plan)
    yield from _left_out(plan)
    if done is not None:
        yield "verified", verified_words(done)
        yield from file_facts(done)


def _left_out(plan: Plan) -> Iterator[Fact]:
    """What is not in the file: as it was asked for, because it is zero, or by consent."""
    for reason, count in Counter(plan.receipt.dropped.values()).items():
        text = f"{counted(count, 'tensor')}: {reason}"
        yield ("left out", text) if reason in _AS_ASKED else ("lost", Text(text, style="yellow"))
    if plan.idle:
        yield "left out", f"{counted(len(plan.idle), 'module')} that would change nothing: exactly zero"
