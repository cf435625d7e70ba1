"""A network's table written out: from the patterns of formats/networks/*.toml to proven rows.

The proofs are in `adapterkit.specs.proofs`; here are those that need the text at hand: ranges
walk together, every canonical name exists, a stack does not mix modules with single tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from functools import partial
from pathlib import Path

from adapterkit.errors import SpecError
from adapterkit.specs.inventory import BARE, Inventory, build_inventory, prefixes_of
from adapterkit.specs.patterns import PartPattern, PathPattern, check_walk, parse_part, parse_path
from adapterkit.specs.proofs import cover_of, prove_names, prove_partition, prove_stack, without_respelled
from adapterkit.specs.spans import ONE, ZERO, Naming, Network, Piece, Row, Span
from adapterkit.specs.values import (
    Constants,
    Table,
    as_blocks,
    as_constants,
    as_table,
    as_text,
    as_texts,
    as_truth,
    refuse_unknown,
)

_TEXTS = ("summary", "canonical", "source")
_NOT_NAMINGS = (*_TEXTS, "sizes", "inventory")
_BLOCK_KEYS = ("at", "names", "same", "numbered", "extends", "partial", "sizes")


@dataclass(frozen=True, slots=True)
class _Scope:
    """What a naming is expanded against; `where` begins every message."""

    inventory: Inventory
    constants: Constants
    where: str


def names_in(path: Path, document: Table) -> list[str]:
    """The networks a file holds: its sizes, or itself."""
    return list(as_table(document.get("sizes", {}), f"{path.name}: sizes")) or [path.stem]


def expand_network(path: Path, document: Table, name: str) -> Network:
    """One network of a file. Raises SpecError, for a wrong row when its naming is first used."""
    where = path.name if path.stem == name else f"{path.name}: {name}"
    summary, canonical, source = (as_text(document.get(key), f"{where}: {key}") for key in _TEXTS)
    sizes = as_table(document.get("sizes", {}), f"{where}: sizes")
    constants = as_constants(sizes.get(name, {}), f"{where}: sizes")
    stock = _blocks_for(name, sizes, document.get("inventory"), f"{where}: inventory")
    inventory = build_inventory(stock, constants, f"{where}: inventory")
    namings = _Namings()
    namings.makers[canonical] = partial(_identity, canonical, inventory, f"{where}: naming `{canonical}`")
    for key in (key for key in document if key not in _NOT_NAMINGS):
        scope = _Scope(inventory, constants, f"{where}: naming `{key}`")
        if key == canonical:
            raise SpecError(f"{scope.where} is the canonical one: it is the inventory and needs no block")
        blocks = _blocks_for(name, sizes, document[key], scope.where)
        if blocks:
            # What it may extend is what was written above it.
            namings.makers[key] = partial(_naming, key, blocks, _Namings(dict(namings.makers)), scope)
    return Network(name, summary, source, canonical, inventory.shapes, namings)


class _Namings(Mapping[str, Naming]):
    """Namings that are written out and proven when they are first asked for: most files need one."""

    def __init__(self, makers: dict[str, Callable[[], Naming]] | None = None) -> None:
        self.makers = makers or {}
        self._made: dict[str, Naming] = {}

    def __getitem__(self, name: str) -> Naming:
        if name not in self._made:
            self._made[name] = self.makers[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self.makers

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


def _blocks_for(name: str, sizes: Table, value: object, where: str) -> list[Table]:
    """The blocks that hold for one size: all but those that list `sizes` without it."""
    chosen = []
    for block in as_blocks(value, where):
        listed = as_texts(block["sizes"], f"{where}: sizes") if "sizes" in block else [name]
        for size in listed:
            if size != name and size not in sizes:
                raise SpecError(f"{where}: no size is called `{size}`", hint=f"there are: {', '.join(sizes)}")
        if name in listed:
            chosen.append(block)
    return chosen


def _identity(name: str, inventory: Inventory, where: str) -> Naming:
    rows = [
        Row(module, (Piece(module),), "" if params == BARE else None)
        for module, params in inventory.params.items()
    ]
    prove_names(rows, inventory, where)
    return Naming(name, tuple(rows), partial=False)


def _naming(name: str, blocks: list[Table], known: Mapping[str, Naming], scope: _Scope) -> Naming:
    rows: list[Row] = []
    for block in blocks:
        refuse_unknown(block, _BLOCK_KEYS, scope.where)
        rows.extend(_written_rows(block, scope))
    rows.extend(_numbered_rows(blocks, scope))
    for block in blocks:
        if "extends" in block:
            written = cover_of(rows, scope.inventory)
            rows.extend(without_respelled(_base_rows(block, known, scope), written, scope.inventory))
    rows.sort(key=lambda row: _place(row.span, scope.inventory))
    partial = any(as_truth(block.get("partial", False), f"{scope.where}: partial") for block in blocks)
    prove_names(rows, scope.inventory, scope.where)
    prove_partition(rows, scope.inventory, partial, scope.where)
    return Naming(name, tuple(rows), partial)


def _base_rows(block: Table, known: Mapping[str, Naming], scope: _Scope) -> tuple[Row, ...]:
    base = as_text(block["extends"], f"{scope.where}: extends")
    if base not in known:
        raise SpecError(f"{scope.where}: extends `{base}`, which is not a naming written above it")
    return known[base].rows


def _place(span: Span, inventory: Inventory) -> tuple[int, Fraction]:
    return min((inventory.order[piece.module], piece.start) for piece in span)


def _written_rows(block: Table, scope: _Scope) -> Iterator[Row]:
    """The rows of `same` and `names`, under every prefix of `at`."""
    prefixes = list(_prefix_pairs(block["at"], scope)) if "at" in block else [("", "")]
    patterns = list(_row_patterns(block, scope))
    for left_prefix, right_prefix in prefixes:
        for natives, stack in patterns:
            for index, native in enumerate(natives):
                parts = [(part, right_prefix + names[index]) for part, names in stack]
                yield _row(left_prefix + native, parts, scope)


def _prefix_pairs(value: object, scope: _Scope) -> Iterator[tuple[str, str]]:
    for key, text in as_table(value, f"{scope.where}: at").items():
        left = parse_path(key, scope.constants, scope.where)
        right = parse_path(as_text(text, f"{scope.where}: `{key}`"), scope.constants, scope.where)
        check_walk(left, right, scope.where)
        yield from ((f"{a}.", f"{b}.") for a, b in zip(left.names(), right.names(), strict=True))


def _row_patterns(
    block: Table, scope: _Scope
) -> Iterator[tuple[list[str], list[tuple[PartPattern, list[str]]]]]:
    """Of each line: its native names, and for each part of its stack the names that walk with them."""
    for path in _paths(block["same"], scope) if "same" in block else ():
        yield path.names(), [(_whole(path), path.names())]
    for key, value in as_table(block.get("names", {}), f"{scope.where}: names").items():
        here = f"{scope.where}: `{key}`"
        path = parse_path(key, scope.constants, here)
        parts = [parse_part(text, scope.constants, here) for text in as_texts(value, here)]
        for part in parts:
            check_walk(path, part.path, scope.where)
        yield path.names(), [(part, part.path.names()) for part in parts]


def _paths(value: object, scope: _Scope) -> list[PathPattern]:
    return [parse_path(text, scope.constants, scope.where) for text in as_texts(value, scope.where)]


def _whole(path: PathPattern) -> PartPattern:
    return PartPattern(path, ZERO, ONE, 1, False)


def _numbered_rows(blocks: list[Table], scope: _Scope) -> Iterator[Row]:
    """The rows of `numbered`: the n-th module of all blocks together is natively called n."""
    where = f"{scope.where}: numbered"
    number = 0
    for block in blocks:
        table = as_table(block.get("numbered", {}), where)
        refuse_unknown(table, ("at", "names"), where)
        paths = _paths(table["names"], scope) if "names" in table else []
        for prefix in prefixes_of(table["at"], scope.constants, where) if "at" in table else [""]:
            for path in paths:
                for name in path.names():
                    yield _row(str(number), [(_whole(path), prefix + name)], scope)
                    number += 1


def _row(native: str, stack: list[tuple[PartPattern, str]], scope: _Scope) -> Row:
    pieces = []
    params: set[str | None] = set()
    for part, name in stack:
        module, param = _locate(native, name, scope)
        pieces.append(Piece(module, part.start, part.stop, part.weight, part.transposed))
        params.add(param)
    if len(params) > 1:
        raise SpecError(
            f"{scope.where}: `{native}` stacks tensors of different kinds",
            code="spec-stack",
            hint="stack modules on modules, weights on weights, biases on biases",
        )
    row = Row(native, tuple(pieces), params.pop())
    if len(stack) > 1 or not stack[0][0].plain:
        prove_stack(row, scope.inventory, scope.where)
    return row


def _locate(native: str, name: str, scope: _Scope) -> tuple[str, str | None]:
    place = scope.inventory.locate(name)
    if place is None:
        near = get_close_matches(name, scope.inventory.params, n=1)
        raise SpecError(
            f"{scope.where}: `{native}`: the model has no `{name}`",
            code="spec-unknown-name",
            hint=f"did you mean `{near[0]}`?" if near else "the inventory lists what it has",
        )
    return place
