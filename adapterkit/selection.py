"""Selecting parts of an adapter by what people call them: components, blocks, names with wildcards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Literal, TypeVar

from adapterkit.blocks import block_of, blocks_of
from adapterkit.errors import Json, UsageError
from adapterkit.specs.families import Family, Place
from adapterkit.specs.names import Piece, network

if TYPE_CHECKING:
    from adapterkit.deltas import Change

Key = TypeVar("Key")
Reading = Literal["component", "block", "canonical", "native", "file", "any"]

# The order in which a text is tried: the first reading that anything answers to holds.
_READINGS: tuple[Reading, ...] = ("component", "block", "canonical", "native", "file")


@dataclass(frozen=True)
class Module:
    """A canonical module that a change acts on, and what the file calls the change, if that is known."""

    component: str
    name: str
    param: str = "weight"
    file: str = ""


@dataclass(frozen=True)
class Selector:
    """A text read as names of one sort; `*`, `?` and `[…]` stand for any characters, dots included.

    component: "text_encoder", "text_encoder*".  block: "IN04", "IN*", "IN04-IN08".
    canonical: a module's canonical name, or the beginning of it up to a dot, with its component or
    without, and with `.weight` or `.bias` for one tensor of it.  native: the same in another naming of
    the network.  file: the module's name in the file.  any: all of these, where nothing tells which.
    """

    family: Family
    text: str
    reading: Reading

    def matches(self, module: Module) -> bool:
        match self.reading:
            case "component":
                return fnmatchcase(module.component, self.text)
            case "block":
                return _is_block(self.family, self.text, block_of(self.family, module.component, module.name))
            case "canonical":
                return self._is_named(module, module.name)
            case "native":
                names = _natives(self.family.components[module.component], module.name)
                return any(self._is_named(module, name) for name in names)
            case "file":
                return _begins(module.file, self.text)
            case "any":
                return any(replace(self, reading=reading).matches(module) for reading in _READINGS)

    def _is_named(self, module: Module, name: str) -> bool:
        if _begins(name, self.text) or _begins(f"{module.component}.{name}", self.text):
            return True
        # Only a text that ends so can mean one tensor of a module.
        tail = f".{module.param}"
        stem = self.text.removesuffix(tail)
        return stem != self.text and any(
            fnmatchcase(full, stem) for full in (name, f"{module.component}.{name}")
        )


def select(text: str, family: Family, modules: Collection[Module]) -> Selector:
    """What `text` means among these modules; UsageError, with near names, if it means nothing.

    Without modules, for a model without a table, it may mean anything.
    """
    if not modules:
        return Selector(family, text, "any")
    for reading in _READINGS:
        selector = Selector(family, text, reading)
        if any(map(selector.matches, modules)):
            return selector
    raise no_match(text, _near(text, family, modules))


def every_module(family: Family) -> tuple[Module, ...]:
    """All modules of the family's networks; () where one has no table, and any name may be right."""
    return _every_module(family)


def modules_of(place: Place, file: str = "") -> tuple[Module, ...]:
    """What a place is made of, piece by piece."""
    return tuple(Module(place.component, piece.module, place.param, file) for piece in place.span)


def no_match(text: str, known: Iterable[str]) -> UsageError:
    """The error that a text selects nothing."""
    # People write blocks in small letters.
    names = {name.casefold(): name for name in known}
    near = [names[name] for name in get_close_matches(text.casefold(), names, n=3)]
    hint = "name a component, a block or a module; `*` stands for any part of a name"
    if near:
        hint = f"did you mean {' or '.join(f'`{name}`' for name in near)}?"
    return UsageError(
        f"`{text}` matches nothing", code="no-match", hint=hint, details={"near": list[Json](near)}
    )


def divided(
    place: Place, changes: Sequence[Change], key: Callable[[Piece], Key]
) -> Iterator[tuple[Place, tuple[Change, ...], Key]]:
    """The place as it is where its pieces have one key, else the stretches that have, cut exactly.

    Raises Unrepresentable for changes whose rows cannot be told apart.
    """
    from adapterkit.recut import Source, stretches

    keys = [key(piece) for piece in place.span]
    if len(set(keys)) == 1:
        yield place, tuple(changes), keys[0]
        return
    cuts = [list(stretches(Source(place, change))) for change in changes]
    for found, group in groupby(range(len(keys)), lambda index: keys[index]):
        indices = list(group)
        first, last = indices[0], indices[-1]
        taken = tuple(
            change.take(cut[first].first, cut[last].first + cut[last].height)
            for change, cut in zip(changes, cuts, strict=True)
        )
        yield Place(place.component, place.span[first : last + 1], place.param), taken, found


def _begins(name: str, text: str) -> bool:
    """Whether a name is what the text says, or lies under it."""
    return fnmatchcase(name, text) or fnmatchcase(name, f"{text}.*")


def _is_block(family: Family, text: str, label: str) -> bool:
    if fnmatchcase(label, text):
        return True
    blocks = blocks_of(family)
    first, dash, last = text.partition("-")
    if not dash or blocks is None or not {first, last, label} <= set(blocks.labels):
        return False
    at = blocks.labels.index
    return min(at(first), at(last)) <= at(label) <= max(at(first), at(last))


@cache
def _natives(network_name: str, module: str) -> tuple[str, ...]:
    """What the other namings of a network call the rows of a module."""
    if network_name == "*":
        return ()
    known = network(network_name)
    return tuple(
        dict.fromkeys(
            row.native
            for name, naming in known.namings.items()
            if name != known.canonical
            for row in naming.covering(module)
        )
    )


@cache
def _every_module(family: Family) -> tuple[Module, ...]:
    found: list[Module] = []
    for component in family.components:
        known = family.network(component)
        if known is None:
            return ()
        for row in known.namings[known.canonical].rows:
            name = row.span[0].module
            params = ("weight", "bias") if f"{name}.bias" in known.shapes else ("weight",)
            found += [Module(component, name, param) for param in params]
    return tuple(found)


def _near(text: str, family: Family, modules: Collection[Module]) -> Iterator[str]:
    """Every name that could have been meant; of modules' names the beginnings with as many dots."""
    parts = text.count(".") + 1
    for module in modules:
        yield module.component
        yield block_of(family, module.component, module.name)
        yield ".".join(module.name.split(".")[:parts])
        yield module.file
