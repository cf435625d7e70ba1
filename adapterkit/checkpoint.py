"""A base model: its tensors by the canonical rows they hold, whatever file and naming they lie in.

An adapter whose every change is a replacement, read lazily: nothing is opened before it is asked for,
and a tensor that the file has on the very lines that are wanted is handed out as a view of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, Union

from adapterkit.errors import Mismatch, UsageError
from adapterkit.readings import Held, read
from adapterkit.specs.families import Family, Place, families
from adapterkit.specs.names import Piece, Row, Span
from adapterkit.stores import Store, memory_store
from adapterkit.stores.model_folder import open_model

if TYPE_CHECKING:
    from torch import Tensor

Model = Union[str, Path, Store, "Mapping[str, Tensor]", "Checkpoint"]


@dataclass(frozen=True, slots=True)
class Fragment:
    """Rows [first, first + height) of a file's tensor: those of one canonical module that `piece` names."""

    key: str
    piece: Piece
    first: int
    height: int

    @property
    def unit(self) -> Fraction:
        """How many rows the whole module has."""
        return Fraction(self.height) / (self.piece.stop - self.piece.start)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows [start, stop) of a file's tensor, turned first if it is kept transposed."""

    key: str
    start: int
    stop: int
    transposed: bool


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of a base model.

    store: where they lie; it must stay open while they are used.  held: what each known tensor is, by key.
    """

    store: Store
    family: Family
    held: Mapping[str, Held]

    @property
    def components(self) -> tuple[str, ...]:
        """The family's components that the file has, in the family's order."""
        present = {each.component for each in self.held.values()}
        return tuple(name for name in self.family.components if name in present)

    @property
    def unknown(self) -> tuple[str, ...]:
        """Tensors that the family has no name for, such as a VAE's."""
        return tuple(key for key in self.store.tensors if key not in self.held)

    def places(self) -> Iterator[Place]:
        """Where the file's own tensors act, one place for each."""
        for each in self.held.values():
            yield Place(each.component, each.row.span, each.param)

    def keys(self, component: str, span: Span, param: str) -> tuple[str, ...]:
        """The file's tensors that hold these rows; () if some of the rows are missing."""
        stretches = self.stretches(component, span, param)
        return tuple(dict.fromkeys(s.key for s in stretches)) if stretches else ()

    def shape(self, component: str, span: Span, param: str) -> tuple[int, ...] | None:
        """The shape of the tensor that stacks these rows; None if some of them are missing."""
        stretches = self.stretches(component, span, param)
        if stretches is None:
            return None
        rest = {self._shape(s)[1:] for s in stretches}
        if len(rest) > 1:
            raise Mismatch(
                f"{self.store.label}: `{stretches[0].key}` and `{stretches[-1].key}` do not fit together",
                details={"keys": list(dict.fromkeys(s.key for s in stretches))},
            )
        return (sum(s.stop - s.start for s in stretches), *rest.pop())

    def tensor(
        self, component: str, span: Span, param: str, rows: tuple[int, int] | None = None
    ) -> Tensor | None:
        """The weight (or bias) that stacks these rows, in the file's dtype; None if some are missing.

        rows: only [start, stop) of it.  A view of the file where one tensor of it has just these rows
        together, else a copy. Raises Mismatch for parts that do not fit on each other.
        """
        import torch

        stretches = self.stretches(component, span, param)
        if stretches is None or self.shape(component, span, param) is None:
            return None
        if rows is not None:
            stretches = _within(stretches, *rows)
        parts = []
        for stretch in stretches:
            tensor = self.store.tensor(stretch.key)
            parts.append((tensor.T if stretch.transposed else tensor)[stretch.start : stretch.stop])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def with_front(self, front: str) -> Checkpoint:
        """The same tensors, each canonical name with `front` before it (in a model without a table)."""
        held = {}
        for key, each in self.held.items():
            pieces = tuple(replace(piece, module=front + piece.module) for piece in each.row.span)
            row = Row(front + each.row.native, pieces, each.row.param)
            held[key] = Held(key, each.component, row, each.param)
        return Checkpoint(self.store, self.family, held)

    def close(self) -> None:
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _shape(self, stretch: Stretch) -> tuple[int, ...]:
        shape = self.store.tensors[stretch.key].shape
        return shape[::-1] if stretch.transposed else shape

    @cached_property
    def _whole(self) -> dict[tuple[str, Span, str], Held]:
        return {(each.component, each.row.span, each.param): each for each in self.held.values()}

    @cached_property
    def _fragments(self) -> dict[tuple[str, str, str], list[Fragment]]:
        found: dict[tuple[str, str, str], list[Fragment]] = {}
        for each in self.held.values():
            for fragment in self._fragments_of(each):
                found.setdefault((each.component, fragment.piece.module, each.param), []).append(fragment)
        for fragments in found.values():
            fragments.sort(key=lambda fragment: fragment.piece.start)
        return found

    def _fragments_of(self, each: Held) -> Iterator[Fragment]:
        """Where each piece of a tensor's span lies in it; none for a tensor that cannot be divided so."""
        shape = self.store.tensors[each.key].shape
        span = each.row.span
        rows = (shape[-1] if span[0].transposed else shape[0]) if shape else 0
        total = sum(piece.weight for piece in span)
        if not rows or rows % total:
            return
        first = 0
        for piece in span:
            height = rows // total * piece.weight
            yield Fragment(each.key, piece, first, height)
            first += height

    def stretches(self, component: str, span: Span, param: str) -> tuple[Stretch, ...] | None:
        """The rows of the file that make up a span, from its top; None if some are missing.

        Those that follow on from each other in one tensor are one.
        """
        each = self._whole.get((component, span, param))
        if each is not None:
            shape = self.store.tensors[each.key].shape
            return (Stretch(each.key, 0, shape[0], False),) if shape else None
        found: list[Stretch] = []
        for piece in span:
            parts = _parts(piece, self._fragments.get((component, piece.module, param), ()))
            if parts is None:
                return None
            found += parts
        return tuple(_joined(found))


