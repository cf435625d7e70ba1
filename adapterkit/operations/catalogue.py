"""formats and explain: what adapterkit knows, answered offline."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache
from typing import cast

from adapterkit.errors import Json, UsageError
from adapterkit.specs.families import families
from adapterkit.specs.kinds import KINDS
from adapterkit.specs.layouts import layouts
from adapterkit.specs.paths import formats_dir
from adapterkit.specs.wrappers import strip_adapter_name, wrappers


@dataclass(frozen=True)
class Format:
    """One format by the name that `--to` takes.

    reads, writes: families.  kinds: what it can say.  layout: the table behind it; a target that is
    a variation of another layout has that layout's name here.
    """

    name: str
    title: str
    summary: str
    source: str
    layout: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Meaning:
    """What a tensor's key means in one family and layout."""

    family: str
    layout: str
    component: str
    naming: str
    rows: tuple[str, ...]
    kind: str
    role: str


@dataclass(frozen=True)
class Answer:
    """topic: what was asked.  text: the answer, if it is a format or an error.  meanings: if it is a key."""

    topic: str
    text: str = ""
    meanings: tuple[Meaning, ...] = ()

    def as_json(self) -> dict[str, Json]:
        return cast(dict[str, Json], asdict(self))


def formats() -> tuple[Format, ...]:
    """Every format, in the order of their names."""
    found: dict[str, Format] = {}
    for name, layout in layouts().items():
        readers = tuple(dict.fromkeys(f.name for f in families() if name in f.spelling))
        found[name.replace("_", "-")] = Format(
            name=name.replace("_", "-"),
            title=layout.title,
            summary=layout.summary,
            source=layout.source,
            layout=name,
            reads=readers,
            writes=readers if layout.written else (),
            kinds=tuple(KINDS[kind].title for kind in layout.kinds()),
        )
    for family in families():
        for target, settings in family.targets.items():
            layout = layouts()[settings["layout"]]
            writes = tuple(dict.fromkeys(f.name for f in families() if target in f.targets))
            found.setdefault(
                target,
                Format(
                    name=target,
                    title=target,
                    summary=target_summaries()[target],
                    source=layout.source,
                    layout=layout.name,
                    reads=writes,
                    writes=writes,
                    kinds=tuple(KINDS[kind].title for kind in layout.kinds()),
                ),
            )
    return tuple(found[name] for name in sorted(found))


@cache
def target_summaries() -> Mapping[str, str]:
    """What each variation of a layout is."""
    return cast(Mapping[str, str], tomllib.loads((formats_dir() / "targets.toml").read_text("utf-8")))


@cache
def error_texts() -> Mapping[str, str]:
    """What to know about each error code."""
    return cast(Mapping[str, str], tomllib.loads((formats_dir() / "errors.toml").read_text("utf-8")))


def explain(topic: str) -> Answer:
    """Explain a format's name, an error's code, or a tensor's key.

    Raises UsageError if it is none of them.
    """
    for known in formats():
        if topic == known.name:
            return Answer(topic, _format_text(known))
    if topic in error_texts():
        return Answer(topic, error_texts()[topic])
    if meanings := key_meanings(topic):
        return Answer(topic, meanings=meanings)
    near = get_close_matches(topic, [*error_texts(), *(f.name for f in formats())], n=1)
    raise UsageError(
        f"`{topic}` is no format, no error code and no tensor's key that any table knows",
        code="unknown-topic",
        hint=f"did you mean `{near[0]}`?" if near else "`adapterkit formats` lists the formats",
    )


def _format_text(known: Format) -> str:
    lines = [known.summary, f"source: {known.source}", f"kinds: {', '.join(known.kinds)}"]
    lines.append(f"reads: {', '.join(known.reads)}")
    lines.append(f"writes: {', '.join(known.writes) or 'never'}")
    return "\n".join(lines)


def key_meanings(key: str) -> tuple[Meaning, ...]:
    """Everything that one tensor's key can mean, in every closed family and layout."""
    found: list[Meaning] = []
    for family in families():
        for name in family.spelling if not family.open else ():
            layout = layouts()[name]
            plain, _ = strip_adapter_name(wrappers().strip(key), frozenset(layout.slots))
            split = layout.split(plain)
            if split is None:
                continue
            for located in family.locate(name, layout.dot, split[0]):
                rows = tuple(
                    piece.module
                    + ("" if piece.start == 0 and piece.stop == 1 else f"[{piece.start}:{piece.stop}]")
                    for piece in located.row.span
                )
                spelling = split[1][0]
                found.append(
                    Meaning(
                        family.label,
                        layout.title,
                        located.prefix.component,
                        located.prefix.naming,
                        rows,
                        KINDS[spelling.kind].title if spelling.kind else "any kind",
                        spelling.role,
                    )
                )
    return tuple(found)
