"""Which family knows which of a file's keys, in which layouts.

Every family is asked about every key, by look-up; a claim is what one family makes of a file as
one layout splits it. Headers suffice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

from adapterkit.specs.families import Family, Located
from adapterkit.specs.kinds import KINDS
from adapterkit.specs.layouts import Layout, Spelling, layouts
from adapterkit.specs.wrappers import strip_adapter_name
from adapterkit.stores import Store, TensorInfo

_SAMPLE = 24
# A flattened or widened layer here and there is the same model still; other sizes throughout are another.
_FITTING = 0.5
# HunyuanVideo shares 57 % of its flattened names with FLUX.1, Chroma with its own layers 95 %.
_FOREIGN = 0.25


@dataclass(frozen=True, slots=True)
class Candidate:
    """One family's claim on a file, with what it rests on.

    share: explained tensors of all.  dimensions, shapes: the share of checked modules whose
    number of dimensions, and whose sizes, are the base model's (None: none was checked).
    small: no size is more.  misfits: checked modules whose sizes are not the same.
    foreign: the share of modules, in the layout that explains most, that the family does not have.
    evidence: metadata agrees.
    prefixed: the share of modules under a prefix that says what they are, not bare names.
    """

    family: Family
    layouts: tuple[str, ...]
    share: float
    dimensions: float
    shapes: float | None
    small: bool
    misfits: tuple[str, ...]
    foreign: float
    evidence: bool
    prefixed: float

    @property
    def rank(self) -> tuple[float, ...]:
        return (round(self.share, 6), self.dimensions, self.shapes or 0.0, self.evidence, self.prefixed)

    @property
    def fits(self) -> bool:
        """Whether the sizes can be this model's."""
        return self.shapes is None or self.shapes >= _FITTING

    @property
    def plausible(self) -> bool:
        """Whether this can be the file's model: most of its modules exist there, in these sizes.

        A small copy of a model, as tests have them, has its names in smaller sizes.
        """
        return (self.fits or self.small) and self.foreign <= _FOREIGN


@dataclass
class Keys:
    """A file's keys as one layout splits them: per module name, what each tensor can be."""

    layout: Layout
    modules: dict[str, list[tuple[str, tuple[Spelling, ...]]]] = field(default_factory=dict)
    bare: list[str] = field(default_factory=list)
    adapter_names: set[str] = field(default_factory=set)

    @cached_property
    def stems(self) -> tuple[str, ...]:
        return (*self.modules, *self.bare)


def split(keys: Iterable[tuple[str, str]], layout: Layout) -> Keys:
    """Split every key at its suffix; `keys` are pairs (as in the file, without wrappers)."""
    found = Keys(layout)
    slots = frozenset(layout.slots)
    for key, plain in keys:
        if slots and any(slot in plain for slot in slots):
            plain, name = strip_adapter_name(plain, slots)
            if name:
                found.adapter_names.add(name)
        parted = layout.split(plain)
        if parted is not None:
            found.modules.setdefault(parted[0], []).append((key, parted[1]))
        elif layout.bare:
            found.bare.append(key)
    if any(spelling.needs for spelling in layout.spellings):
        _drop_unmeant(found)
    return found


def _drop_unmeant(keys: Keys) -> None:
    """Take away what suffixes cannot mean because another role is missing beside them."""
    for stem, items in list(keys.modules.items()):
        if any(option.needs for _, options in items for option in options):
            roles = {(option.kind, option.role) for _, options in items for option in options}
            meant = [
                (key, kept)
                for key, options in items
                if (kept := tuple(o for o in options if not o.needs or (o.kind, o.needs) in roles))
            ]
            if meant:
                keys.modules[stem] = meant
            else:
                del keys.modules[stem]


