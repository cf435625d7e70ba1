"""What a choice of ranks kept, block by block, as resize, merge and extract show it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import cast

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from adapterkit.adapter import Adapter
from adapterkit.blocks import block_of, blocks_of
from adapterkit.errors import Json
from adapterkit.ranks import RankRule
from adapterkit.reduction import Reduction
from adapterkit.reports.words import Fact, counted, error_words, listed, size
from adapterkit.specs.families import Family, Place
from adapterkit.stores.guards import shown


@dataclass(frozen=True)
class BlockRanks:
    """One block: its modules, the ranks they got, and its relative error."""

    component: str
    block: str
    modules: int
    ranks: tuple[int, ...]
    error: float


def block_ranks(family: Family, reduction: Reduction) -> list[BlockRanks]:
    """The parts by component and block, in the order of the model."""
    found: dict[tuple[str, str], list[Place]] = {}
    for place in reduction.parts:
        block = block_of(family, place.component, place.span[0].module)
        found.setdefault((place.component, block), []).append(place)
    rows = []
    for (component, block), places in sorted(found.items(), key=lambda row: _in_model(family, *row[0])):
        ranks = tuple(sorted(reduction.ranks[place] for place in places))
        rows.append(BlockRanks(component, block, len(places), ranks, _error(reduction, places)))
    return rows


def _error(reduction: Reduction, places: list[Place]) -> float:
    total = math.fsum(reduction.parts[place].decomposition.energy for place in places)
    beyond = math.fsum(reduction.parts[place].left_out(reduction.ranks[place]) for place in places)
    return math.sqrt(min(1.0, beyond / total)) if total else 0.0


def _in_model(family: Family, component: str, block: str) -> tuple[int, int, list[tuple[int, str]]]:
    """The component's order in the family, the block's in its table, and its number."""
    blocks = blocks_of(family)
    labels = blocks.labels if blocks is not None else ()
    natural = [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", block)]
    order = labels.index(block) if block in labels else len(labels)
    return list(family.components).index(component), order, natural


def blocks_table(family: Family, reduction: Reduction) -> RenderableType:
    """A line for each block: how many modules, their ranks, and how much of their change is left out."""
    rows = [
        (
            str(row.modules),
            _middle(row.ranks),
            _range(row.ranks),
            error_words(row.error),
            row.component if row.block == row.component else f"{row.component} {row.block}",
        )
        for row in block_ranks(family, reduction)
    ]
    header = ("modules", "rank", "from–to", "error", "block")
    return Padding(listed(rows, header, numbers=4), (1, 0, 0, 2))


def rank_words(ranks: tuple[int, ...]) -> str:
    """`19 (median, 4–64)`, or the one rank that all have."""
    if not ranks:
        return "none"
    return _middle(ranks) if len(set(ranks)) == 1 else f"{_middle(ranks)} (median, {_range(ranks)})"


def _middle(ranks: tuple[int, ...]) -> str:
    return f"{median(ranks):g}" if ranks else "–"


def _range(ranks: tuple[int, ...]) -> str:
    return "" if len(set(ranks)) == 1 else f"{min(ranks)}–{max(ranks)}"


def kept_words(share: float) -> str:
    """The share of the squared change that is kept: `98.7 %`; `all` only where nothing is left out."""
    if share >= 1.0:
        return "all"
    # Rounded down: what is not all is never said to be 100 %.
    digits = 2 if share > 0.999 else 1
    return f"{math.floor(100 * share * 10**digits) / 10**digits:.{digits}f} %"


def rule_words(rule: RankRule) -> str:
    """What was asked for, as the options say it."""
    if rule.size is not None:
        text = f"at most {size(rule.size)}"
    elif rule.energy is not None:
        text = f"energy {rule.energy:g}"
    elif rule.error is not None:
        text = f"error {rule.error:g}"
    elif rule.auto:
        text = "what is not noise"
    elif isinstance(rule.rank, Mapping):
        text = ", ".join(f"{layer} {rank}" for layer, rank in rule.rank.items())
    else:
        text = "no more than is needed" if rule.rank is None else f"rank {rule.rank}"
    if rule.least > 1:
        text += f", at least {rule.least}"
    return text if rule.most is None else f"{text}, at most {rule.most}"


def reduction_facts(adapter: Adapter, reduction: Reduction, rule: RankRule) -> Iterator[Fact]:
    """What was kept of all, where it is least, and what was left out."""
    yield (
        "kept",
        f"{kept_words(reduction.energy)} of the squared change, error {error_words(reduction.error)}",
    )
    if worst := worst_place(reduction):
        error = reduction.errors[worst]
        name = shown(adapter.natives.get(worst, worst.span[0].module))
        yield "worst", f"{kept_words(1 - error**2)} of `{name}`, error {error_words(error)}"
    if missed := missed_target(reduction, rule):
        yield "", Text(missed, style="yellow")
    if gone := reduction.left_out:
        why = "nothing in them stands out of the noise" if rule.auto else "they change nothing"
        yield "left out", Text(f"{counted(len(gone), 'module')}: {why}", style="yellow")


def worst_place(reduction: Reduction) -> Place | None:
    """Of the parts that are kept, that of which least is."""
    errors = reduction.errors
    kept = [place for place in reduction.changes if errors[place] > 0]
    return max(kept, key=lambda place: errors[place], default=None)


def missed_target(reduction: Reduction, rule: RankRule) -> str:
    """That the error asked for is out of reach, if it is."""
    target = rule.error if rule.error is not None else None
    if rule.energy is not None:
        target = math.sqrt(1 - rule.energy)
    if target is None or rule.most is None or reduction.weighted_error <= target * (1 + 1e-9):
        return ""
    return f"ranks of at most {rule.most} do not reach what was asked for"


def reduction_json(family: Family, adapter: Adapter, reduction: Reduction, rule: RankRule) -> dict[str, Json]:
    """The rule, the ranks and the errors, of all, by block and module by module."""
    ranks = tuple(sorted(reduction.ranks.values()))
    errors = reduction.errors
    worst = worst_place(reduction)

    def name(place: Place) -> str:
        return adapter.natives.get(place, place.span[0].module)

    modules = [
        {
            "name": name(place),
            "component": place.component,
            "block": block_of(family, place.component, place.span[0].module),
            "rank": reduction.ranks[place],
            "full": part.full,
            "error": errors[place],
            "energy": part.decomposition.energy,
        }
        for place, part in reduction.parts.items()
    ]
    content: dict[str, object] = {
        "rule": rule.facts,
        "ranks": {"median": median(ranks), "least": ranks[0], "most": ranks[-1]} if ranks else None,
        "error": reduction.error,
        "energy": reduction.energy,
        "worst": {"name": name(worst), "error": errors[worst]} if worst else None,
        "left_out": [name(place) for place in reduction.left_out],
        "blocks": [asdict(row) for row in block_ranks(family, reduction)],
        "modules": modules,
    }
    return cast(dict[str, Json], content)
