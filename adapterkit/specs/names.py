"""Networks: which rows of which weights does a name mean?

A network is an architecture with every tensor it has; a naming is one spelling of it. A native
name stands for a span, an ordered stack of rows of canonical tensors, so a plain renaming, a
fused qkv, parts of unequal height and swapped halves are one notion. formats/networks/*.toml say
all this in a small language (formats/README.md); `adapterkit.specs.expansion` writes it out to
plain rows and proves that they form a partition. Both directions are look-ups.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import cast

from adapterkit.errors import SpecError
from adapterkit.specs.expansion import expand_network, names_in
from adapterkit.specs.paths import formats_dir
from adapterkit.specs.spans import Naming, Network, Piece, Row, Span

__all__ = ["Naming", "Network", "Piece", "Row", "Span", "network", "network_names", "parse_network"]


def network_names() -> tuple[str, ...]:
    return tuple(_files())


@cache
def network(name: str) -> Network:
    """The network of this name, read and proven once.

    Raises SpecError if there is none, or if its file is wrong.
    """
    path = _file(name)
    return expand_network(path, _document(path), name)


def _file(name: str) -> Path:
    path = _files().get(name)
    if path is None:
        near = get_close_matches(name, _files(), n=1)
        raise SpecError(
            f"no network is called `{name}`",
            code="no-network",
            hint=f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(_files())}",
        )
    return path


def parse_network(path: Path, document: Mapping[str, object]) -> list[Network]:
    """Every network of one file (one per size) from its parsed TOML. Raises SpecError."""
    networks = [expand_network(path, document, name) for name in names_in(path, document)]
    for found in networks:
        for naming in found.namings:
            found.namings[naming]
    return networks


@cache
def heads(name: str) -> tuple[str, ...]:
    """What the names of a network can begin with, in any naming: enough to rule it out at once.

    Read off the patterns as they stand, which is much quicker than writing them out.
    """
    document = _document(_file(name))
    written: set[str] = set()
    for value in document.values():
        if isinstance(value, list):
            for block in value:
                written |= {re.split(r"[.{]", text)[0] for text in _beginnings(block)}
    return tuple(written)


def _beginnings(block: Mapping[str, object]) -> Iterator[str]:
    """The texts that a block's native names begin with: its prefixes, else the names themselves."""
    if "numbered" in block:
        yield ""
    at = block.get("at")
    if at is not None:
        yield from [at] if isinstance(at, str) else cast(Iterable[str], at)
        return
    for key in ("names", "modules", "tensors", "same"):
        yield from cast(Iterable[str], block.get(key, ()))


@cache
def _files() -> dict[str, Path]:
    """Which file holds which network. Reads the headers of sizes only: parsing all would be slow."""
    files = {}
    for path in sorted((formats_dir() / "networks").glob("*.toml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        headers = (line.partition("]")[0] for line in lines if line.startswith("[sizes."))
        for name in [header.removeprefix("[sizes.") for header in headers] or [path.stem]:
            files[name] = path
    return files


@cache
def _document(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path.name}: not TOML: {error}") from error