@dataclass
class Claim:
    """What one family makes of one layout's modules."""

    keys: Keys
    located: dict[str, tuple[Located, ...]]

    @cached_property
    def claimed(self) -> set[str]:
        found = {key for stem in self.located for key, _ in self.keys.modules.get(stem, ())}
        return found | {stem for stem in self.keys.bare if stem in self.located}

    @cached_property
    def adapts(self) -> bool:
        """Whether there is more than replacements: a checkpoint of a model without a table is no adapter."""
        spelled = (options for stem in self.located for _, options in self.keys.modules.get(stem, ()))
        return any(option.kind != "set" for options in spelled for option in options)


def _claim(family: Family, keys: Keys) -> Claim:
    located = {}
    for stem in keys.modules:
        if rows := family.locate(keys.layout.name, keys.layout.dot, stem):
            located[stem] = rows
    for stem in keys.bare:
        rows = family.locate(keys.layout.name, keys.layout.dot, stem)
        if rows and rows[0].row.param is not None:
            located[stem] = rows
    return Claim(keys, located)


def _module_shape(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of the weight that the tensors of a change fit, where the header alone tells."""
    match kind:
        case "lora" if "mid" not in shapes:
            up, down = shapes["up"], shapes["down"]
            return (up[0], *down[1:]) if up and down else None
        case "lokr" if "w1" in shapes and "w2" in shapes:
            one, two = shapes["w1"], shapes["w2"]
            return (one[0] * two[0], one[1] * two[1], *two[2:]) if min(len(one), len(two)) > 1 else None
        case "glora" if "bm" not in shapes:
            up, down = shapes["b1"], shapes["b2"]
            return (up[0], *down[1:]) if up and down else None
        case "diff":
            return shapes["value"]
        case _:
            return None


def _base_shape(family: Family, located: Located) -> tuple[int, ...] | None:
    network = family.network(located.prefix.component)
    if network is None:
        return None
    return network.stacked_shape(located.row.span)


@dataclass(frozen=True, slots=True)
class _Fit:
    """Whether the number of dimensions, and the sizes, are those of the base weight, or no size more."""

    dimensions: bool
    sizes: bool
    small: bool


def _fit(family: Family, located: Located, shape: tuple[int, ...]) -> _Fit | None:
    base = _base_shape(family, located)
    if base is None:
        return None
    small = all(here <= there for here, there in zip(shape, base, strict=False))
    return _Fit(len(shape) == len(base), shape == base, small)


def shape_of(
    spelled: Sequence[tuple[str, tuple[Spelling, ...]]], tensors: Mapping[str, TensorInfo]
) -> tuple[int, ...] | None:
    for kind in ("lora", "lokr", "glora", "diff"):
        shapes = {
            s.role: tensors[key].shape
            for key, options in spelled
            for s in options
            if s.kind == kind and s.param == "weight"
        }
        if any(required <= shapes.keys() for required in KINDS[kind].required):
            return _module_shape(kind, shapes)
    return None


def choose(family: Family, rows: tuple[Located, ...], shape: tuple[int, ...] | None) -> Located:
    """The row meant by a name that several components know: the one whose base weight fits."""
    if len(rows) > 1 and shape is not None:
        for located in rows:
            if (fit := _fit(family, located, shape)) is not None and fit.sizes:
                return located
    return rows[0]


def claims_of(
    considered: Sequence[Family], keys: Sequence[tuple[str, str]], *, sample: bool
) -> dict[Family, list[Claim]]:
    """What each family claims of the keys, layout by layout.

    sample: ask first about a few keys spread over the file, and leave out a layout for a family that
    knows none of them, and a family that knows less than half of what the best one knows.
    """
    found: dict[Family, list[Claim]] = {}
    hopeful = [(layout, family) for layout in layouts().values() for family in _speakers(layout, considered)]
    if sample:
        hopeful = _hopeful(hopeful, keys[:: max(1, len(keys) // _SAMPLE)])
    for layout, pairs in groupby(hopeful, key=lambda pair: pair[0]):
        every = split(keys, layout)
        for _, family in pairs:
            found.setdefault(family, []).append(_claim(family, every))
    return found


def _speakers(layout: Layout, considered: Sequence[Family]) -> Iterable[Family]:
    return (family for family in considered if layout.name in family.spelling)


def _hopeful(
    pairs: Sequence[tuple[Layout, Family]], probe: Sequence[tuple[str, str]]
) -> list[tuple[Layout, Family]]:
    """The pairs that know something of a sample, of the families that know the most of it."""
    known: dict[tuple[Layout, Family], int] = {}
    for layout, grouped in groupby(pairs, key=lambda pair: pair[0]):
        few = split(probe, layout)
        for _, family in grouped:
            known[layout, family] = sum(
                bool(family.locate(layout.name, layout.dot, stem)) for stem in few.stems
            )
    best: dict[Family, int] = {}
    for (_, family), count in known.items():
        best[family] = max(best.get(family, 0), count)
    enough = max(best.values(), default=0) / 2
    return [pair for pair, count in known.items() if count and best[pair[1]] >= enough]


def candidate(
    family: Family, claims: list[Claim], store: Store, *, asked: bool = False
) -> tuple[Candidate, list[Claim]] | None:
    """The family's best explanation: the layout that claims most, then others for what is left.

    asked: the user named this family, so it need not be told from a stranger's.
    """
    chosen: list[Claim] = []
    explained: set[str] = set()
    left = list(claims)
    while left:
        best = max(left, key=lambda claim: len(claim.claimed - explained))
        if not best.claimed - explained:
            break
        chosen.append(best)
        explained |= best.claimed
        left.remove(best)
    if not chosen:
        return None
    carried = {key for claim in chosen for key in store.tensors if claim.keys.layout.passenger(key)}
    checked = [
        (stem, found)
        for claim in chosen
        for stem, rows in claim.located.items()
        if (shape := shape_of(claim.keys.modules.get(stem, ()), store.tensors)) is not None
        and (found := _fit(family, choose(family, rows, shape), shape)) is not None
    ]
    if family.open and not any(claim.adapts for claim in chosen):
        return None
    if not asked and (_is_checkpoint(chosen) or (family.open and _is_flat(chosen))):
        return None
    located = [rows for claim in chosen for rows in claim.located.values()]
    claimed = Candidate(
        family=family,
        layouts=tuple(claim.keys.layout.name for claim in chosen),
        share=len(explained | carried) / len(store.tensors),
        dimensions=sum(fit.dimensions for _, fit in checked) / len(checked) if checked else 0.0,
        shapes=sum(fit.sizes for _, fit in checked) / len(checked) if checked else None,
        small=bool(checked) and all(fit.small for _, fit in checked),
        misfits=tuple(stem for stem, fit in checked if not fit.sizes),
        foreign=_foreign(chosen[0], explained),
        evidence=_evidence(family, store.metadata),
        prefixed=sum(bool(rows[0].prefix.text) for rows in located) / len(located),
    )
    return claimed, chosen


def _foreign(claim: Claim, explained: set[str]) -> float:
    """The share of a claim's whole modules that neither it nor another claim has a name for."""
    whole = [
        items
        for items in claim.keys.modules.values()
        if any(option.kind not in {"", "set"} for _, options in items for option in options)
    ]
    unknown = sum(all(key not in explained for key, _ in items) for items in whole)
    return unknown / len(whole) if whole else 0.0


def _is_checkpoint(claims: Sequence[Claim]) -> bool:
    """Whether all that is known stands under a model's own names: a checkpoint has them, an adapter more."""
    return not any(stem in claim.keys.modules for claim in claims for stem in claim.located)


def _is_flat(claims: Sequence[Claim]) -> bool:
    """Whether most names have neither a prefix nor a dot, as if a table were needed to tell their parts."""
    names = [stem for claim in claims for stem, rows in claim.located.items() if not rows[0].prefix.text]
    everything = sum(len(claim.located) for claim in claims)
    return 2 * sum("." not in name for name in names) > everything


def _evidence(family: Family, metadata: Mapping[str, str]) -> bool:
    return any(metadata.get(key, "").startswith(beginnings) for key, beginnings in family.evidence.items())
