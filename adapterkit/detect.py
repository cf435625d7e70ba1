"""What is this file? The family and layout that explain the largest share of its tensors.

There is no ordered chain of guesses: every family is asked about every tensor name, by look-up,
and the shares are compared. Shapes, then metadata, decide between families that know the same
names. Headers suffice; no tensor is read and torch is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adapterkit.claims import Candidate, Claim, candidate, choose, claims_of, shape_of
from adapterkit.errors import Ambiguous, Json
from adapterkit.specs.families import Family, Located, Place, families, family
from adapterkit.specs.kinds import KINDS
from adapterkit.specs.layouts import Layout, Spelling, layouts
from adapterkit.specs.wrappers import wrappers
from adapterkit.stores import Store, TensorInfo
from adapterkit.unrecognized import unrecognized

# A table that knows this share of a file beats a family that takes any name as it is. Below it,
# the file is another model's that happens to share names (HunyuanVideo has 93 % of FLUX.1's).
_CLOSED_ENOUGH = 0.97
# A family that knows less of a file than this shares some names with it by chance.
_TOO_LITTLE = 0.1


@dataclass(frozen=True, slots=True)
class Role:
    """One tensor of a change: its key in the file and how the layout spells it."""

    key: str
    spelling: Spelling


@dataclass(frozen=True)
class Entry:
    """One change of one place, as the header shows it.

    native: the module's name as the file has it, prefix included.  path: without the prefix.
    """

    place: Place
    layout: str
    prefix: str
    naming: str
    native: str
    path: str
    kind: str
    roles: Mapping[str, Role]
    modifiers: Mapping[str, Role]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(role.key for role in (*self.roles.values(), *self.modifiers.values()))


@dataclass(frozen=True, slots=True)
class Incomplete:
    """Tensors of a known module that make no whole change: an up without its down."""

    native: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Explanation:
    """What a file is: the family, the layouts, and where each tensor belongs.

    entries, incomplete, passengers and unclaimed together hold every tensor exactly once.
    equals: other families that explain the file as well as this one.  nearest: the best
    candidates, best first.  adapter_names: names found in slots (`default`).
    stripped: how many keys had wrapper names taken away.  misfits: modules whose sizes are not the base's.
    """

    family: Family
    layouts: tuple[str, ...]
    share: float
    shapes: float | None
    entries: tuple[Entry, ...]
    incomplete: tuple[Incomplete, ...]
    passengers: Mapping[str, str]
    unclaimed: tuple[str, ...]
    equals: tuple[Candidate, ...] = ()
    nearest: tuple[Candidate, ...] = ()
    adapter_names: tuple[str, ...] = ()
    stripped: int = 0
    misfits: tuple[str, ...] = ()

    @property
    def layout(self) -> Layout:
        """The layout of most tensors."""
        return layouts()[self.layouts[0]]

    def decided(self, path: str, target: str) -> Explanation:
        """This explanation, if every other that is as good would be written the same as `target`.

        Raises Ambiguous if one would not.
        """
        others = [c for c in self.equals if not self._same_result(c.family, target)]
        if not others:
            return self
        names = sorted({self.family.name, *(c.family.name for c in others)})
        raise Ambiguous(
            f"{path}: {' and '.join(names)} explain it equally well",
            hint=f"say which with --family {names[0]}",
            details={"families": list[Json](names)},
        )

    def _same_result(self, other: Family, target: str) -> bool:
        """Whether `other` finds the same rows for every entry, and the target calls them the same."""
        if target not in other.target_names() or target not in self.family.target_names():
            return False
        ours, theirs = self.family.target(target).prefixes, other.target(target).prefixes
        for entry in self.entries:
            component = entry.place.component
            if ours.get(component) != theirs.get(component):
                return False
            found = other.locate(entry.layout, layouts()[entry.layout].dot, entry.native)
            if not any(f.prefix.component == component and f.row.span == entry.place.span for f in found):
                return False
        return True


def explain(store: Store, *, family_name: str | None = None) -> Explanation:
    """Explain a file from its header.

    family_name: consider only this family (or this size of one).
    Raises Unrecognized, with the nearest candidates, if nothing explains any tensor.
    """
    strip = wrappers().strip
    plain = [(key, strip(key)) for key in store.tensors]
    considered = family(family_name) if family_name else families()
    asked = family_name is not None
    ranked = _ranked(considered, plain, store, sample=True, asked=asked)
    if not ranked or ranked[0][0].share < 1:
        # An odd file: a few keys of another layout may have slipped through the sample.
        ranked = _ranked(considered, plain, store, sample=False, asked=asked)
    nearest = tuple(c for c, _ in ranked if c.fits)[:3]
    if not asked:
        ranked = [c for c in ranked if c[0].plausible and c[0].share >= _TOO_LITTLE]
    if not ranked:
        raise unrecognized(store, plain, nearest)
    best, claims = ranked[0]
    others = [c for c, _ in ranked[1:] if c.rank == best.rank]
    result = _explanation(best.family, claims, store)
    return replace(
        result,
        share=best.share,
        shapes=best.shapes,
        misfits=best.misfits,
        # Sizes of one model know the same names; the smallest that explains all will do.
        equals=tuple(c for c in others if c.family.name != best.family.name),
        nearest=nearest,
        stripped=sum(key != bare for key, bare in plain),
    )


def _ranked(
    considered: Sequence[Family], keys: Sequence[tuple[str, str]], store: Store, *, sample: bool, asked: bool
) -> list[tuple[Candidate, list[Claim]]]:
    """The candidates, best first."""
    claims = claims_of(considered, keys, sample=sample)
    found = [c for f in considered if (c := candidate(f, claims.get(f, []), store, asked=asked))]
    return _prefer_tables(sorted(found, key=lambda c: c[0].rank, reverse=True))


def _prefer_tables(ranked: list[tuple[Candidate, list[Claim]]]) -> list[tuple[Candidate, list[Claim]]]:
    """Put families with tables before open ones, if a table knows nearly all of the file."""
    closed = [c for c in ranked if not c[0].family.open]
    opened = [c for c in ranked if c[0].family.open]
    if closed and (closed[0][0].share >= _CLOSED_ENOUGH or not opened):
        return closed + opened
    return (
        opened + closed
        if opened and (not closed or opened[0][0].share > closed[0][0].share)
        else closed + opened
    )


def _explanation(family: Family, claims: Sequence[Claim], store: Store) -> Explanation:
    entries: list[Entry] = []
    incomplete: list[Incomplete] = []
    passengers: dict[str, str] = {}
    taken: set[str] = set()
    for claim in claims:
        for key in store.tensors:
            if key not in taken and (what := claim.keys.layout.passenger(key)):
                passengers[key] = what
                taken.add(key)
        for stem, rows in claim.located.items():
            spelled = [item for item in claim.keys.modules.get(stem, ()) if item[0] not in taken]
            if stem in claim.keys.bare and stem not in taken:
                entries.append(_bare(rows[0], claim.keys.layout, stem))
                taken.add(stem)
            if spelled:
                located = choose(family, rows, shape_of(spelled, store.tensors))
                made, left = _entries(located, claim.keys.layout, stem, spelled, store.tensors)
                entries += made
                if left:
                    incomplete.append(Incomplete(stem, left))
                taken.update(key for key, _ in spelled)
    return Explanation(
        family=family,
        layouts=tuple(claim.keys.layout.name for claim in claims),
        share=0.0,
        shapes=None,
        entries=tuple(entries),
        incomplete=tuple(incomplete),
        passengers=passengers,
        unclaimed=tuple(key for key in store.tensors if key not in taken),
        adapter_names=tuple(sorted({name for claim in claims for name in claim.keys.adapter_names})),
    )


def _bare(located: Located, layout: Layout, key: str) -> Entry:
    """A tensor under its own full name: it replaces the base's."""
    place = Place(located.prefix.component, located.row.span, located.row.param or "")
    roles = {"value": Role(key, Spelling("set", "value", ""))}
    text = located.prefix.text
    return Entry(place, layout.name, text, located.prefix.naming, key, key[len(text) :], "set", roles, {})


