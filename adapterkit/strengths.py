"""Strengths by component, block or module: `0.8`, `OUTD`, `1,0,0,…`, `IN*=0.5,text_encoder=0`."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.blocks import Blocks, blocks_of
from adapterkit.errors import Unrepresentable, UsageError, located
from adapterkit.selection import Module, Selector, divided, every_module, modules_of, no_match, select
from adapterkit.specs.families import Family, Place

if TYPE_CHECKING:
    from adapterkit.deltas import Change


@dataclass(frozen=True)
class Strengths:
    """The strength of each module: that of the last entry that selects it, 1 where none does."""

    entries: tuple[tuple[Selector, float], ...] = ()

    def of(self, module: Module) -> float:
        """The strength of one canonical module."""
        return next((value for selector, value in reversed(self.entries) if selector.matches(module)), 1.0)

    def at(self, place: Place, file: str = "") -> float:
        """The strength of a place.

        file: what the file calls it, for entries that are names of the file.
        Raises Unrepresentable where parts of a fused tensor differ; `at_strengths` cuts them first.
        """
        values = {module.name: self.of(module) for module in modules_of(place, file)}
        if len(set(values.values())) == 1:
            return next(iter(values.values()))
        shown = ", ".join(f"`{name}` {value:g}" for name, value in values.items())
        raise Unrepresentable(
            f"parts of one tensor have strengths of their own: {shown}",
            code="strength-parts",
            hint="convert it first to a format that keeps them apart, such as diffusers",
        )


def parse_strengths(text: str, family: Family, modules: Collection[Module] | None = None) -> Strengths:
    """Strengths as people write them.

    text: entries with commas between them, of which the last that selects a module holds: a preset
    ("OUTD"), or NAME=NUMBER where NAME is a component, a block or a name with wildcards (see
    `selection.Selector`). Or only numbers: one for everything, or one for each block of the family in
    the community's order, which is told by their count; blocks that an order lacks get 0.
    modules: what the names are looked for in; every module of the family's tables if None.
    Raises UsageError for names that select nothing, lists of another length, and what is no number.
    """
    entries = [entry.strip() for entry in text.split(",")] if text.strip() else []
    if entries and all(map(_is_number, entries)):
        return _listed([_number(entry) for entry in entries], family)
    known = every_module(family) if modules is None else modules
    found: list[tuple[Selector, float]] = []
    for entry in entries:
        found += _entry(entry, family, known)
    return Strengths(tuple(found))


def specs_of(texts: Sequence[str], count: int) -> list[list[str]]:
    """The strengths of the parts of each of `count` adapters, from `SPEC` for all or `N:SPEC` for the N-th.

    They stay in their order. UsageError where there is no N-th adapter.
    """
    found: list[list[str]] = [[] for _ in range(count)]
    for text in texts:
        number, colon, rest = text.partition(":")
        if not (colon and number.strip().isascii() and number.strip().isdecimal()):
            for entries in found:
                entries.append(text)
        elif 1 <= int(number) <= count:
            found[int(number) - 1].append(rest)
        else:
            raise UsageError(
                f"`{text}`: there is no input {int(number)}",
                code="strengths",
                hint=f"there are {count}; N:SPEC is for the N-th, SPEC for all",
            )
    return found


def at_strengths(
    changes: Mapping[Place, Sequence[Change]], strengths: Strengths, natives: Mapping[Place, str]
) -> dict[Place, tuple[Change, ...]]:
    """The changes at their strengths, exactly; those at 0 are left out.

    A fused tensor whose parts have strengths of their own is cut into them.
    Raises Unrepresentable for changes that are not linear in their strength or cannot be cut.
    """
    found: dict[Place, tuple[Change, ...]] = {}
    for place, several in changes.items():
        file = natives.get(place, "")
        with located(f"`{file or place.span[0].module}`"):
            found.update(_at(place, several, strengths, file))
    return found


def _at(
    place: Place, changes: Sequence[Change], strengths: Strengths, file: str
) -> Iterator[tuple[Place, tuple[Change, ...]]]:
    from adapterkit.deltas.strength import at_strength

    values = {module.name: strengths.of(module) for module in modules_of(place, file)}
    for part, taken, value in divided(place, changes, lambda piece: values[piece.module]):
        scaled = [at_strength(change, value) for change in taken]
        if left := tuple(change for change in scaled if change is not None):
            yield part, left


def _entry(entry: str, family: Family, modules: Collection[Module]) -> Iterator[tuple[Selector, float]]:
    blocks = blocks_of(family)
    presets = blocks.presets if blocks is not None else {}
    if blocks is not None and entry in presets:
        yield from _listed(presets[entry], family).entries
        return
    name, equals, number = entry.rpartition("=")
    if not equals:
        if _is_number(entry):
            raise UsageError(
                f"`{entry}` stands alone among named strengths",
                code="strengths",
                hint="write NAME=NUMBER, or numbers only",
            )
        raise no_match(entry, presets)
    if not _is_number(number):
        raise UsageError(
            f"`{number}` in `{entry}` is not a number", code="strengths", hint="write NAME=NUMBER"
        )
    yield select(name, family, modules), _number(number)


def _listed(weights: Sequence[float], family: Family) -> Strengths:
    """Weights by their places in the family's order of that length."""
    if len(weights) == 1:
        return Strengths(((Selector(family, "*", "component"), weights[0]),))
    blocks = blocks_of(family)
    order = blocks.order(len(weights)) if blocks is not None else None
    if blocks is None or order is None:
        raise _wrong_length(len(weights), blocks, family)
    by_block = dict.fromkeys(blocks.labels, 0.0) | dict(zip(order, weights, strict=True))
    return Strengths(tuple((Selector(family, label, "block"), value) for label, value in by_block.items()))


def _wrong_length(length: int, blocks: Blocks | None, family: Family) -> UsageError:
    orders = blocks.orders.values() if blocks is not None else ()
    lists = " or ".join(f"{len(order)} ({order[0]}, {order[1]}, … {order[-1]})" for order in orders)
    return UsageError(
        f"{length} numbers are no list of block weights for {family.label}",
        code="strengths",
        hint=f"give {lists}, or NAME=NUMBER" if lists else "no lists are known for it; write NAME=NUMBER",
        details={"lengths": [len(order) for order in orders]},
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise UsageError(
            f"a strength of {text} is no number", code="strength-value", hint="write a finite number"
        )
    return value
