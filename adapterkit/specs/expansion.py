"""A network's table written out: from the patterns of formats/networks/*.toml to proven rows.

Expansion proves, each with a message of its own: ranges walk together; every canonical name
exists; the parts of a stack fit on each other; no native name occurs twice, neither as written
nor with every dot written `_`; no canonical row is covered twice; every one is covered, unless
the naming says it is partial.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path

from adapterkit.errors import SpecError
from adapterkit.specs.patterns import (
    Constants,
    PartPattern,
    PathPattern,
    check_walk,
    parse_part,
    parse_path,
    parse_shape,
)
from adapterkit.specs.spans import ONE, ZERO, Naming, Network, Piece, Row, Span

Table = Mapping[str, object]

_TEXTS = ("summary", "canonical", "source")
_BLOCK_KEYS = frozenset({"at", "names", "same", "numbered", "extends", "partial", "sizes"})


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the canonical model has.

    shapes: every tensor's shape.
    params: module -> ("weight",) or ("weight", "bias"); bare parameter -> ("",).
    order: module or bare parameter -> its place in the model.
    """

    shapes: dict[str, tuple[int, ...]]
    params: dict[str, tuple[str, ...]]
    order: dict[str, int]

    def locate(self, name: str) -> tuple[str, str | None] | None:
        """(module, param) of a canonical name as a row writes it; None if the model has no such thing."""
        params = self.params.get(name)
        if params is not None:
            return name, "" if params == ("",) else None
        module, _, param = name.rpartition(".")
        if param in self.params.get(module, ()):
            return module, param
        return None

    def tensors(self, module: str, param: str | None) -> list[str]:
        """The canonical tensors a row of this module and param stands for."""
        return [tensor_name(module, p) for p in (self.params[module] if param is None else (param,))]


def tensor_name(module: str, param: str) -> str:
    return f"{module}.{param}" if param else module


def names_in(path: Path, document: Table) -> list[str]:
    """The networks a file holds: its sizes, or itself."""
    return list(_table(document.get("sizes", {}), f"{path.name}: sizes")) or [path.stem]


def expand_network(path: Path, document: Table, name: str) -> Network:
    """One network of a file, all its namings written out and proven. Raises SpecError."""
    where = path.name if path.stem == name else f"{path.name}: {name}"
    texts = {key: _text(document.get(key), f"{where}: {key}") for key in _TEXTS}
    constants = _constants(document, name, where)
    inventory = _inventory(document, name, constants, where)
    canonical = texts["canonical"]
    namings = {canonical: _identity(canonical, inventory, where)}
    for key, value in document.items():
        if key in (*_TEXTS, "sizes", "inventory"):
            continue
        if key == canonical:
            raise SpecError(
                f"{where}: naming `{key}` is canonical, so it is the inventory; leave its block out"
            )
        here = f"{where}: naming `{key}`"
        blocks = _blocks_for(name, _tables(value, here), document, here)
        if blocks:
            namings[key] = _naming(key, blocks, namings, inventory, constants, here)
    return Network(name, texts["summary"], texts["source"], canonical, inventory.shapes, namings)


def _constants(document: Table, name: str, where: str) -> Constants:
    sizes = _table(document.get("sizes", {}), f"{where}: sizes")
    constants: dict[str, int | str] = {}
    for key, value in _table(sizes.get(name, {}), f"{where}: sizes").items():
        if not isinstance(value, int | str) or isinstance(value, bool):
            raise SpecError(f"{where}: size `{name}`: `{key}` must be an integer or a text")
        constants[key] = value
    return constants


def _blocks_for(name: str, blocks: list[Table], document: Table, where: str) -> list[Table]:
    """The blocks that hold for one size: all but those that list `sizes` without it."""
    known = _table(document.get("sizes", {}), f"{where}: sizes")
    chosen = []
    for block in blocks:
        sizes = _part_texts(block["sizes"], f"{where}: sizes") if "sizes" in block else [name]
        for size in sizes:
            if size not in known and size != name:
                raise SpecError(f"{where}: no size is called `{size}`", hint=f"there are: {', '.join(known)}")
        if name in sizes:
            chosen.append(block)
    return chosen


# The inventory


