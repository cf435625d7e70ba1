"""Several adapters as adapters of one base model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Union

from adapterkit.errors import Json, Mismatch, located
from adapterkit.operations.sources import Opened, Source, open
from adapterkit.scale import ScaleFrom
from adapterkit.specs.families import Family
from adapterkit.stores import Store

if TYPE_CHECKING:
    from adapterkit.adapter import Adapter

Given = Union[Source, "Adapter"]
Found = Union[Opened, "Adapter"]


def alike(sources: Sequence[Given], names: Sequence[str], family: str | None = None) -> list[Found]:
    """Each opened as an adapter of one base model; adapters in memory are what they are.

    That is the model of the first; where they differ, the first model that explains every one of them
    as well as any other does.
    names: for the message of Mismatch, which is raised if there is none.
    """
    with ExitStack() as stack:
        found = [_opened(source, family, stack) for source in sources]
        models = [_families(one) for one in found]
        if len({candidates[0].key for candidates in models}) > 1:
            common = _common(models, names).key
            found = [open(one, family=common) if isinstance(one, Opened) else one for one in found]
        stack.pop_all()
        return found


def loaded(found: Found, *, allow: Collection[str] = (), scale_from: ScaleFrom | None = None) -> Adapter:
    """The adapter in it; messages of what goes wrong say where."""
    if not isinstance(found, Opened):
        return found
    with located(found.store.label):
        return found.load(allow=allow, scale_from=scale_from)


def names_of(sources: Sequence[Given]) -> tuple[str, ...]:
    """What each is called: its file without the folder, numbered where several are called the same."""
    names = [name_of(source) or f"input {number}" for number, source in enumerate(sources, 1)]
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if names.count(name) == 1 else f"{name} ({seen[name]})")
    return tuple(unique)


def name_of(source: object) -> str:
    """The file or folder of a source, without the folder it is in; "" in memory."""
    if isinstance(source, str | Path):
        return Path(source).resolve().name
    store = source if isinstance(source, Store) else getattr(source, "store", None)
    path = store.path if isinstance(store, Store) else None
    return path.name if path is not None else ""


def _opened(source: Given, family: str | None, stack: ExitStack) -> Found:
    from adapterkit.adapter import Adapter

    if isinstance(source, Adapter):
        return source
    opened = open(source, family=family)
    if opened.store is not source and opened is not source:
        stack.callback(opened.close)
    return opened


def _families(found: Found) -> list[Family]:
    if not isinstance(found, Opened):
        return [found.family]
    explanation = found.explanation
    return [explanation.family, *(candidate.family for candidate in explanation.equals)]


def _common(models: Sequence[Sequence[Family]], names: Sequence[str]) -> Family:
    keys = [{family.key for family in candidates} for candidates in models]
    for family in models[0]:
        if not family.open and all(family.key in known for known in keys):
            return family
    labels = [
        f"`{name}` is for {candidates[0].label}" for name, candidates in zip(names, models, strict=True)
    ]
    raise Mismatch(
        ", ".join(labels),
        code="families",
        hint="say --family if one of them was taken for the wrong base model",
        details={"families": list[Json]([candidates[0].key for candidates in models])},
    )
