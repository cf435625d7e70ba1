"""Networks made small, and tables with one mistake each: what the tests of networks/*.toml share.

A row-id map (oracle_rows) is only as good as the mistakes it notices. `mutants` makes every
simple one: a row or a prefix left out, two of them exchanged, two parts of a stack exchanged.
"""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from oracle_rows import RowMap, rows_of

from adapterkit.errors import SpecError
from adapterkit.specs.names import Network, parse_network
from adapterkit.specs.paths import formats_dir

Document = dict[str, Any]


def lowered(network: Network, factor: int, keep: Collection[str] = ()) -> Network:
    """The network with every dimension that `factor` divides divided by it, but for the modules in `keep`.

    Names, parts and the proportions of stacks stay.
    """
    shapes = {
        name: shape
        if name.rpartition(".")[0] in keep
        else tuple(n // factor if n % factor == 0 else n for n in shape)
        for name, shape in network.shapes.items()
    }
    return replace(network, shapes=shapes)


def read_document(file: str) -> Document:
    return tomllib.loads((formats_dir() / "networks" / file).read_text(encoding="utf-8"))


def survivors(file: str, naming: str, factor: int) -> list[str]:
    """The mistakes in `naming` that neither the proofs nor the row map of the right table notice."""
    document = read_document(file)
    truths: dict[str, RowMap] = {}
    unnoticed = []
    for label, size, mutant in mutants(document, naming, file.removesuffix(".toml")):
        if size not in truths:
            truths[size] = _rows(document, file, size, naming, factor)
        try:
            noticed = _rows(mutant, file, size, naming, factor) != truths[size]
        except SpecError:
            noticed = True
        if not noticed:
            unnoticed.append(label)
    return unnoticed


def mutants(document: Document, naming: str, name: str) -> Iterator[tuple[str, str, Document]]:
    """(what is wrong, a network it shows in, the wrong document), for every row of every block.

    name: the network, of a file without sizes.
    """
    for number, block in enumerate(document[naming]):
        size = block.get("sizes", list(document.get("sizes", {name: {}})))[0]
        for label, changed in _changed_blocks(block):
            mutant = copy.copy(document)
            mutant[naming] = [changed if i == number else other for i, other in enumerate(document[naming])]
            yield f"block {number}: {label}", size, mutant


def _changed_blocks(block: Document) -> Iterator[tuple[str, Document]]:
    for key in ("names", "at"):
        for label, table in _changed_tables(block.get(key, {})):
            yield label, _with(block, (key,), table)
    for path in (("same",), ("numbered", "names"), ("numbered", "at")):
        items = block.get(path[0], [])
        items = items.get(path[1], []) if isinstance(items, dict) else items
        items = items if isinstance(items, list) else []
        for k in range(len(items)):
            yield f"without `{items[k]}`", _with(block, path, items[:k] + items[k + 1 :])
            if path[0] == "numbered" and k + 1 < len(items):
                yield f"`{items[k]}` exchanged with the next", _with(block, path, _exchanged(items, k))


def _changed_tables(table: Document) -> Iterator[tuple[str, Document]]:
    rows = list(table.items())
    for i, (native, parts) in enumerate(rows):
        yield f"without `{native}`", dict(rows[:i] + rows[i + 1 :])
        if isinstance(parts, list):
            for k in range(len(parts) - 1):
                yield f"`{native}` in another order", {**table, native: _exchanged(parts, k)}
        if i + 1 < len(rows):
            yield (
                f"`{native}` exchanged with the next",
                {**table, native: rows[i + 1][1], rows[i + 1][0]: parts},
            )


def _exchanged(items: list[str], k: int) -> list[str]:
    return [*items[:k], items[k + 1], items[k], *items[k + 2 :]]


def _with(block: Document, path: tuple[str, ...], value: object) -> Document:
    """A copy of the block with `value` at `path`."""
    if len(path) == 1:
        return {**block, path[0]: value}
    return {**block, path[0]: _with(block[path[0]], path[1:], value)}


def _rows(document: Document, file: str, size: str, naming: str, factor: int) -> RowMap:
    """The row map of one naming, read without the others it does not extend."""
    kept = {"summary", "canonical", "source", "sizes", "inventory", naming}
    kept |= {block["extends"] for block in document[naming] if "extends" in block}
    alone = {key: value for key, value in document.items() if key in kept}
    networks = {one.name: one for one in parse_network(formats_dir() / "networks" / file, alone)}
    return rows_of(lowered(networks[size], factor), naming)
