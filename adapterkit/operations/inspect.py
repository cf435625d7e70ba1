"""inspect: what a file is, from its header, without torch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import cast

from adapterkit.detect import Entry, Explanation
from adapterkit.errors import AdapterkitError, Json, UsageError
from adapterkit.key_patterns import key_patterns
from adapterkit.operations.sources import Source
from adapterkit.operations.sources import open as open_source
from adapterkit.scale import Configs, configs, rank_of, scale_of, with_experts
from adapterkit.specs.families import Family
from adapterkit.specs.kinds import KINDS
from adapterkit.specs.layouts import layouts
from adapterkit.stores import Store

# What people want to see of hundreds of metadata keys.
_WORTH_KNOWING = (
    "modelspec.title",
    "modelspec.author",
    "modelspec.trigger_phrase",
    "modelspec.architecture",
    "modelspec.license",
    "modelspec.date",
    "ss_output_name",
    "ss_base_model_version",
    "ss_sd_model_name",
    "ss_network_module",
    "ss_training_comment",
    "software",
    "trained_words",
)
_EMBEDDED_HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
_HASH_OF_NOTHING = hashlib.sha256(b"").hexdigest()


@dataclass(frozen=True)
class Problem:
    """Something the owner should know. code: stable; `adapterkit explain CODE` says more."""

    code: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class Component:
    """What an adapter does to one network of the base.

    modules: how many it changes.  kinds, ranks: how many of each.  magnitudes: how many are DoRA.
    parameters: numbers stored.  base_parameters: of the whole network, None if it is not known.
    """

    name: str
    network: str | None
    modules: int
    kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    magnitudes: int
    parameters: int
    base_parameters: int | None


@dataclass(frozen=True)
class ScaleCount:
    """How many changes have this scale from this source."""

    value: float
    source: str
    count: int


@dataclass(frozen=True)
class Inspection:
    """Everything that `inspect` knows of a file.

    family, size, title: the base model.  layouts: how it is spelled, the most frequent first.
    certainty: in words, on what the answer rests.  also: other families that fit as well.
    share: explained tensors of all; shapes: modules with the base's true shapes of those checked.
    """

    path: str
    container: str
    size: int
    tensors: int
    family: str
    title: str
    layouts: tuple[str, ...]
    share: float
    shapes: float | None
    certainty: str
    also: tuple[str, ...]
    components: tuple[Component, ...]
    scales: tuple[ScaleCount, ...]
    dtypes: Mapping[str, int]
    passengers: Mapping[str, str]
    notes: Mapping[str, str]
    metadata_keys: int
    embedded_hashes: Mapping[str, str]
    hashes: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(component.parameters for component in self.components)

    @property
    def base_parameters(self) -> int | None:
        """The parameters of the networks it changes; None if one is not known."""
        known = [component.base_parameters for component in self.components]
        return None if None in known else sum(cast(list[int], known))

    def as_json(self) -> dict[str, Json]:
        return cast(dict[str, Json], asdict(self))


@dataclass(frozen=True)
class KeyGroup:
    """Keys that differ in their numbers alone, with the dtypes and shapes that their tensors have."""

    pattern: str
    count: int
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def key_groups(store: Store) -> tuple[KeyGroup, ...]:
    """Every key of a file in patterns, in the order of its tensors. Needs no explanation of the file."""
    return tuple(
        KeyGroup(
            pattern=pattern.text,
            count=pattern.count,
            dtypes=tuple(dict.fromkeys(store.tensors[key].dtype for key in pattern.keys)),
            shapes=tuple(dict.fromkeys(store.tensors[key].shape for key in pattern.keys)),
        )
        for pattern in key_patterns(store.tensors)
    )


def inspect(source: Source, *, family: str | None = None, hashes: bool = False) -> Inspection:
    """Say what a file is. Reads the header and the scalars beside modules; torch is not needed.

    hashes: also read all of the file and compute SHA-256, AutoV2 and AutoV3.
    Raises Unrecognized or StoreError, and UsageError for the hash of something that is not one file.
    """
    opened = open_source(source, family=family)
    store = opened.store
    explanation, scales, scale_problems = _scaled(store, opened.explanation)
    found = explanation.family
    return Inspection(
        path=store.label if store.path is None else str(store.path),
        container=store.kind,
        size=store.size,
        tensors=len(store.tensors),
        family=found.name,
        title=found.label,
        layouts=explanation.layouts,
        share=explanation.share,
        shapes=explanation.shapes,
        certainty=_certainty(explanation),
        also=tuple(dict.fromkeys(candidate.family.label for candidate in explanation.equals)),
        components=tuple(_components(store, explanation)),
        scales=scales,
        dtypes=_dtypes(store),
        passengers=explanation.passengers,
        notes={key: store.metadata[key] for key in _WORTH_KNOWING if store.metadata.get(key)},
        metadata_keys=len(store.metadata),
        embedded_hashes={key: store.metadata[key] for key in _EMBEDDED_HASHES if key in store.metadata},
        hashes=_hashes(store) if hashes else {},
        problems=(*_problems(store, explanation), *scale_problems),
    )


def _certainty(explanation: Explanation) -> str:
    if explanation.family.open:
        return "by the form of its names; no table of this model is known"
    known = f"{_part(explanation.share, 'tensor', 'tensors')} known by name"
    if explanation.shapes is None:
        return known
    return f"{known}, {_part(explanation.shapes, 'checked shape fits', 'checked shapes fit')}"


def _part(share: float, one: str, many: str) -> str:
    return f"every {one}" if share == 1 else f"{100 * share:.1f} % of {many}"


def _components(store: Store, explanation: Explanation) -> Iterable[Component]:
    for name in explanation.family.components:
        entries = [entry for entry in explanation.entries if entry.place.component == name]
        if not entries:
            continue
        network = explanation.family.network(name)
        ranks = Counter(rank for entry in entries if (rank := rank_of(entry, store)) is not None)
        yield Component(
            name=name,
            network=network.summary if network else None,
            modules=len({entry.native for entry in entries}),
            kinds=dict(Counter(KINDS[entry.kind].title for entry in entries).most_common()),
            ranks=dict(ranks.most_common()),
            magnitudes=sum("magnitude" in entry.modifiers for entry in entries),
            parameters=sum(_elements(store, entry) for entry in entries),
            base_parameters=network.parameters if network else None,
        )


def _elements(store: Store, entry: Entry) -> int:
    """The numbers of a change's tensors, its scalars left out."""
    shapes = [store.tensors[key].shape for key in entry.keys]
    return sum(prod(shape) for shape in shapes if shape)


