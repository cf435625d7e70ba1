"""Layouts: how a kind of file spells the tensors of a change.

A layout is a table from (kind, role) to the suffix behind a module's name, read from
formats/layouts/*.toml (the language is described in formats/README.md). Reading splits a key by
looking its ends up in that table, writing joins a module's name and a suffix: no key is parsed.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, cast

from adapterkit.errors import SpecError
from adapterkit.specs.kinds import KINDS, MODIFIERS
from adapterkit.specs.paths import formats_dir

ScaleHome = Literal["alpha", "adapter_config.json", "lora_adapter_metadata", "none"]
Axis = Literal["", "out", "by shape"]

_SCALE_HOMES = ("alpha", "adapter_config.json", "lora_adapter_metadata", "none")
_PLAIN_KEYS = {"title", "summary", "source", "dot", "scale", "extends", "written", "folder", "bare"}
_TOP_KEYS = _PLAIN_KEYS | {"slots", "modifiers", "kinds", "passengers", "shared"}


@dataclass(frozen=True, slots=True)
class Spelling:
    """One way in which a layout writes one role of one kind.

    suffix: what stands behind the module's name, with the sign that joins them.
    param: which parameter of the module it changes, "weight" or "bias".
    axes: the order of the stored axes where it is not ours ("r o" for an `up` kept transposed).
    ndim: the number of dimensions that tells this role from another with the same suffix.
    scaled: whether the module's scale applies to it though its kind does not scale (PEFT's bias).
    axis, conv: for magnitudes, the axis they run along and the shape they take for a convolution.
    of_norm: written only for modules whose weight is a vector.
    wrapped: written only for modules that another kind of change wraps (PEFT's `base_layer`).
    components: written only for these components; empty: for all.
    needs: another role of the kind, without which this suffix does not mean it.
    written: false for spellings that are read but never written.
    """

    kind: str
    role: str
    suffix: str
    param: str = "weight"
    axes: str = ""
    ndim: int = 0
    scaled: bool = False
    axis: Axis = ""
    conv: str = ""
    of_norm: bool = False
    wrapped: bool = False
    components: tuple[str, ...] = ()
    needs: str = ""
    written: bool = True


@dataclass(frozen=True, eq=False)
class Layout:
    """One spelling of changes, read and written from the same table.

    dot: stands for "." inside module names.  scale: where the scale is written.
    folder: the weights' name when the layout is a folder.  bare: whether a tensor under its own
    full name replaces the base's.  slots: name parts behind which an adapter's name may stand
    (`lora_A.default.weight`).  passengers: prefixes of tensors that travel along, with what they
    are.  shared: per kind, tensors that all its modules use, by what the mathematics calls them.
    """

    name: str
    title: str
    summary: str
    source: str
    dot: str
    scale: ScaleHome
    spellings: tuple[Spelling, ...]
    folder: str = ""
    bare: bool = False
    slots: tuple[str, ...] = ()
    passengers: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    written: bool = True

    @cached_property
    def _by_suffix(self) -> dict[str, tuple[Spelling, ...]]:
        table: dict[str, tuple[Spelling, ...]] = {}
        for spelling in self.spellings:
            table[spelling.suffix] = (*table.get(spelling.suffix, ()), spelling)
        return table

    @cached_property
    def _lengths(self) -> tuple[int, ...]:
        return tuple(sorted({len(suffix) for suffix in self._by_suffix}, reverse=True))

    def split(self, key: str) -> tuple[str, tuple[Spelling, ...]] | None:
        """The part of `key` before its longest known suffix, and what the suffix can mean."""
        size = len(key)
        for length in self._lengths:
            if length < size and (found := self._by_suffix.get(key[-length:])):
                return key[:-length], found
        return None

    def spelling(
        self,
        kind: str,
        role: str,
        param: str,
        component: str,
        *,
        of_norm: bool = False,
        wrapped: bool = False,
    ) -> Spelling | None:
        """How this layout writes a role, or None if it cannot."""
        for spelling in self._by_role.get((kind, role, param), ()):
            if (spelling.of_norm and not of_norm) or (spelling.wrapped and not wrapped):
                continue
            if spelling.components and component not in spelling.components:
                continue
            if spelling.written:
                return spelling
        return None

    @cached_property
    def _by_role(self) -> dict[tuple[str, str, str], tuple[Spelling, ...]]:
        table: dict[tuple[str, str, str], tuple[Spelling, ...]] = {}
        for spelling in self.spellings:
            key = (spelling.kind, spelling.role, spelling.param)
            table[key] = (*table.get(key, ()), spelling)
        return table

    def kinds(self) -> tuple[str, ...]:
        """The kinds of change that this layout can write, in the order of KINDS."""
        written = {s.kind for s in self.spellings if s.written} | ({"set"} if self.bare else set())
        return tuple(kind for kind in KINDS if kind in written)

    def passenger(self, key: str) -> str | None:
        """What `key` is if it is a known tensor that is not one module's change."""
        for kind, tensors in self.shared.items():
            if key in tensors.values():
                return f"what all modules of {KINDS[kind].title} share"
        if not key.startswith(self._passenger_prefixes):
            return None
        return next(what for prefix, what in self.passengers.items() if key.startswith(prefix))

    @cached_property
    def _passenger_prefixes(self) -> tuple[str, ...]:
        return tuple(self.passengers)


def _suffix(key: str) -> str:
    # A suffix that starts with a letter or digit is joined by a dot, any other as it stands.
    return f".{key}" if key[:1].isalnum() else key


def _spellings(kind: str, role: str, param: str, entry: object, where: str) -> Iterator[Spelling]:
    for item in entry if isinstance(entry, list) else [entry]:
        table = {"key": item} if isinstance(item, str) else item
        if not isinstance(table, dict) or not isinstance(table.get("key"), str):
            raise SpecError(f"{where}: `{kind}.{role}` needs a key, a table with one, or a list of these")
        known = set(Spelling.__dataclass_fields__) - {"kind", "role", "suffix", "param"} | {"key"}
        if unknown := set(table) - known:
            raise SpecError(f"{where}: `{kind}.{role}` has unknown settings {sorted(unknown)}")
        yield Spelling(
            kind=kind,
            role=role,
            suffix=_suffix(table["key"]),
            param=param,
            axes=table.get("axes", ""),
            ndim=table.get("ndim", 0),
            scaled=table.get("scaled", False),
            axis=table.get("axis", ""),
            conv=table.get("conv", ""),
            of_norm=table.get("of_norm", False),
            wrapped=table.get("wrapped", False),
            components=tuple(table.get("components", ())),
            needs=table.get("needs", ""),
            written=table.get("written", True),
        )


def _kind_spellings(kind: str, table: Mapping[str, object], where: str) -> Iterator[Spelling]:
    if kind not in KINDS:
        raise SpecError(f"{where}: `{kind}` is no kind of change", hint=f"kinds: {', '.join(KINDS)}")
    for role, entry in table.items():
        if role == "bias" and isinstance(entry, dict):
            for bias_role, bias_entry in entry.items():
                yield from _spellings(kind, bias_role, "bias", bias_entry, where)
        elif role not in KINDS[kind].roles:
            raise SpecError(f"{where}: kind `{kind}` has no role `{role}`")
        else:
            yield from _spellings(kind, role, "weight", entry, where)


def _merge(base: Mapping[str, object], own: Mapping[str, object]) -> dict[str, object]:
    """`own` over `base`, table by table."""
    merged = dict(base)
    for name, value in own.items():
        under = merged.get(name)
        merged[name] = _merge(under, value) if isinstance(under, dict) and isinstance(value, dict) else value
    return merged


def parse_layout(name: str, document: Mapping[str, object], where: str) -> Layout:
    """A layout from its parsed TOML; SpecError says which line of thought is wrong."""
    if unknown := set(document) - _TOP_KEYS:
        raise SpecError(f"{where}: unknown settings {sorted(unknown)}")
    scale = document.get("scale")
    if scale not in _SCALE_HOMES:
        raise SpecError(f"{where}: `scale` is {scale!r}, not one of {list(_SCALE_HOMES)}")
    spellings: list[Spelling] = []
    for role, entry in cast(dict[str, object], document.get("modifiers", {})).items():
        if role not in MODIFIERS:
            raise SpecError(f"{where}: `{role}` is no modifier", hint=f"modifiers: {sorted(MODIFIERS)}")
        spellings += _spellings("", role, "weight", entry, where)
    for kind, table in cast(dict[str, dict[str, object]], document.get("kinds", {})).items():
        spellings += _kind_spellings(kind, table, where)
    return Layout(
        name=name,
        title=str(document["title"]),
        summary=str(document["summary"]),
        source=str(document["source"]),
        dot=str(document["dot"]),
        scale=cast(ScaleHome, scale),
        spellings=tuple(spellings),
        folder=str(document.get("folder", "")),
        bare=bool(document.get("bare", False)),
        slots=tuple(cast(list[str], document.get("slots", []))),
        passengers=cast(dict[str, str], document.get("passengers", {})),
        shared=cast(dict[str, dict[str, str]], document.get("shared", {})),
        written=bool(document.get("written", True)),
    )


def _document(path: Path) -> dict[str, object]:
    document = tomllib.loads(path.read_text("utf-8"))
    if base := document.pop("extends", None):
        document = _merge(_document(path.with_name(f"{base}.toml")), document)
    return document


@cache
def layouts() -> Mapping[str, Layout]:
    """Every layout under formats/layouts, by name."""
    paths = sorted((formats_dir() / "layouts").glob("*.toml"))
    return {path.stem: parse_layout(path.stem, _document(path), path.name) for path in paths}
