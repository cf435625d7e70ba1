"""How quantised weights are spelled: read from formats/quantizations.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from adapterkit.errors import SpecError
from adapterkit.specs.paths import formats_dir


@dataclass(frozen=True)
class Quantization:
    """One method. Names are ends, put behind what the tensors of one weight have in common.

    coding: how the numbers come back. plain: the weight's name when it is not quantised.
    mark: the tensor by which it is known. tensors: the spellings of each. optional: which may be missing.
    ignored: what is dropped with the weight. unless: what makes it something else.
    """

    name: str
    summary: str
    source: str
    coding: str
    plain: str
    mark: str
    tensors: Mapping[str, tuple[str, ...]]
    optional: frozenset[str]
    ignored: tuple[str, ...]
    unless: tuple[str, ...]


@dataclass(frozen=True)
class Quantizations:
    """All methods, by name, and the tensors that only say that others are quantised."""

    methods: Mapping[str, Quantization]
    flags: tuple[str, ...]


_KEYS = {"summary", "source", "coding", "plain", "mark", "tensors", "optional", "ignored", "unless"}


@cache
def quantizations() -> Quantizations:
    """The table as it stands; SpecError if a row says too little or too much."""
    document = tomllib.loads((formats_dir() / "quantizations.toml").read_text("utf-8"))
    methods = {name: _method(name, entry) for name, entry in document["methods"].items()}
    return Quantizations(methods, tuple(document["flags"]))


def _method(name: str, entry: Mapping[str, object]) -> Quantization:
    tensors, optional = entry.get("tensors"), entry.get("optional", [])
    if not isinstance(tensors, dict) or not isinstance(optional, list) or entry.keys() - _KEYS:
        raise SpecError(f"quantizations.toml: `{name}` has no tensors, or a setting that is not known")
    if entry.get("mark") not in tensors or not {*optional} <= tensors.keys() or "codes" not in tensors:
        raise SpecError(f"quantizations.toml: `{name}` names a tensor that it does not spell")
    return Quantization(
        name,
        str(entry["summary"]),
        str(entry["source"]),
        str(entry["coding"]),
        str(entry["plain"]),
        str(entry["mark"]),
        {role: _several(spelled) for role, spelled in tensors.items()},
        frozenset(map(str, optional)),
        _several(entry.get("ignored", [])),
        _several(entry.get("unless", [])),
    )


def _several(value: object) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(map(str, value)) if isinstance(value, list) else ()
