"""Blocks: the parts of a network that people weigh, and that tables are set out by.

Read from formats/blocks/*.toml; formats/README.md describes the language.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise

from adapterkit.errors import SpecError
from adapterkit.specs.families import Family
from adapterkit.specs.names import network
from adapterkit.specs.paths import formats_dir
from adapterkit.specs.patterns import check_walk, parse_path
from adapterkit.specs.values import Table, as_table, as_text, as_texts, refuse_unknown

_TOP_KEYS = ("summary", "source", "networks", "naming", "rest", "components", "blocks", "orders", "presets")


@dataclass(frozen=True, eq=False)
class Blocks:
    """How some networks of one structure are divided.

    naming: the naming of `starts`.  starts: the beginning of a native name -> its block.
    components: the family's other components -> the block that each is in whole.
    rest: the block of what no beginning names; "" if that is in none.
    orders: the lists of block weights, by name.  presets: weights, as many as an order is long.
    """

    name: str
    networks: tuple[str, ...]
    naming: str
    starts: Mapping[str, str]
    components: Mapping[str, str] = field(default_factory=dict)
    rest: str = ""
    orders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    presets: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Every block, in the order of tables: that of the longest list, else of the file."""
        longest = max(self.orders.values(), key=len, default=())
        beside = [*self.components.values(), self.rest] if self.rest else self.components.values()
        return tuple(dict.fromkeys([*longest, *beside, *self.starts.values()]))

    def order(self, length: int) -> tuple[str, ...] | None:
        """The blocks that a list of so many weights counts."""
        return next((labels for labels in self.orders.values() if len(labels) == length), None)

    def by_module(self, network_name: str) -> Mapping[str, str]:
        """Canonical module -> block, for one of the networks; without those that are in none."""
        return _by_module(self.name, network_name)


def block_of(family: Family, component: str, module: str) -> str:
    """The block that a canonical module is in: "IN04", "M00", "D07", "layers.12".

    Where no table divides the network it is the first numbered part of the name, else the component.
    """
    blocks = blocks_of(family)
    if blocks is not None:
        if component in blocks.components:
            return blocks.components[component]
        if family.components[component] in blocks.networks:
            return blocks.by_module(family.components[component]).get(module, blocks.rest or component)
    return _numbered_part(module) or component


def blocks_of(family: Family) -> Blocks | None:
    """The table that divides the family's network; None if there is none."""
    networks = family.components.values()
    return next((table for table in all_blocks() if not set(table.networks).isdisjoint(networks)), None)


def _numbered_part(module: str) -> str:
    """`layers.12` of `model.layers.12.mlp.up`; "" if no part is a number."""
    pairs = pairwise(module.split("."))
    return next((f"{name}.{number}" for name, number in pairs if number.isdecimal()), "")


@cache
def all_blocks() -> tuple[Blocks, ...]:
    """Every table under formats/blocks. Raises SpecError."""
    paths = sorted((formats_dir() / "blocks").glob("*.toml"))
    return tuple(parse_blocks(path.stem, tomllib.loads(path.read_text("utf-8")), path.name) for path in paths)


def parse_blocks(name: str, document: Table, where: str) -> Blocks:
    """One table. Raises SpecError for settings nobody knows, and for lists of blocks that are not there."""
    refuse_unknown(document, _TOP_KEYS, where)
    for key in ("summary", "source"):
        as_text(document.get(key), f"{where}: {key}")
    components = as_table(document.get("components", {}), f"{where}: components")
    orders = as_table(document.get("orders", {}), f"{where}: orders")
    presets = as_table(document.get("presets", {}), f"{where}: presets")
    blocks = Blocks(
        name=name,
        networks=tuple(as_texts(document.get("networks"), f"{where}: networks")),
        naming=as_text(document.get("naming"), f"{where}: naming"),
        starts=dict(_starts(as_table(document.get("blocks"), f"{where}: blocks"), f"{where}: blocks")),
        components={key: as_text(label, f"{where}: {key}") for key, label in components.items()},
        rest=as_text(document["rest"], f"{where}: rest") if "rest" in document else "",
        orders={key: tuple(_labels(texts, f"{where}: {key}")) for key, texts in orders.items()},
        presets={key: _numbers(text, f"{where}: {key}") for key, text in presets.items()},
    )
    _prove(blocks, where)
    return blocks


def _starts(table: Table, where: str) -> Iterator[tuple[str, str]]:
    """Beginning and block, the n-th range of the block's label walking with the n-th of the beginning."""
    for label, value in table.items():
        for text in as_texts(value, f"{where}: `{label}`"):
            left, right = parse_path(label, {}, where), parse_path(text, {}, where)
            if left.ranges:
                check_walk(left, right, where)
            labels = left.names() if left.ranges else left.names() * len(right.names())
            yield from zip(right.names(), labels, strict=True)


def _labels(value: object, where: str) -> Iterator[str]:
    for text in as_texts(value, where):
        yield from parse_path(text, {}, where).names()


def _numbers(value: object, where: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in as_text(value, where).split(","))
    except ValueError as error:
        raise SpecError(f"{where}: `{value}` is not a list of numbers") from error


def _prove(blocks: Blocks, where: str) -> None:
    """Lists name blocks that there are, each once; presets are as long as a list, lists differ in length."""
    known = {*blocks.starts.values(), *blocks.components.values(), blocks.rest}
    for name, order in blocks.orders.items():
        if unknown := set(order) - known:
            raise SpecError(f"{where}: order `{name}` lists {sorted(unknown)}, which are no blocks")
        if len(set(order)) < len(order):
            raise SpecError(f"{where}: order `{name}` lists a block twice", code="spec-duplicate")
    lengths = [len(order) for order in blocks.orders.values()]
    if len(set(lengths)) < len(lengths):
        raise SpecError(f"{where}: two orders are of one length, so a list could mean either")
    for name, weights in blocks.presets.items():
        if len(weights) not in lengths:
            raise SpecError(f"{where}: preset `{name}` has {len(weights)} numbers; the orders have {lengths}")


@cache
def _by_module(table: str, network_name: str) -> Mapping[str, str]:
    blocks = next(known for known in all_blocks() if known.name == table)
    naming = network(network_name).namings[blocks.naming]
    found: dict[str, str] = {}
    for row in naming.rows:
        label = _longest_start(row.native.split("."), blocks.starts) or blocks.rest
        if label:
            found.update((piece.module, label) for piece in row.span)
    return found


def _longest_start(parts: Sequence[str], starts: Mapping[str, str]) -> str:
    """The block of the longest beginning of a dotted name that has one; "" if none has."""
    beginnings = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((starts[beginning] for beginning in beginnings if beginning in starts), "")
