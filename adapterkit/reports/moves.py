"""A plan's mapping by pattern: which names become which, and what happens to their rows on the way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from adapterkit.key_patterns import key_patterns
from adapterkit.plan import Module, Plan
from adapterkit.recut import Part
from adapterkit.stores.guards import shown

RENAMED = "renamed"

# `shown` leaves neither in a name.
_BETWEEN, _BECOMES = "\n", "\n\n"


@dataclass(frozen=True, slots=True)
class Move:
    """Modules that become others in the same way.

    sources, targets: patterns of their names.  count: how often it happens.  how: in words.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    count: int
    how: str


def moves(plan: Plan) -> tuple[Move, ...]:
    """Every module of a plan, grouped by the patterns of its names and by what happens to its rows."""
    by_how: dict[str, list[str]] = {}
    for sources, modules in _by_sources(plan).items():
        targets = tuple(dict.fromkeys(shown(module.native) for module in modules))
        text = _BETWEEN.join(sources) + _BECOMES + _BETWEEN.join(targets)
        by_how.setdefault(_how(sources, targets, modules), []).append(text)
    return tuple(move for how, texts in by_how.items() for move in _patterns(how, texts))


def _by_sources(plan: Plan) -> dict[tuple[str, ...], list[Module]]:
    """The modules written, by the names of all the modules that they are made from."""
    found: dict[tuple[str, ...], list[Module]] = {}
    for module in plan.modules:
        names = (_name(plan, part) for part in module.cut.parts)
        sources = tuple(dict.fromkeys(name for name in names if name is not None))
        found.setdefault(sources, []).append(module)
    return found


def _name(plan: Plan, part: Part) -> str | None:
    return None if part.source is None else shown(plan.adapter.natives[part.source.place])


def _patterns(how: str, texts: Iterable[str]) -> Iterable[Move]:
    for pattern in key_patterns(texts):
        sources, targets = pattern.text.split(_BECOMES)
        yield Move(tuple(sources.split(_BETWEEN)), tuple(targets.split(_BETWEEN)), pattern.count, how)


def _how(sources: Sequence[str], targets: Sequence[str], modules: Sequence[Module]) -> str:
    if len(sources) > 1:
        return f"stacked from {len(sources)}" if len(targets) == 1 else "cut and stacked anew"
    if len(targets) > 1:
        return f"cut in {len(targets)}"
    cut = modules[0].cut
    if cut.renames:
        return "same name" if sources == targets else RENAMED
    if cut.transposed:
        return "transposed"
    if any(part.source is None for part in cut.parts):
        return "stacked with rows of zeros"
    return "rows reordered" if len(cut.parts) > 1 else "some of its rows"
