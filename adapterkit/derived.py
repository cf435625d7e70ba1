"""An adapter whose changes were computed, not read: what merge, extract, resize and slice make."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from adapterkit.adapter import Adapter
from adapterkit.deltas import Change, Magnitude
from adapterkit.errors import Json
from adapterkit.scale import Scale
from adapterkit.specs.families import Place

PROVENANCE = "adapterkit"


def derived(
    adapter: Adapter,
    changes: Mapping[Place, Sequence[Change]],
    *,
    operation: str,
    facts: Mapping[str, Json],
    natives: Mapping[Place, str] | None = None,
) -> Adapter:
    """`adapter` with other changes, and metadata that says how they came about.

    operation, facts: what was done; they stand under the metadata key `adapterkit`, after what
    earlier operations left there. Facts name files without their folders and hold no dates, so that
    the same request writes the same bytes.
    natives: names for messages of places that the adapter did not have.
    """
    kept = {place: tuple(several) for place, several in changes.items() if several}
    return replace(
        adapter,
        changes=kept,
        metadata={**adapter.metadata, PROVENANCE: history(adapter.metadata, operation, facts)},
        scales={place: scale for place in kept if (scale := _scale(adapter, place, kept[place])) is not None},
        natives={**adapter.natives, **(natives or {})},
        keys={
            place: keys
            for place, keys in adapter.keys.items()
            if place in kept and kept[place] == adapter.changes.get(place)
        },
        computed=True,
    )


def _scale(adapter: Adapter, place: Place, changes: Sequence[Change]) -> Scale | None:
    """The scale of what is there now: as it was read, or that of the new factors."""
    before = adapter.scales.get(place)
    if before is not None and changes == adapter.changes.get(place):
        return before
    for change in changes:
        inner = change.inner if isinstance(change, Magnitude) else change
        value: float | None = getattr(inner, "scale", None)
        if value is not None and inner.rank:
            return Scale(value, value * inner.rank, before.source if before is not None else "computed")
    return before


def history(metadata: Mapping[str, str], operation: str, facts: Mapping[str, Json]) -> str:
    """What was done to a file, oldest first, as JSON: for its metadata, under PROVENANCE."""
    steps = [*_earlier(metadata.get(PROVENANCE, "")), {"operation": operation, **facts}]
    return json.dumps(steps, ensure_ascii=True, sort_keys=True, separators=(",", ":"))


def _earlier(text: str) -> list[Json]:
    """The steps that are written down already; nothing if the text is not ours."""
    try:
        found = json.loads(text)
    except ValueError:
        return []
    return found if isinstance(found, list) else []
