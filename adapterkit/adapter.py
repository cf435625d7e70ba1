"""An adapter in memory: changes by the places they act on, whatever file they came from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from adapterkit import deltas
from adapterkit.deltas import Change
from adapterkit.detect import Entry, Explanation, Role, explain
from adapterkit.errors import AdapterkitError, Conflict, Json, Mismatch, Refused, StoreError
from adapterkit.scale import (
    Configs,
    Scale,
    ScaleFrom,
    configs,
    expert_count,
    one_number,
    scale_of,
    with_experts,
)
from adapterkit.specs.families import Family, Place
from adapterkit.specs.kinds import KINDS
from adapterkit.specs.layouts import layouts
from adapterkit.specs.tuner_config import TunerConfig
from adapterkit.stores import Store

if TYPE_CHECKING:
    from torch import Tensor

# Computing with these would drop their imaginary parts.
_NOT_REAL = frozenset({"C64"})


@dataclass(frozen=True)
class Receipt:
    """What became of every tensor read: mapped + carried + dropped = total."""

    total: int
    mapped: int
    carried: int
    dropped: Mapping[str, str]

    @property
    def balances(self) -> bool:
        return self.total == self.mapped + self.carried + len(self.dropped)


@dataclass(frozen=True)
class Adapter:
    """Changes for one family.

    changes: per place, the changes that act on it (several add up).
    scales: per place, where its scale came from.
    natives: per place, the module's name in the file it came from, for messages.
    keys: per place, for each of its changes, the tensors of the file that it was made from, by role.
    passengers: tensors that travel along; `carried` are the keys of the file they came from.
    tuners: the configuration that came with the file, per component ("" for all).
    store: where the tensors lie; it must stay open while they are used.
    computed: whether its changes are results (see `adapterkit.derived`) rather than what a file held.
    """

    family: Family
    changes: Mapping[Place, tuple[Change, ...]]
    metadata: Mapping[str, str]
    receipt: Receipt
    scales: Mapping[Place, Scale] = field(default_factory=dict)
    natives: Mapping[Place, str] = field(default_factory=dict)
    keys: Mapping[Place, tuple[Mapping[str, str], ...]] = field(default_factory=dict)
    passengers: Mapping[str, Tensor] = field(default_factory=dict)
    tuners: Mapping[str, TunerConfig] = field(default_factory=dict)
    layouts: tuple[str, ...] = ()
    store: Store | None = None
    computed: bool = False

    @property
    def components(self) -> tuple[str, ...]:
        """The components it changes, in the family's order."""
        present = {place.component for place in self.changes}
        return tuple(name for name in self.family.components if name in present)

    def __len__(self) -> int:
        return len(self.changes)


def read_adapter(
    store: Store,
    explanation: Explanation | None = None,
    *,
    allow: Collection[str] = (),
    scale_from: ScaleFrom | None = None,
) -> Adapter:
    """Build the changes that a file holds; tensors stay where they are until they are used.

    allow: named consents: "unclaimed" and "incomplete" leave out what nothing explains.
    Raises Refused for such tensors without consent, Conflict for two scales, two changes of one
    place or two adapters in one file, Mismatch for factors that do not fit each other.
    """
    explanation = explanation or explain(store)
    where = store.label
    _require_one(explanation, where)
    dropped = _consented(explanation, allow, where)
    found = configs(store, explanation)
    built = _Building(store, explanation, found, scale_from, where)
    for entry in explanation.entries:
        built.add(entry)
    _no_overlap(built.changes, built.owners, where)
    mapped = {key for entry in explanation.entries for key in entry.keys}
    return Adapter(
        family=explanation.family,
        changes={place: tuple(changes) for place, changes in built.changes.items()},
        metadata=dict(store.metadata),
        receipt=Receipt(len(store.tensors), len(mapped), len(explanation.passengers), dropped),
        scales=built.scales,
        natives=built.natives,
        keys=built.keys,
        passengers={key: store.tensor(key) for key in explanation.passengers},
        tuners=found.by_component,
        layouts=explanation.layouts,
        store=store,
    )


