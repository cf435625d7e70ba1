"""Families: a base model's networks, and which prefix of a layout means which of them.

Read from formats/families/*.toml. A family with sizes (SD 3 medium, 3.5 large) is loaded once
per size: to every other part of the program each is a family of its own.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol, cast

from adapterkit.errors import SpecError, UsageError
from adapterkit.specs.layouts import ScaleHome, layouts
from adapterkit.specs.names import Network, Piece, Row, Span, heads, network
from adapterkit.specs.paths import formats_dir

ANY = "*"
_TOP_KEYS = frozenset(
    ["title", "open", "config", "components", "sizes", "evidence", "spelling", "targets", "checkpoint"]
)


class Names(Protocol):
    """What a naming offers: look-ups in both directions."""

    def find(self, native: str, dot: str = ".") -> Row | None: ...
    def at(self, span: Span, param: str) -> Row | None: ...
    def covering(self, module: str) -> tuple[Row, ...]: ...


class OpenNames:
    """Every dotted name is its own canonical name: the naming of a model without a table."""

    def find(self, native: str, dot: str = ".") -> Row | None:
        if dot != "." or not native or native.startswith("."):
            return None
        return Row(native, (Piece(native),), None)

    def at(self, span: Span, param: str) -> Row | None:
        return Row(span[0].module, span, None) if len(span) == 1 else None

    def covering(self, module: str) -> tuple[Row, ...]:
        return (Row(module, (Piece(module),), None),)


@dataclass(frozen=True, slots=True)
class Prefix:
    """`text` in front of a module name means: this component, in this naming."""

    text: str
    component: str
    naming: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a change acts: rows of canonical modules of one component, and which parameter.

    param is "weight", "bias", or "" for a bare parameter.
    """

    component: str
    span: Span
    param: str


@dataclass(frozen=True, slots=True)
class Located:
    """A module name found in a family: by which prefix, at which row of which naming."""

    prefix: Prefix
    row: Row


@dataclass(frozen=True)
class Target:
    """What `--to NAME` means for one family: a layout, and per component a prefix and a naming."""

    name: str
    layout: str
    prefixes: Mapping[str, Prefix]
    scale: ScaleHome


@dataclass(frozen=True, eq=False)
class Family:
    """One base model (in one size).

    components: component -> network's name, or ANY.  spelling: layout's name -> prefixes, the
    first listed for a component is the one written.  targets: named variations of a layout.
    evidence: metadata key -> beginnings of values that speak for this family.
    checkpoint: what prefixes mean in base models, whose tensors stand under the networks' own names.
    config: a field that only the config.json of such models has.
    """

    name: str
    title: str
    components: Mapping[str, str]
    spelling: Mapping[str, tuple[Prefix, ...]]
    size: str = ""
    open: bool = False
    evidence: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    targets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    checkpoint: tuple[Prefix, ...] = ()
    config: str = ""

    @property
    def label(self) -> str:
        """The name for people: the size where there is one, else the title."""
        return self.size or self.title

    @property
    def key(self) -> str:
        """The name by which `family` finds exactly this one."""
        return self.size or self.name

    def network(self, component: str) -> Network | None:
        """The component's network, or None in an open family."""
        name = self.components[component]
        return None if name == ANY else network(name)

    def names(self, component: str, naming: str) -> Names:
        found = self.network(component)
        if found is None:
            return OpenNames()
        if naming not in found.namings:
            raise SpecError(f"{self.name}.toml: network `{found.name}` has no naming `{naming}`")
        return found.namings[naming]

    @cached_property
    def _longest_first(self) -> dict[str, tuple[Prefix, ...]]:
        return {
            layout: tuple(sorted(prefixes, key=lambda p: -len(p.text)))
            for layout, prefixes in self.spelling.items()
        }

    def locate(self, layout: str, dot: str, stem: str) -> tuple[Located, ...]:
        """Every row that a module's name can mean in this layout; () if none.

        Only the longest prefix that leads anywhere counts.
        """
        found: list[Located] = []
        for prefix in self._longest_first.get(layout, ()):
            if found and len(prefix.text) < len(found[0].prefix.text):
                break
            if stem.startswith(prefix.text) and self._may_know(prefix, stem):
                row = self.names(prefix.component, prefix.naming).find(stem[len(prefix.text) :], dot)
                if row is not None:
                    found.append(Located(prefix, row))
        return tuple(found)

    def _may_know(self, prefix: Prefix, stem: str) -> bool:
        """Whether a name begins as one of the network's: told without writing its table out."""
        name = self.components[prefix.component]
        if name == ANY:
            # A flattened name that no table knows is not a module's own name in an unknown model.
            return prefix.text != "" or not stem.startswith(flat_beginnings())
        return stem.startswith(heads(name), len(prefix.text))

    def target_names(self) -> tuple[str, ...]:
        """What `--to` accepts for this family."""
        written = [name.replace("_", "-") for name in self.spelling if layouts()[name].written]
        return tuple(dict.fromkeys(sorted([*written, *self.targets])))

    def target(self, name: str) -> Target:
        """The target called `name`; UsageError lists those there are."""
        if name not in self.target_names():
            raise UsageError(
                f"`{self.name}` cannot be written as `{name}`",
                code="unknown-target",
                hint=f"formats for {self.label}: {', '.join(self.target_names())}",
            )
        settings = dict(self.targets.get(name, {"layout": name.replace("-", "_")}))
        layout = settings.pop("layout")
        scale = cast(ScaleHome, settings.pop("scale", layouts()[layout].scale))
        prefixes: dict[str, Prefix] = {}
        for prefix in self.spelling[layout]:
            prefixes.setdefault(prefix.component, prefix)
        for component, spelled in settings.items():
            prefixes[component] = _prefix(*spelled.split(" "))
        return Target(name, layout, prefixes, scale)


