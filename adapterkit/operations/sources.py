"""What an operation may be given: a path, an open store, or a state dict in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Union

from adapterkit.detect import Explanation, explain
from adapterkit.scale import ScaleFrom
from adapterkit.stores import Store, memory_store, open_store

if TYPE_CHECKING:
    from torch import Tensor

    from adapterkit.adapter import Adapter

Source = Union[str, Path, Store, "Mapping[str, Tensor]"]


def store_of(source: Source) -> Store:
    """The store behind a source; a path is opened by its content, a state dict is wrapped."""
    if isinstance(source, Store):
        return source
    if isinstance(source, str | Path):
        return open_store(source)
    return memory_store(source)


def explained(source: Source, family: str | None = None) -> tuple[Store, Explanation]:
    """A source's store with what it is."""
    store = store_of(source)
    return store, explain(store, family_name=family)


def load(
    source: Source,
    *,
    family: str | None = None,
    allow: Collection[str] = (),
    scale_from: ScaleFrom | None = None,
) -> Adapter:
    """Read an adapter of any known format.

    source: a path (file, PEFT folder, sharded index), an open store, or a state dict.
    family: the base model, where the file alone does not tell.
    allow: consents to leave tensors out ("unclaimed", "incomplete").
    scale_from: "alpha" or "config", which holds when both are there and differ.
    Raises Unrecognized, Refused, Conflict, Mismatch or StoreError.
    """
    from adapterkit.adapter import read_adapter

    store, explanation = explained(source, family)
    return read_adapter(store, explanation, allow=allow, scale_from=scale_from)
