"""What must hold of a naming's rows; each proof has a message and a code of its own.

The parts of a stack fit on each other; no native name occurs twice, neither as written nor with
every dot written `_`; no canonical row is covered twice; every one is covered, unless the naming
says that it is partial.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from math import gcd

from adapterkit.errors import SpecError
from adapterkit.specs.inventory import Inventory, tensor_name
from adapterkit.specs.spans import ONE, ZERO, Piece, Row

Cover = dict[str, list[tuple[Fraction, Fraction, str]]]


def cover_of(rows: Iterable[Row], inventory: Inventory) -> Cover:
    """Canonical tensor -> (start, stop, native) of every piece that covers some of it."""
    cover: Cover = {}
    for row in rows:
        for piece in row.span:
            share = (piece.start, piece.stop, row.native)
            for tensor in inventory.tensors(piece.module, row.param):
                cover.setdefault(tensor, []).append(share)
    return cover


def without_respelled(rows: Iterable[Row], written: Cover, inventory: Inventory) -> list[Row]:
    """The rows that share no canonical row with what is written already."""

    def is_respelled(row: Row) -> bool:
        return any(
            start < piece.stop and piece.start < stop
            for piece in row.span
            for tensor in inventory.tensors(piece.module, row.param)
            for start, stop, _ in written.get(tensor, ())
        )

    return [row for row in rows if not is_respelled(row)]


def prove_names(rows: list[Row], inventory: Inventory, where: str) -> None:
    """No native name twice, whether of a row or of a module's tensor, as written or flattened."""
    seen: set[str] = set()
    flat: dict[str, str] = {}
    for row in rows:
        params = inventory.params[row.span[0].module] if row.param is None else ()
        for native in (row.native, *(tensor_name(row.native, param) for param in params)):
            if native in seen:
                raise SpecError(f"{where}: `{native}` is spelled twice", code="spec-duplicate")
            seen.add(native)
        other = flat.setdefault(row.native.replace(".", "_"), row.native)
        if other != row.native:
            raise SpecError(
                f"{where}: `{other}` and `{row.native}` are one name once flattened", code="spec-flat"
            )


def prove_partition(rows: list[Row], inventory: Inventory, partial: bool, where: str) -> None:
    """No canonical row covered twice, and every one covered unless the naming is partial."""
    cover = cover_of(rows, inventory)
    for tensor, shares in cover.items():
        if len(shares) == 1 and shares[0][:2] == (ZERO, ONE):
            continue
        reached, before = ZERO, ""
        for start, stop, native in sorted(shares):
            if start < reached:
                raise SpecError(
                    f"{where}: `{before}` and `{native}` both cover rows of `{tensor}`", code="spec-overlap"
                )
            if start != reached and not partial:
                raise _gap(tensor, reached, start, where)
            reached, before = stop, native
        if reached != ONE and not partial:
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
        f"{where}: the rows from {start} to {stop} of `{tensor}` have no name",
        code="spec-partial",
        hint="add their parts, or say partial = true",
    )


def prove_stack(row: Row, inventory: Inventory, where: str) -> None:
    """The pieces fit on each other: the same tensors, one width, heights as their weights say."""
    here = f"{where}: `{row.native}`"
    if any(piece.transposed for piece in row.span):
        _prove_transposed(row, inventory, here)
    if gcd(*(piece.weight for piece in row.span)) > 1:
        raise SpecError(f"{here}: its weights have a common factor", code="spec-stack")
    first = row.span[0]
    for piece in row.span:
        if row.param is None and inventory.params[piece.module] != inventory.params[first.module]:
            raise SpecError(f"{here} stacks a module with a bias and one without", code="spec-stack")
        tensors = inventory.tensors(piece.module, row.param)
        below = inventory.tensors(first.module, row.param)
        for tensor, other in zip(tensors, below, strict=True):
            _prove_fit((piece, tensor), (first, other), inventory, here)


def _prove_fit(upper: tuple[Piece, str], lower: tuple[Piece, str], inventory: Inventory, here: str) -> None:
    (piece, tensor), (first, other) = upper, lower
    shape, other_shape = inventory.shapes[tensor], inventory.shapes[other]
    height, other_height = _height(piece, shape), _height(first, other_shape)
    if height.denominator != 1:
        raise SpecError(f"{here}: the {shape[0]} rows of `{tensor}` do not divide so", code="spec-parts")
    if shape[1:] != other_shape[1:]:
        raise SpecError(
            f"{here}: `{tensor}` {list(shape)} does not fit on `{other}` {list(other_shape)}",
            code="spec-stack",
        )
    if height * first.weight != other_height * piece.weight:
        raise SpecError(
            f"{here}: `{tensor}` gives {height} rows and `{other}` {other_height}, "
            f"but their weights are {piece.weight} and {first.weight}",
            code="spec-stack",
        )


def _height(piece: Piece, shape: tuple[int, ...]) -> int | Fraction:
    return shape[0] if piece.whole else (piece.stop - piece.start) * shape[0]


def _prove_transposed(row: Row, inventory: Inventory, here: str) -> None:
    piece = row.span[0]
    if len(row.span) > 1 or not piece.whole:
        raise SpecError(f"{here}: .T stands alone, never in a stack or on a part", code="spec-transposed")
    if row.param is None:
        raise SpecError(
            f"{here}: a module cannot be transposed, only its weight",
            code="spec-transposed",
            hint=f"write `{tensor_name(piece.module, 'weight')}.T`, and a row for a bias",
        )
    if len(inventory.shapes[tensor_name(piece.module, row.param)]) != 2:
        raise SpecError(f"{here}: only a matrix can be transposed", code="spec-transposed")
