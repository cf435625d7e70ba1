"""Which family a base model is of, and which rows each of its tensors holds.

The counterpart of `adapterkit.claims` for files whose tensors stand under a model's own names.
Headers suffice.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from adapterkit.errors import Ambiguous, Json, Unrecognized
from adapterkit.specs.families import ANY, Family, Names, OpenNames, Prefix, families, family
from adapterkit.specs.layouts import Layout, layouts
from adapterkit.specs.names import Network, Piece, Row, heads
from adapterkit.specs.weights import weight_names
from adapterkit.specs.wrappers import wrappers
from adapterkit.stores import Store, TensorInfo
from adapterkit.stores.model_folder import CONFIG

_PARAMS = ("weight", "bias")
_SAMPLE = 48
# A relative of a model shares many of its names (Chroma has 79 % of FLUX.1's tensors); a fine-tune has all.
_WHOLE = 0.9


@dataclass(frozen=True, slots=True)
class Held:
    """One tensor of a file, and the rows of one component that it stacks.

    param: "weight", "bias", or "" for a bare parameter.
    """

    key: str
    component: str
    row: Row
    param: str


@dataclass(frozen=True)
class Reading:
    """One family's reading of a file: what it knows, by the keys as the file has them."""

    family: Family
    held: Mapping[str, Held]
    shapes: Mapping[str, TensorInfo]

    @cached_property
    def rank(self) -> tuple[float, ...]:
        """Better readings have greater ranks: more tensors known, shapes alike, fewer tensors missing."""
        dimensions, sizes = _fit(self.family, self.held.values(), self.shapes)
        return (round(len(self.held) / len(self.shapes), 6), dimensions, sizes, self.completeness)

    @property
    def share(self) -> float:
        return len(self.held) / len(self.shapes)

    @cached_property
    def completeness(self) -> float:
        """The share of its tensors that the most complete component has."""
        return max(
            (_completeness(self.family, name, self.held) for name in self.family.components), default=0.0
        )


def read(store: Store, family_name: str | None = None) -> Reading:
    """The family and the rows of a base model's tensors.

    family_name: consider only this family (or this size of one).
    Raises Unrecognized, with the nearest, if no table knows a whole part of a model in it, and
    Ambiguous if two families know it equally well.
    """
    plain = {key: wrappers().strip(key) for key in store.tensors}
    considered = family(family_name) if family_name else families()
    closed = [known for known in considered if not known.open]
    found = [Reading(f, _held(f, plain, store), store.tensors) for f in _hopeful(closed, plain)]
    ranked = sorted((r for r in found if r.held), key=lambda reading: reading.rank, reverse=True)
    good = [reading for reading in ranked if family_name or reading.completeness >= _WHOLE]
    if good:
        return _decided(good, store)
    if not family_name and _is_adapter(plain.values()):
        raise Unrecognized(
            f"{store.label}: an adapter, not a base model",
            hint="give the model itself: a checkpoint, or a folder of diffusers or transformers",
        )
    for known in considered:
        if known.open and (family_name or _says(known, store, plain)):
            return Reading(known, _held(known, plain, store), store.tensors)
    raise _unrecognized(store, ranked)


def _decided(ranked: Sequence[Reading], store: Store) -> Reading:
    best = ranked[0]
    names = [r.family.name for r in ranked if r.rank == best.rank and r.family.name != best.family.name]
    if not names:
        return best
    both = sorted({best.family.name, *names})
    raise Ambiguous(
        f"{store.label}: {' and '.join(both)} have this part in common",
        hint=f"say which with --family {both[0]}",
        details={"families": list[Json](both)},
    )