def _entries(
    located: Located,
    layout: Layout,
    stem: str,
    spelled: Sequence[tuple[str, tuple[Spelling, ...]]],
    tensors: Mapping[str, TensorInfo],
) -> tuple[list[Entry], tuple[str, ...]]:
    """The whole changes that a module's tensors make, and the keys that make none."""
    modifiers: dict[str, Role] = {}
    options: dict[tuple[str, str], dict[str, Role]] = {}
    for key, spellings in spelled:
        for s in spellings:
            if s.ndim and s.ndim != len(tensors[key].shape):
                continue
            if not s.kind:
                modifiers[s.role] = Role(key, s)
            else:
                options.setdefault((s.kind, s.param), {})[s.role] = Role(key, s)
    entries: list[Entry] = []
    free = {key for key, _ in spelled} - {role.key for role in modifiers.values()}
    prefix = located.prefix
    for (kind, param), roles in sorted(options.items(), key=lambda item: -len(item[1])):
        usable = {name: role for name, role in roles.items() if role.key in free}
        if not any(required <= usable.keys() for required in KINDS[kind].required):
            continue
        free -= {role.key for role in usable.values()}
        own = located.row.param if located.row.param is not None else param
        entries.append(
            Entry(
                place=Place(prefix.component, located.row.span, own),
                layout=layout.name,
                prefix=prefix.text,
                naming=prefix.naming,
                native=stem,
                path=stem[len(prefix.text) :],
                kind=kind,
                roles=usable,
                # They belong to the change of most tensors, not to a replacement beside it.
                modifiers=modifiers if param == "weight" and not any(e.modifiers for e in entries) else {},
            )
        )
    if modifiers and not any(entry.modifiers for entry in entries):
        free |= {role.key for role in modifiers.values()}
    return entries, tuple(key for key, _ in spelled if key in free)