def _inventory(document: Table, name: str, constants: Constants, where: str) -> Inventory:
    shapes: dict[str, tuple[int, ...]] = {}
    params: dict[str, tuple[str, ...]] = {}
    blocks = _tables(document.get("inventory"), f"{where}: inventory")
    for block in _blocks_for(name, blocks, document, f"{where}: inventory"):
        _refuse_unknown(block, {"at", "modules", "tensors", "sizes"}, f"{where}: inventory")
        prefixes = _prefixes(block.get("at", []), constants, f"{where}: inventory")
        for kind in ("modules", "tensors"):
            table = _table(block.get(kind, {}), f"{where}: inventory")
            entries = [_entry(key, text, constants, f"{where}: inventory") for key, text in table.items()]
            for prefix in prefixes:
                for names, shape, has_bias in entries:
                    for module in names:
                        _add(prefix + module, kind, shape, has_bias, shapes, params, f"{where}: inventory")
    return Inventory(shapes, params, {module: place for place, module in enumerate(params)})


def _entry(
    key: str, text: object, constants: Constants, where: str
) -> tuple[list[str], tuple[int, ...], bool]:
    names = parse_path(key, constants, where).names()
    return names, *parse_shape(_text(text, f"{where}: `{key}`"), constants, f"{where}: `{key}`")


def _add(
    name: str,
    kind: str,
    shape: tuple[int, ...],
    has_bias: bool,
    shapes: dict[str, tuple[int, ...]],
    params: dict[str, tuple[str, ...]],
    where: str,
) -> None:
    if name in params or name in shapes:
        raise SpecError(f"{where}: `{name}` is there twice", code="spec-duplicate")
    if kind == "tensors":
        if has_bias:
            raise SpecError(f"{where}: the bare parameter `{name}` cannot have a bias")
        params[name] = ("",)
        shapes[name] = shape
        return
    params[name] = ("weight", "bias") if has_bias else ("weight",)
    shapes[f"{name}.weight"] = shape
    if has_bias:
        shapes[f"{name}.bias"] = shape[:1]


def _identity(name: str, inventory: Inventory, where: str) -> Naming:
    rows = tuple(
        Row(module, (Piece(module),), "" if params == ("",) else None)
        for module, params in inventory.params.items()
    )
    _prove_names(rows, inventory, f"{where}: naming `{name}`")
    return Naming(name, rows, partial=False)


# A naming


def _naming(
    name: str,
    blocks: list[Table],
    known: Mapping[str, Naming],
    inventory: Inventory,
    constants: Constants,
    where: str,
) -> Naming:
    rows: list[Row] = []
    bases: list[str] = []
    partial = False
    for block in blocks:
        _refuse_unknown(block, _BLOCK_KEYS, where)
        rows.extend(_written_rows(block, inventory, constants, where))
        rows.extend(_numbered_rows(block, rows, inventory, constants, where))
        partial = partial or block.get("partial") is True
        if "extends" in block:
            bases.append(_text(block["extends"], f"{where}: extends"))
    for base in bases:
        if base not in known:
            raise SpecError(f"{where}: extends `{base}`, which is not a naming written above it")
        rows.extend(_not_respelled(known[base].rows, _cover(rows, inventory), inventory))
    rows.sort(key=lambda row: _place(row.span, inventory))
    _prove_names(rows, inventory, where)
    _prove_partition(_cover(rows, inventory), inventory, partial, where)
    return Naming(name, tuple(rows), partial)


def _written_rows(block: Table, inventory: Inventory, constants: Constants, where: str) -> Iterator[Row]:
    """The rows of `names` and `same`, under every prefix of `at`."""
    prefixes = _prefix_pairs(block["at"], constants, f"{where}: at") if "at" in block else [("", "")]
    patterns = list(_row_patterns(block, constants, where))
    for left_prefix, right_prefix in prefixes:
        for natives, stack in patterns:
            for index, native in enumerate(natives):
                parts = [(part, right_prefix + names[index]) for part, names in stack]
                yield _row(left_prefix + native, parts, inventory, where)