def _require_one(explanation: Explanation, where: str) -> None:
    """Conflict where the keys name several adapters: added up they would be none of them."""
    names = explanation.adapter_names
    if len(names) > 1:
        raise Conflict(
            f"{where}: the keys name {len(names)} adapters: {', '.join(f'`{name}`' for name in names)}",
            code="several-adapters",
            hint="save each adapter in a file of its own",
            details={"adapters": list[Json](names)},
        )


def _consented(explanation: Explanation, allow: Collection[str], where: str) -> dict[str, str]:
    """The keys that are left out, with why; Refused unless each reason was allowed."""
    orphans = [key for incomplete in explanation.incomplete for key in incomplete.keys]
    for reason, keys, what in (
        ("unclaimed", list(explanation.unclaimed), "are explained by nothing"),
        ("incomplete", orphans, "make no whole change (an up without its down, an alpha alone)"),
    ):
        if keys and reason not in allow:
            shown = ", ".join(f"`{key}`" for key in keys[:3]) + (", …" if len(keys) > 3 else "")
            raise Refused(
                f"{where}: {len(keys)} of {_total(explanation)} tensors {what}: {shown}",
                code=reason,
                hint=f"--allow {reason} leaves them out",
                details={"keys": list[Json](keys)},
            )
    return dict.fromkeys(explanation.unclaimed, "unclaimed") | dict.fromkeys(orphans, "incomplete")


def _total(explanation: Explanation) -> int:
    orphans = sum(len(incomplete.keys) for incomplete in explanation.incomplete)
    mapped = len({key for entry in explanation.entries for key in entry.keys})
    return mapped + orphans + len(explanation.unclaimed) + len(explanation.passengers)


@dataclass
class _Building:
    """The state of reading one file."""

    store: Store
    explanation: Explanation
    configs: Configs
    scale_from: ScaleFrom | None
    where: str
    changes: dict[Place, list[Change]] = field(default_factory=lambda: defaultdict(list))
    scales: dict[Place, Scale] = field(default_factory=dict)
    natives: dict[Place, str] = field(default_factory=dict)
    owners: dict[Place, list[str]] = field(default_factory=lambda: defaultdict(list))
    keys: dict[Place, tuple[Mapping[str, str], ...]] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        entry = with_experts(entry, self.store, self.configs)
        scale = self._scale(entry)
        try:
            change = self._change(entry, scale)
        except AdapterkitError as error:
            if not error.message.startswith(self.where):
                error.at(f"`{entry.native}`")
            error.at(self.where)
            raise
        self.changes[entry.place].append(change)
        self.owners[entry.place].append(entry.native)
        if KINDS[entry.kind].scales:
            self.scales[entry.place] = scale
        self.natives.setdefault(entry.place, entry.native)
        keys = {name: role.key for name, role in (*entry.roles.items(), *entry.modifiers.items())}
        self.keys[entry.place] = (*self.keys.get(entry.place, ()), keys)

    def _scale(self, entry: Entry) -> Scale:
        """The entry's scale; a bias that lies inside a scaled layer has that layer's."""
        if not any(role.spelling.scaled for role in entry.roles.values()):
            return scale_of(entry, self.store, self.configs, self.scale_from)
        for other in self.explanation.entries:
            if other.native == entry.native and KINDS[other.kind].scales:
                return scale_of(other, self.store, self.configs, self.scale_from)
        return Scale(1.0, None, "none given")

    def _change(self, entry: Entry, scale: Scale) -> Change:
        roles = {name: self._tensor(role) for name, role in entry.roles.items()}
        shape = weight_shape(self.explanation.family, entry.place)
        try:
            inner = self._build(entry, roles, scale.value, shape)
        except Mismatch:
            # A model of the same structure in another width; factors that do not fit each other
            # are refused all the same.
            inner = self._build(entry, roles, scale.value, None)
        magnitude = entry.modifiers.get("magnitude")
        if magnitude is None:
            return inner
        return _with_magnitude(inner, self._tensor(magnitude), magnitude.spelling.axis)

    def _tensor(self, role: Role) -> Tensor:
        info = self.store.tensors[role.key]
        if info.dtype in _NOT_REAL:
            raise StoreError(
                f"{self.where}: `{role.key}` is {info.dtype}; a change is made of real numbers", code="dtype"
            )
        tensor = self.store.tensor(role.key)
        # Axes are given by name in our order "o r" or "r i"; a stored "r o" is its transpose.
        return tensor.T if role.spelling.axes in {"r o", "i r"} else tensor

    def _build(
        self, entry: Entry, roles: Mapping[str, Tensor], scale: float, shape: tuple[int, ...] | None
    ) -> Change:
        """One change, with what its mathematics needs beside the tensors."""
        facts = {**self._facts(entry), **self._shared(entry)}
        return deltas.build(entry.kind, roles, scale=scale, weight_shape=shape, **facts)

    def _facts(self, entry: Entry) -> dict[str, object]:
        """What another tensor of the module or the configuration says of this kind."""
        config = self.configs.of(entry.place.component) or TunerConfig({})
        match entry.kind:
            case "oft" | "boft" if (role := entry.modifiers.get("alpha")) is not None:
                return {"constraint": one_number(self.store, role.key)}
            case "oft_input" | "oft_embedding":
                return {
                    "block_share": config.flag("block_share"),
                    "cayley_neumann": config.flag("use_cayley_neumann", True),
                    "terms": config.number("num_cayley_neumann_terms", 5),
                }
            case "experts":
                return {"count": expert_count(entry, self.store, self.configs)}
            case "adalora":
                return {"initial_rank": config.number("init_r", 0) or None}
            case "tokens":
                return {"indices": config.token_indices(entry.path)}
            case _:
                return {}

    def _shared(self, entry: Entry) -> dict[str, object]:
        """The tensors that all modules of this kind use, where the file holds them."""
        names = layouts()[entry.layout].shared.get(entry.kind, {})
        return {fact: self.store.tensor(key) for fact, key in names.items() if key in self.store.tensors}


