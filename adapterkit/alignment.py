"""An adapter on the lines of a target: every change on the rows of one of its tensors.

Ranks are counted per tensor of the file. Whoever chooses them has to see the tensors that will be
written: three ranks of a split q, k and v are not one rank of the fused layer.
"""

from __future__ import annotations

from dataclasses import replace

from adapterkit.adapter import Adapter
from adapterkit.deltas import Change
from adapterkit.recut import Preparation, recut, sources_of
from adapterkit.scale import Scale
from adapterkit.specs.families import Place, Prefix, Target
from adapterkit.specs.layouts import layouts


def own_target(adapter: Adapter) -> Target:
    """The target that is nearest to the file the adapter came from.

    Of the targets in its layout the one that names most of its modules as the file does.
    """
    family = adapter.family
    names = [name for name in family.target_names() if family.target(name).layout in adapter.layouts[:1]]
    targets = [family.target(name) for name in names or family.target_names()]
    # A variation of a layout is meant only where it names more modules than the layout itself.
    return max(targets, key=lambda target: (_shared_names(adapter, target), target.name == _plain(target)))


def _plain(target: Target) -> str:
    return target.layout.replace("_", "-")


def _shared_names(adapter: Adapter, target: Target) -> int:
    dot = layouts()[target.layout].dot
    return sum(
        native == _native(adapter, target.prefixes[place.component], place, dot)
        for place, native in adapter.natives.items()
        if place.component in target.prefixes
    )


def _native(adapter: Adapter, prefix: Prefix, place: Place, dot: str) -> str | None:
    row = adapter.family.names(place.component, prefix.naming).at(place.span, place.param)
    return None if row is None else prefix.text + row.native.replace(".", dot)


def aligned(adapter: Adapter, target: Target, *, as_lora: bool = False) -> Adapter:
    """The same changes on the rows of `target`'s tensors; exact, see `adapterkit.recut`.

    as_lora: expand every kind that has an exact low-rank form.  Changes that the target has no name
    for stay where they are, for the plan to refuse.
    Raises Unrepresentable where a change cannot be cut so.
    """
    found: dict[Place, list[Change]] = {}
    natives: dict[Place, str] = {}
    scales: dict[Place, Scale] = {}
    for component in adapter.components:
        prefix = target.prefixes.get(component)
        sources = [
            source
            for place, changes in adapter.changes.items()
            if place.component == component
            for source in sources_of(place, changes, Preparation(expand=as_lora))
        ]
        if prefix is None:
            for source in sources:
                found.setdefault(source.place, []).append(source.change)
            continue
        cuts = recut(sources, adapter.family.names(component, prefix.naming))
        for source in cuts.nameless:
            found.setdefault(source.place, []).append(source.change)
        for cut in cuts.cuts:
            change = cut.make()
            if change is None:
                continue
            place = Place(component, cut.row.span, cut.param)
            found.setdefault(place, []).append(change)
            first = cut.sources[0].place
            natives.setdefault(place, prefix.text + cut.row.native.replace(".", layouts()[target.layout].dot))
            if first in adapter.scales:
                scales.setdefault(place, adapter.scales[first])
    return replace(
        adapter,
        changes={place: tuple(changes) for place, changes in found.items()},
        natives={**adapter.natives, **natives},
        scales={**adapter.scales, **scales},
    )
