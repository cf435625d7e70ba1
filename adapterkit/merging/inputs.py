"""The adapters to be merged, with their strengths, and what each does at one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from adapterkit.adapter import Adapter
from adapterkit.deltas import Change
from adapterkit.specs.families import Place


@dataclass(frozen=True, eq=False)
class Input:
    """One adapter, its changes on the lines of the output (see `adapterkit.alignment`).

    name: for messages, reports and the metadata of the result; no two inputs have the same.
    Strengths of blocks are in its changes already: they are part of what the adapter is.
    """

    name: str
    adapter: Adapter
    strength: float = 1.0


@dataclass(frozen=True, eq=False)
class Contribution:
    """What one input changes at one place, and how strongly; the strength is not 0."""

    name: str
    native: str
    changes: tuple[Change, ...]
    strength: float

    @property
    def where(self) -> str:
        """For messages: the module's name in its file, and which file."""
        return f"`{self.native}` of `{self.name}`"

    @property
    def needs_base(self) -> bool:
        return any(change.needs_base for change in self.changes)


def contributions(inputs: Sequence[Input], place: Place) -> list[Contribution]:
    """What the inputs change at a place, in their order; a place that one has not is zero there."""
    return [
        Contribution(one.name, one.adapter.natives.get(place, place.span[0].module), changes, one.strength)
        for one in inputs
        if one.strength != 0.0 and (changes := one.adapter.changes.get(place))
    ]


def places(inputs: Sequence[Input]) -> tuple[Place, ...]:
    """Every place that one of the inputs changes, those of the first input first."""
    return tuple(dict.fromkeys(place for one in inputs for place in one.adapter.changes))


def natives(inputs: Sequence[Input]) -> dict[Place, str]:
    """A name for every place: that of the first input that has it."""
    found: dict[Place, str] = {}
    for one in reversed(inputs):
        found |= one.adapter.natives
    return found