def _with_magnitude(inner: Change, stored: Tensor, axis: str) -> deltas.Magnitude:
    """DoRA over `inner`. Its stored vector may have axes of length 1 around it.

    PEFT's magnitudes run along the output, but for an embedding along its dimensions. LyCORIS's
    run along the axis that their shape shows; a vector without axes is taken for the output's.
    """
    by_columns = stored.ndim > 1 and stored.shape[0] == 1 and stored.shape[1] > 1
    along_input = inner.kind == "embedding" or (axis == "by shape" and by_columns)
    axes = stored.ndim if stored.ndim > 2 else 0
    return deltas.Magnitude(inner, stored.reshape(-1), "in" if along_input else "out", axes)


def weight_shape(family: Family, place: Place) -> tuple[int, ...] | None:
    """The base weight's shape that a place has in the family's full-size model, if it is known."""
    network = family.network(place.component)
    if network is None or place.param == "bias":
        return None
    return network.stacked_shape(place.span)


def _no_overlap(changes: Mapping[Place, list[Change]], owners: Mapping[Place, list[str]], where: str) -> None:
    """Two changes of one kind on the same rows are a mistake of whoever wrote the file.

    Applying both would double the effect; taking one would lose the other.
    """
    seen: dict[tuple[str, str, str, str], list[tuple[Fraction, Fraction, str]]] = defaultdict(list)
    for place, several in changes.items():
        for change, native in zip(several, owners[place], strict=True):
            for piece in place.span:
                key = (place.component, place.param, piece.module, change.kind)
                for start, stop, other in seen[key]:
                    if piece.start < stop and start < piece.stop:
                        raise _twice(other, native, piece.module, where)
            for piece in place.span:
                key = (place.component, place.param, piece.module, change.kind)
                seen[key].append((piece.start, piece.stop, native))


def _twice(one: str, other: str, module: str, where: str) -> Conflict:
    return Conflict(
        f"{where}: `{one}` and `{other}` both change `{module}`",
        code="duplicate-module",
        hint="the file holds one module twice; remove one of the two",
        details={"modules": [one, other], "changes": module},
    )