def _scaled(
    store: Store, explanation: Explanation
) -> tuple[Explanation, tuple[ScaleCount, ...], list[Problem]]:
    """The explanation with the kinds that only a configuration tells, and the scales."""
    try:
        known = configs(store, explanation)
    except AdapterkitError as error:
        return explanation, (), [Problem(error.code, error.message, error.hint)]
    entries = tuple(with_experts(entry, store, known) for entry in explanation.entries)
    return replace(explanation, entries=entries), *_scales(store, entries, known)


def _scales(
    store: Store, entries: Iterable[Entry], known: Configs
) -> tuple[tuple[ScaleCount, ...], list[Problem]]:
    counted: Counter[tuple[float, str]] = Counter()
    problems: list[Problem] = []
    for entry in entries:
        if not KINDS[entry.kind].scales:
            continue
        try:
            scale = scale_of(entry, store, known)
        except AdapterkitError as error:
            problems.append(Problem(error.code, error.message, error.hint))
        else:
            counted[(scale.value, scale.source)] += 1
    # One conflict tells the whole story of a file that has hundreds.
    unique = {problem.code: problem for problem in problems}
    counts = tuple(ScaleCount(value, source, count) for (value, source), count in counted.most_common())
    return counts, list(unique.values())


def _dtypes(store: Store) -> dict[str, int]:
    return dict(Counter(info.dtype for info in store.tensors.values() if info.shape).most_common())