def _hopeful(considered: Sequence[Family], plain: Mapping[str, str]) -> list[Family]:
    """The families that know at least half as much of a sample as the best one."""
    sample = list(plain.values())[:: max(1, len(plain) // _SAMPLE)]
    known = {f: sum(any(_locate_all(f, key)) for key in sample) for f in considered}
    enough = max(known.values(), default=0) / 2
    return [f for f, count in known.items() if count and count >= enough]


def _locate_all(known: Family, key: str) -> Iterator[tuple[Prefix, Row, str]]:
    """Everything that a key can mean, by the longest prefix that leads anywhere."""
    found = ""
    for prefix in _longest_first(known):
        if found and len(prefix.text) < len(found):
            return
        if not key.startswith(prefix.text) or not _may_know(known, prefix, key):
            continue
        located = _locate(known, prefix, key)
        if located is not None:
            found = prefix.text
            yield prefix, *located


@cache
def _longest_first(known: Family) -> tuple[Prefix, ...]:
    return tuple(sorted(known.checkpoint, key=lambda prefix: -len(prefix.text)))


def _may_know(known: Family, prefix: Prefix, key: str) -> bool:
    name = known.components[prefix.component]
    return name == ANY or key.startswith(heads(name), len(prefix.text))


def _locate(known: Family, prefix: Prefix, key: str) -> tuple[Row, str] | None:
    """The row and the parameter that a tensor's name means behind a prefix."""
    native = key[len(prefix.text) :]
    if "/" in native:
        return None
    names: Names = known.names(prefix.component, prefix.naming)
    module, _, param = native.rpartition(".")
    whole = param in _PARAMS and module != ""
    row = names.find(module) if whole else None
    if row is not None and row.param is None and _has(known.network(prefix.component), row, param):
        return row, param
    row = names.find(native)
    if row is None or (isinstance(names, OpenNames) and whole):
        return None
    # A bare parameter of a model without a table has no param of its own.
    return (row, row.param or "") if row.param is not None or isinstance(names, OpenNames) else None


def _has(network: Network | None, row: Row, param: str) -> bool:
    return network is None or f"{row.span[0].module}.{param}" in network.shapes


def _held(known: Family, plain: Mapping[str, str], store: Store) -> dict[str, Held]:
    """What each key holds: per component the prefix and naming that explain the most, and no other."""
    readings: dict[Prefix, dict[str, Held]] = {}
    for key, name in plain.items():
        for prefix, row, param in _locate_all(known, name):
            readings.setdefault(prefix, {})[key] = Held(key, prefix.component, row, param)

    def order(prefix: Prefix) -> tuple[float, ...]:
        return (len(readings[prefix]), *_fit(known, readings[prefix].values(), store.tensors))

    held: dict[str, Held] = {}
    taken: set[str] = set()
    for prefix in sorted(readings, key=order, reverse=True):
        mine = {key: each for key, each in readings[prefix].items() if key not in held}
        # Few of a component's tensors under another's prefix are chance.
        if prefix.component not in taken and 2 * len(mine) > len(readings[prefix]):
            taken.add(prefix.component)
            held |= mine
    return _oriented(held, store.tensors) if known.open else held


def _fit(known: Family, held: Iterable[Held], tensors: Mapping[str, TensorInfo]) -> tuple[float, float]:
    """The share of tensors whose number of dimensions, and whose sizes, are the model's."""
    dimensions = sizes = count = 0
    for each in held:
        shape = row_shape(known, each)
        if shape is not None:
            here = tensors[each.key].shape
            count += 1
            dimensions += len(here) == len(shape)
            sizes += here == shape
    return (dimensions / count, sizes / count) if count else (0.0, 0.0)


def row_shape(known: Family, held: Held) -> tuple[int, ...] | None:
    """The shape that a tensor has in the full-size model; None in a family without a table."""
    network = known.network(held.component)
    if network is None:
        return None
    shape = network.stacked_shape(held.row.span)
    if shape and held.param == "bias":
        return shape[:1]
    return shape[::-1] if shape and held.row.span[0].transposed else shape


def _completeness(known: Family, component: str, held: Mapping[str, Held]) -> float:
    network = known.network(component)
    if network is None:
        return 0.0
    have = {
        f"{piece.module}.{each.param}" if each.param else piece.module
        for each in held.values()
        if each.component == component
        for piece in each.row.span
    }
    return len(have & network.shapes.keys()) / len(network.shapes)


def _oriented(held: Mapping[str, Held], tensors: Mapping[str, TensorInfo]) -> dict[str, Held]:
    """Weights that a model without a table keeps as (in, out), turned by their row.

    The lengths of the biases beside them tell, where the weights are not square.
    """
    names = weight_names()
    suspects = {
        each.row.native: each
        for each in held.values()
        if each.param == "weight"
        and names.may_be_transposed(each.row.native)
        and len(tensors[each.key].shape) == 2
    }
    votes = 0
    for each in held.values():
        weight = suspects.get(each.row.native)
        if each.param == "bias" and weight is not None:
            out, across = tensors[weight.key].shape
            votes += (tensors[each.key].shape == (across,)) - (tensors[each.key].shape == (out,))
    turned = {each.key: _turned(each) for each in suspects.values()} if votes > 0 else {}
    return {key: turned.get(key, each) for key, each in held.items()}


def _turned(held: Held) -> Held:
    row = held.row
    return Held(
        held.key, held.component, Row(row.native, (Piece(row.native, transposed=True),), None), "weight"
    )


def _says(known: Family, store: Store, plain: Mapping[str, str]) -> bool:
    """Whether a configuration beside the tensors, or the name of one, speaks for a family without a table."""
    configs = [
        document
        for name, document in store.sidecars.items()
        if name.rpartition("/")[2] == CONFIG and isinstance(document, dict)
    ]
    said = {other.config for other in families() if any(other.config in config for config in configs)}
    if said - {""}:
        return known.config in said
    names = weight_names()
    speaks = any(
        names.is_head(module) or names.is_embedding(module)
        for module in (key.removesuffix(".weight") for key in plain.values() if key.endswith(".weight"))
    )
    # By names alone only a model of a single part can be told.
    return len(known.components) == 1 and speaks


def _is_adapter(keys: Collection[str]) -> bool:
    """Whether most keys end as tensors of changes do."""
    count = sum(any(_is_of_a_change(layout, key) for layout in layouts().values()) for key in keys)
    return 2 * count > len(keys)


def _is_of_a_change(layout: Layout, key: str) -> bool:
    parted = layout.split(key)
    return parted is not None and any(s.kind not in ("", "set") and not s.needs for s in parted[1])


def _unrecognized(store: Store, ranked: Sequence[Reading]) -> Unrecognized:
    near = ", ".join(f"{r.family.key} {100 * r.share:.0f} %" for r in ranked[:3])
    nearest = f"; nearest: {near} of {len(store.tensors)} tensors" if near else ""
    return Unrecognized(
        f"{store.label}: no table knows it as a base model{nearest}",
        hint="--family says which it is; a language model is known by the config.json beside it"
        if store.tensors
        else "there are no tensors in it; get the file again",
        details={"nearest": [{"family": r.family.name, "share": r.share} for r in ranked[:3]]},
    )