def _parts(piece: Piece, fragments: Sequence[Fragment]) -> list[Stretch] | None:
    """The stretches that cover a piece from its start to its stop; None if they leave a gap."""
    found: list[Stretch] = []
    at = piece.start
    for fragment in fragments:
        if fragment.piece.stop <= at or fragment.piece.start > at:
            continue
        stop = min(piece.stop, fragment.piece.stop)
        start_row = fragment.first + (at - fragment.piece.start) * fragment.unit
        stop_row = fragment.first + (stop - fragment.piece.start) * fragment.unit
        if start_row.denominator != 1 or stop_row.denominator != 1:
            return None
        transposed = fragment.piece.transposed != piece.transposed
        found.append(Stretch(fragment.key, int(start_row), int(stop_row), transposed))
        at = stop
        if at >= piece.stop:
            return found
    return None


def _joined(stretches: list[Stretch]) -> Iterator[Stretch]:
    """Neighbours that follow on from each other in one tensor, as one."""
    last: Stretch | None = None
    for stretch in stretches:
        if last is not None and (last.key, last.stop, last.transposed) == (
            stretch.key,
            stretch.start,
            stretch.transposed,
        ):
            last = replace(last, stop=stretch.stop)
            continue
        if last is not None:
            yield last
        last = stretch
    if last is not None:
        yield last


def _within(stretches: tuple[Stretch, ...], start: int, stop: int) -> tuple[Stretch, ...]:
    """Rows [start, stop) of what the stretches stack. UsageError if there are no such rows."""
    kept = []
    first = 0
    for stretch in stretches:
        height = stretch.stop - stretch.start
        low, high = max(start - first, 0), min(stop - first, height)
        if low < high:
            kept.append(replace(stretch, start=stretch.start + low, stop=stretch.start + high))
        first += height
    if start < 0 or not start < stop <= first:
        raise UsageError(
            f"rows {start}:{stop} are not in a weight of {first} rows",
            code="no-such-rows",
            hint="this is a fault of the caller",
        )
    return tuple(kept)


def open_checkpoint(model: Model, family: str | None = None) -> Checkpoint:
    """Open a base model from its headers.

    model: a file, an index of shards, a folder of transformers or diffusers, a store, or a state dict.
    family: the base model, where the names alone do not tell.
    Raises StoreError, UnsafeFile, Unrecognized or Ambiguous.
    """
    if isinstance(model, Checkpoint):
        return model
    store = model_store(model)
    try:
        reading = read(store, family)
    except BaseException:
        if store is not model:
            store.close()
        raise
    return Checkpoint(store, reading.family, reading.held)


def model_store(model: str | Path | Store | Mapping[str, Tensor]) -> Store:
    """The store behind a base model; a path is opened by its content, a state dict is wrapped."""
    if isinstance(model, Store):
        return model
    if model == "":
        raise UsageError("the path of the base model is empty", hint="name a file or a folder")
    if isinstance(model, str | Path):
        return open_model(model, (name for known in families() for name in known.components))
    return memory_store(model)