def _problems(store: Store, explanation: Explanation) -> Iterable[Problem]:
    for warning in store.warnings:
        yield Problem("container", warning)
    if explanation.unclaimed:
        shown = ", ".join(f"`{pattern.text}`" for pattern in key_patterns(explanation.unclaimed)[:3])
        count = f"{len(explanation.unclaimed)} of {len(store.tensors)} tensors"
        yield Problem("unclaimed", f"explained by nothing: {count} ({shown})")
    if explanation.incomplete:
        first, broken = explanation.incomplete[0], len(explanation.incomplete)
        count = f"{broken} of {broken + len({entry.native for entry in explanation.entries})} modules"
        keys = ", ".join(f"`{key}`" for key in first.keys)
        yield Problem("incomplete", f"not whole: {count} (of `{first.native}` there is only {keys})")
    if explanation.stripped:
        wrapped = f"{explanation.stripped} of {len(store.tensors)} keys"
        yield Problem("wrapped", f"a trainer's wrapper names stand in {wrapped}", "convert takes them away")
    if len(explanation.layouts) > 1:
        titles = " and ".join(layouts()[name].title for name in explanation.layouts)
        yield Problem("mixed", f"the file mixes {titles}", "convert it to one of them")
    if len(explanation.adapter_names) > 1:
        names = ", ".join(f"`{name}`" for name in explanation.adapter_names)
        yield Problem("several-adapters", f"the names of several adapters stand in its keys: {names}")
    if explanation.misfits:
        shown = ", ".join(f"`{pattern.text}`" for pattern in key_patterns(explanation.misfits)[:3])
        count = f"{len(explanation.misfits)} module{'s' * (len(explanation.misfits) > 1)}"
        yield Problem("shapes", f"not in the shapes of {explanation.family.label}: {count} ({shown})")
    yield from _base_problems(store.metadata, explanation.family)
    yield from _hash_problems(store.metadata)


def _base_problems(metadata: Mapping[str, str], family: Family) -> Iterable[Problem]:
    """Metadata that names a base model, and none of it this one: Chroma has FLUX.1's blocks, say."""
    given = {key: metadata[key] for key in family.evidence if metadata.get(key)}
    if given and not any(value.startswith(family.evidence[key]) for key, value in given.items()):
        said = ", ".join(f"`{key}` is {value[:60]}" for key, value in given.items())
        yield Problem("other-base", f"the metadata names another base model than {family.label}: {said}")


def _hash_problems(metadata: Mapping[str, str]) -> Iterable[Problem]:
    for key in _EMBEDDED_HASHES:
        if metadata.get(key, "").removeprefix("0x") == _HASH_OF_NOTHING:
            yield Problem(
                "hash-of-nothing",
                f"`{key}` is the hash of empty input: sites will link the file to another model",
                "convert rewrites it",
            )


def _hashes(store: Store) -> dict[str, str]:
    if store.path is None or store.kind in {"folder", "sharded"}:
        raise UsageError(
            f"{store.label}: not one file, so it has no hash", hint="name the tensor file in it to hash that"
        )
    return file_hashes(store.path)


def file_hashes(path: Path) -> dict[str, str]:
    """The names under which sites know a file.

    sha256 of all bytes; autov2, its first 10 digits; autov3, the first 12 of the hash of the tensors
    alone, which metadata does not change (for .safetensors; AUTOMATIC1111 modules/hashes.py).
    """
    whole, data = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as file:
        first = file.read(8)
        whole.update(first)
        header = file.read(int.from_bytes(first, "little")) if path.suffix == ".safetensors" else b""
        whole.update(header)
        while chunk := file.read(1 << 22):
            whole.update(chunk)
            data.update(chunk)
    found = {"sha256": whole.hexdigest(), "autov2": whole.hexdigest()[:10]}
    return found | ({"autov3": data.hexdigest()[:12]} if path.suffix == ".safetensors" else {})