def _prefix_pairs(value: object, constants: Constants, where: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, text in _table(value, where).items():
        left = parse_path(key, constants, where)
        right = parse_path(_text(text, f"{where}: `{key}`"), constants, where)
        check_walk(left, right, where)
        pairs += [(f"{a}.", f"{b}.") for a, b in zip(left.names(), right.names(), strict=True)]
    return pairs


def _row_patterns(
    block: Table, constants: Constants, where: str
) -> Iterator[tuple[list[str], list[tuple[PartPattern, list[str]]]]]:
    """Of each line: its native names, and for each part of its stack the names that walk with them."""
    for path in _paths(block.get("same", []), constants, f"{where}: same"):
        yield path.names(), [(_whole(path), path.names())]
    for key, value in _table(block.get("names", {}), f"{where}: names").items():
        path = parse_path(key, constants, where)
        texts = _part_texts(value, f"{where}: `{key}`")
        parts = [parse_part(text, constants, f"{where}: `{key}`") for text in texts]
        for part in parts:
            check_walk(path, part.path, where)
        yield path.names(), [(part, part.path.names()) for part in parts]


def _whole(path: PathPattern) -> PartPattern:
    return PartPattern(path, ZERO, ONE, 1, False)


def _numbered_rows(
    block: Table, before: list[Row], inventory: Inventory, constants: Constants, where: str
) -> Iterator[Row]:
    """The rows of `numbered`: the n-th of its modules is natively called n, counting through all blocks."""
    table = _table(block.get("numbered", {}), f"{where}: numbered")
    _refuse_unknown(table, {"at", "names"}, f"{where}: numbered")
    number = sum(row.native.isdecimal() for row in before)
    paths = _paths(table.get("names", []), constants, f"{where}: numbered")
    for prefix in _prefixes(table.get("at", []), constants, f"{where}: numbered"):
        for path in paths:
            for name in path.names():
                yield _row(str(number), [(_whole(path), prefix + name)], inventory, where)
                number += 1


def _row(native: str, stack: list[tuple[PartPattern, str]], inventory: Inventory, where: str) -> Row:
    pieces, param = [], None
    for index, (part, name) in enumerate(stack):
        place = inventory.locate(name)
        if place is None:
            near = get_close_matches(name, inventory.params, n=1)
            raise SpecError(
                f"{where}: `{native}`: the model has no `{name}`",
                code="spec-unknown-name",
                hint=f"did you mean `{near[0]}`?" if near else "the inventory lists what it has",
            )
        if index and place[1] != param:
            raise SpecError(f"{where}: `{native}` stacks a module and a single tensor", code="spec-stack")
        param = place[1]
        pieces.append(Piece(place[0], part.start, part.stop, part.weight, part.transposed))
    row = Row(native, tuple(pieces), param)
    if len(pieces) != 1 or pieces[0].transposed or pieces[0].stop is not ONE or pieces[0].start is not ZERO:
        _prove_stack(row, inventory, where)
    return row


def _place(span: Span, inventory: Inventory) -> tuple[int, Fraction]:
    return min((inventory.order[piece.module], piece.start) for piece in span)


# Proofs

Cover = dict[str, list[tuple[Fraction, Fraction, str]]]


def _cover(rows: list[Row], inventory: Inventory) -> Cover:
    """Canonical tensor -> (start, stop, native) of every piece that covers some of it."""
    cover: Cover = {}
    for row in rows:
        for piece in row.span:
            for tensor in inventory.tensors(piece.module, row.param):
                cover.setdefault(tensor, []).append((piece.start, piece.stop, row.native))
    return cover


def _not_respelled(rows: tuple[Row, ...], cover: Cover, inventory: Inventory) -> list[Row]:
    """The rows that share no canonical row with those already written."""

    def is_respelled(row: Row) -> bool:
        return any(
            start < piece.stop and piece.start < stop
            for piece in row.span
            for tensor in inventory.tensors(piece.module, row.param)
            for start, stop, _ in cover.get(tensor, ())
        )

    return [row for row in rows if not is_respelled(row)]


def _prove_stack(row: Row, inventory: Inventory, where: str) -> None:
    """The pieces must fit on each other: same tensors, same width, heights as their weights say."""
    where = f"{where}: `{row.native}`"
    if any(piece.transposed for piece in row.span):
        _prove_transposed(row, inventory, where)
    first = row.span[0]
    for piece in row.span:
        if row.param is None and inventory.params[piece.module] != inventory.params[first.module]:
            raise SpecError(f"{where} stacks a module with a bias and one without", code="spec-stack")
        for a, b in zip(
            inventory.tensors(piece.module, row.param),
            inventory.tensors(first.module, row.param),
            strict=True,
        ):
            shape, other = inventory.shapes[a], inventory.shapes[b]
            height, other_height = (
                (piece.stop - piece.start) * shape[0],
                (first.stop - first.start) * other[0],
            )
            if height.denominator != 1:
                raise SpecError(f"{where}: the {shape[0]} rows of `{a}` do not divide so", code="spec-parts")
            if shape[1:] != other[1:]:
                raise SpecError(f"{where}: `{a}` {shape} does not fit on `{b}` {other}", code="spec-stack")
            if height * first.weight != other_height * piece.weight:
                raise SpecError(
                    f"{where}: `{a}` gives {height} rows and `{b}` {other_height}, "
                    f"but their weights are {piece.weight} and {first.weight}",
                    code="spec-stack",
                )


def _prove_transposed(row: Row, inventory: Inventory, where: str) -> None:
    piece = row.span[0]
    if len(row.span) > 1 or piece.start != 0 or piece.stop != 1:
        raise SpecError(f"{where}: .T stands alone, never in a stack or on a part", code="spec-transposed")
    if row.param is None:
        raise SpecError(
            f"{where}: a module cannot be transposed, only its weight",
            code="spec-transposed",
            hint=f"write `{piece.module}.weight.T`, and a row for the bias if there is one",
        )
    tensor = tensor_name(piece.module, row.param)
    if len(inventory.shapes[tensor]) != 2:
        raise SpecError(f"{where}: only a matrix can be transposed", code="spec-transposed")


def _prove_names(rows: tuple[Row, ...] | list[Row], inventory: Inventory, where: str) -> None:
    """No native name twice, as a row, as a tensor, or with every dot written `_`."""
    seen: set[str] = set()
    flat: dict[str, str] = {}
    for row in rows:
        params = inventory.params[row.span[0].module] if row.param is None else ("",)
        for native in (row.native, *(tensor_name(row.native, param) for param in params if param)):
            if native in seen:
                raise SpecError(f"{where}: `{native}` is spelled twice", code="spec-duplicate")
            seen.add(native)
        other = flat.setdefault(row.native.replace(".", "_"), row.native)
        if other != row.native:
            raise SpecError(
                f"{where}: `{other}` and `{row.native}` are one name once flattened", code="spec-flat"
            )


def _prove_partition(cover: Cover, inventory: Inventory, partial: bool, where: str) -> None:
    """No canonical row covered twice, and every one covered unless the naming is partial."""
    for tensor, shares in cover.items():
        reached, before = ZERO, ""
        for start, stop, native in sorted(shares) if len(shares) > 1 else shares:
            if start < reached:
                raise SpecError(
                    f"{where}: `{before}` and `{native}` both cover rows of `{tensor}`", code="spec-overlap"
                )
            if start > reached and not partial:
                raise _gap(tensor, reached, start, where)
            reached, before = stop, native
        if reached is not ONE and reached != 1 and not partial:
            raise _gap(tensor, reached, ONE, where)
    missing = [tensor for tensor in inventory.shapes if tensor not in cover]
    if missing and not partial:
        raise SpecError(
            f"{where}: {len(missing)} of {len(inventory.shapes)} tensors have no name: "
            f"{', '.join(f'`{tensor}`' for tensor in missing[:3])}{' …' if len(missing) > 3 else ''}",
            code="spec-partial",
            hint="add their rows, or say partial = true",
        )


def _gap(tensor: str, start: Fraction, stop: Fraction, where: str) -> SpecError:
    return SpecError(
        f"{where}: the rows {start} to {stop} of `{tensor}` have no name",
        code="spec-partial",
        hint="add their parts, or say partial = true",
    )


# Values of the TOML, checked


def _table(value: object, where: str) -> Table:
    if not isinstance(value, dict):
        raise SpecError(f"{where} must be a table")
    return value


def _tables(value: object, where: str) -> list[Table]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise SpecError(f"{where} must be one or more blocks, written [[…]]")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise SpecError(f"{where} must be a text")
    return value


def _part_texts(value: object, where: str) -> list[str]:
    """One text, or a list of them."""
    items = value if isinstance(value, list) else [value]
    if not items:
        raise SpecError(f"{where} stands for nothing")
    return [_text(item, where) for item in items]


def _paths(value: object, constants: Constants, where: str) -> list[PathPattern]:
    texts = [] if value == [] else _part_texts(value, where)
    return [parse_path(text, constants, where) for text in texts]


def _prefixes(value: object, constants: Constants, where: str) -> list[str]:
    """The prefixes a list of paths stands for, each with its dot; the empty one if there is none."""
    paths = _paths(value, constants, where)
    return [f"{name}." for path in paths for name in path.names()] if paths else [""]


def _refuse_unknown(table: Table, allowed: set[str] | frozenset[str], where: str) -> None:
    unknown = [key for key in table if key not in allowed]
    if unknown:
        raise SpecError(
            f"{where}: `{unknown[0]}` is not known here", hint=f"known: {', '.join(sorted(allowed))}"
        )