def _prefix(text: str, named: str) -> Prefix:
    component, _, naming = named.partition(".")
    return Prefix(text, component, naming)


def _prefixes(table: Mapping[str, object]) -> tuple[Prefix, ...]:
    return tuple(
        _prefix(text, named)
        for text, value in table.items()
        for named in (cast(list[str], value) if isinstance(value, list) else [cast(str, value)])
    )


def parse_family(name: str, document: Mapping[str, object], where: str) -> tuple[Family, ...]:
    """A family, once per size; SpecError for settings nobody knows."""
    if unknown := set(document) - _TOP_KEYS:
        raise SpecError(f"{where}: unknown settings {sorted(unknown)}")
    spelling = {
        layout: _prefixes(table)
        for layout, table in cast(dict[str, dict[str, object]], document.get("spelling", {})).items()
    }
    components = cast(dict[str, str], document["components"])
    sizes = cast(dict[str, dict[str, str]], document.get("sizes", {"": {}}))
    evidence = cast(dict[str, list[str]], document.get("evidence", {}))
    families = tuple(
        Family(
            name=name,
            title=str(document["title"]),
            components={**own, **components},
            spelling=spelling,
            size=size,
            open=bool(document.get("open", False)),
            evidence={key: tuple(values) for key, values in evidence.items()},
            targets=cast(dict[str, dict[str, str]], document.get("targets", {})),
            checkpoint=_prefixes(cast(dict[str, object], document.get("checkpoint", {}))),
            config=str(document.get("config", "")),
        )
        for size, own in sizes.items()
    )
    for family in families:
        _prove(family, where)
    return families


def _prove(family: Family, where: str) -> None:
    """Layouts and components that the family speaks of exist. Naming names are proven on use."""
    for layout, prefixes in family.spelling.items():
        if layout not in layouts():
            raise SpecError(f"{where}: there is no layout `{layout}`", hint=f"layouts: {sorted(layouts())}")
        for prefix in prefixes:
            if prefix.component not in family.components:
                raise SpecError(f"{where}: spelling.{layout}: `{prefix.component}` is no component")
    for prefix in family.checkpoint:
        if prefix.component not in family.components:
            raise SpecError(f"{where}: checkpoint: `{prefix.component}` is no component")
    for name, settings in family.targets.items():
        if settings.get("layout") not in family.spelling:
            raise SpecError(f"{where}: target `{name}` names no layout of this family")


@cache
def families() -> tuple[Family, ...]:
    """Every family under formats/families, sizes apart, in the order of their names."""
    found: list[Family] = []
    for path in sorted((formats_dir() / "families").glob("*.toml")):
        found += parse_family(path.stem, _load(path), path.name)
    return tuple(found)


def _load(path: Path) -> Mapping[str, object]:
    return tomllib.loads(path.read_text("utf-8"))


@cache
def flat_beginnings() -> tuple[str, ...]:
    """The first words of flattened names, such as `lora_`: no model calls a module so."""
    texts = {
        prefix.text
        for known in families()
        for layout, prefixes in known.spelling.items()
        if layouts()[layout].dot != "."
        for prefix in prefixes
    }
    return tuple(sorted({f"{text.partition('_')[0]}_" for text in texts}))


def family(name: str) -> tuple[Family, ...]:
    """The sizes of the family called `name` (or the one size called so); UsageError if there is none."""
    found = tuple(f for f in families() if name in (f.name, f.size))
    if not found:
        known = sorted({f.name for f in families()})
        raise UsageError(f"there is no family `{name}`", hint=f"families: {', '.join(known)}")
    return found
