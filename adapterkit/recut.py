"""Re-cutting: from the rows a change was trained on to the rows another naming has tensors for.

A naming's lines may differ from the source's: one native tensor stacks what another keeps apart.
Where the lines agree nothing is touched. Elsewhere changes are cut to the pieces they cover and
stacked to the target's rows, all of it exact (see `adapterkit.deltas`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

from adapterkit import deltas
from adapterkit.deltas import Change
from adapterkit.deltas.zero import is_zero
from adapterkit.errors import Mismatch, Unrepresentable
from adapterkit.specs.families import Names, Place
from adapterkit.specs.names import Piece, Row, Span


@dataclass(frozen=True, slots=True)
class Preparation:
    """What is done to every change before it is cut, when it is asked for and not sooner.

    expand: kinds that have an exact low-rank form become it.  bare: which DoRA loses its magnitudes,
    by what they run along (see `along`).  fold: the scale goes into the factors.
    """

    expand: bool = False
    bare: frozenset[str] = frozenset()
    fold: bool = False

    def of(self, change: Change) -> Change:
        """The prepared change; the change itself if there is nothing to do."""
        if isinstance(change, deltas.Magnitude):
            inner = self.of(change.inner)
            if along(change) in self.bare:
                return inner
            return change if inner is change.inner else replace(change, inner=inner)
        if self.expand and expands(change):
            change = change.low_rank()
        return deltas.fold_closely(change)[0] if self.fold else change

    def kind(self, change: Change) -> str:
        """The kind it will be, with `dora` before it if it has magnitudes."""
        if isinstance(change, deltas.Magnitude):
            inner = self.kind(change.inner)
            return inner if along(change) in self.bare else f"dora {inner}"
        return "lora" if self.expand and expands(change) else change.kind

    def computes(self, change: Change) -> bool:
        """Whether the prepared change holds new numbers, not the tensors that were read."""
        inner = change.inner if isinstance(change, deltas.Magnitude) else change
        return self.fold or (self.expand and expands(inner))

    def exact(self, change: Change) -> bool:
        """Whether folding, if it is asked for, rounds nothing."""
        return not self.fold or deltas.fold_closely(replace(self, fold=False).of(change))[1]


def along(magnitude: deltas.Magnitude) -> str:
    """What magnitudes run along: "out", "in", or "embedding", whose own are along the input everywhere."""
    return "embedding" if magnitude.inner.kind == "embedding" else magnitude.axis


def expands(change: Change) -> bool:
    """Whether a change has an exact low-rank form that is another than its own."""
    if change.kind == "lora":
        return "mid" in change.tensors()
    return type(change).low_rank is not Change.low_rank


@dataclass(frozen=True, slots=True)
class Source:
    """One change with the place it comes from.

    original: as it was read; `change` is the prepared one, made anew each time, so that no more
    than one is held.  others: more changes of the place that become the same kind and add up with it.
    """

    place: Place
    original: Change
    preparation: Preparation = Preparation()
    others: tuple[Change, ...] = ()

    @property
    def originals(self) -> tuple[Change, ...]:
        return (self.original, *self.others)

    @property
    def change(self) -> Change:
        return deltas.add([self.preparation.of(original) for original in self.originals])

    @property
    def computes(self) -> bool:
        """Whether `change` holds new numbers, not the tensors that were read."""
        return bool(self.others) or self.preparation.computes(self.original)

    @property
    def exact(self) -> bool:
        """Whether the preparation rounds nothing."""
        return all(map(self.preparation.exact, self.originals))

    @property
    def kind(self) -> str:
        return self.preparation.kind(self.original)

    @property
    def rows(self) -> int | None:
        return self.original.rows


def sources_of(
    place: Place, changes: Sequence[Change], preparation: Preparation = Preparation()
) -> list[Source]:
    """The changes of one place; those that become one kind, as one source."""
    by_kind: dict[str, list[Change]] = {}
    for change in changes:
        by_kind.setdefault(preparation.kind(change), []).append(change)
    return [Source(place, first, preparation, tuple(others)) for first, *others in by_kind.values()]


@dataclass(frozen=True, slots=True)
class Part:
    """Rows [start, stop) of a source, or `height` rows that nothing changes (source None)."""

    source: Source | None
    start: int
    stop: int

    @property
    def height(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Cut:
    """What one native tensor of the target is made of.

    A single part that is the whole of its source is a renaming.
    """

    row: Row
    param: str
    parts: tuple[Part, ...]
    transposed: bool = False

    @property
    def kind(self) -> str:
        return next(part.source.kind for part in self.parts if part.source is not None)

    @property
    def sources(self) -> tuple[Source, ...]:
        """What its parts are taken from, each once."""
        return tuple(dict.fromkeys(part.source for part in self.parts if part.source is not None))

    @property
    def renames(self) -> bool:
        return len(self.parts) == 1 and not self.transposed and self._is_whole(self.parts[0])

    @staticmethod
    def _is_whole(part: Part) -> bool:
        return part.source is not None and part.start == 0 and part.stop == (part.source.rows or 0)

    def make(self) -> Change | None:
        """The change of this native tensor; None if it turns out to change nothing.

        A piece of a fused change that is exactly zero, beside pieces that are not, was never
        trained: leaving it out loses nothing.
        """
        # What is new memory is made again when it is written; anything less is views.
        computes = len(self.parts) > 1 or any(source.computes for source in self.sources)
        return self._made() if computes else self._view

    @cached_property
    def _view(self) -> Change | None:
        return self._made()

    def _made(self) -> Change | None:
        if self.renames and self.parts[0].source is not None:
            return self.parts[0].source.change
        parts: list[Change | None] = []
        for part in self.parts:
            if part.source is None:
                parts.append(None)
                continue
            whole = part.source.change
            piece = whole.take(part.start, part.stop)
            idle = piece is not whole and is_zero(piece)
            parts.append(None if idle and not is_zero(whole) else piece)
        if all(part is None for part in parts):
            return None
        made = deltas.stack(parts, [part.height for part in self.parts])
        return deltas.transpose(made) if self.transposed else made


@dataclass(frozen=True)
class Recut:
    """cuts: what the target's tensors are made of.  nameless: sources the target has no rows for."""

    cuts: tuple[Cut, ...]
    nameless: tuple[Source, ...]


def recut(sources: Iterable[Source], names: Names) -> Recut:
    """Say how the sources of one component fill the rows of `names`.

    Kinds are kept apart: each is cut and stacked on its own.
    """
    streams: dict[tuple[str, str], list[Source]] = defaultdict(list)
    for source in sources:
        streams[(source.kind, source.place.param)].append(source)
    cuts: list[Cut] = []
    nameless: list[Source] = []
    for (_, param), stream in streams.items():
        found = _recut_stream(stream, names, param)
        cuts += found.cuts
        nameless += found.nameless
    return Recut(tuple(cuts), tuple(nameless))


def _recut_stream(stream: Sequence[Source], names: Names, param: str) -> Recut:
    cuts: list[Cut] = []
    apart: list[Source] = []
    for source in stream:
        row = names.at(source.place.span, param)
        if row is None:
            apart.append(source)
        else:
            cuts.append(Cut(row, param, (Part(source, 0, source.rows or 0),)))
    rows, nameless = _rows_for(apart, names, param)
    reached = {piece.module for row in rows for piece in row.span}
    pieces = _by_module(s for s in stream if any(piece.module in reached for piece in s.place.span))
    cuts += [_cut(row, param, pieces) for row in rows]
    return Recut(tuple(cuts), tuple(nameless))


def _rows_for(sources: Sequence[Source], names: Names, param: str) -> tuple[tuple[Row, ...], list[Source]]:
    """The target's rows that these sources reach, and the sources that it cannot name in full.

    Rows that a source does not change need no name: XLabs has none for the last rows of a fused
    layer, and a file that came from it has zeros there.
    """
    rows: dict[str, Row] = {}
    nameless: list[Source] = []
    for source in sources:
        reached = [
            row
            for piece in source.place.span
            for row in names.covering(piece.module)
            if row.param in (None, param)
        ]
        named = {piece.module for row in reached for piece in row.span}
        unnamed = {piece.module for piece in source.place.span} - named
        if not reached or (unnamed and not _leaves_alone(source, unnamed)):
            nameless.append(source)
        else:
            rows.update((row.native, row) for row in reached)
    return tuple(rows.values()), nameless


def _leaves_alone(source: Source, modules: Collection[str]) -> bool:
    """Whether a change is exactly zero on its rows of these modules, where that can be told."""
    try:
        parts = [
            source.change.take(stretch.first, stretch.first + stretch.height)
            for stretch in stretches(source)
            if stretch.piece.module in modules
        ]
    except Unrepresentable:
        return False
    return all(is_zero(part) for part in parts)


@dataclass(frozen=True, slots=True)
class Stretch:
    """A piece of a source: rows [first, first + height) of it are `piece`."""

    source: Source
    piece: Piece
    first: int
    height: int


def _by_module(sources: Iterable[Source]) -> dict[str, list[Stretch]]:
    found: dict[str, list[Stretch]] = defaultdict(list)
    for source in sources:
        for stretch in stretches(source):
            found[stretch.piece.module].append(stretch)
    return found


def stretches(source: Source) -> Iterable[Stretch]:
    """Where each piece of a source's span lies in its rows; Mismatch if they cannot be shared out."""
    span = source.place.span
    total = sum(piece.weight for piece in span)
    rows = source.rows
    if rows is None or rows % total:
        raise Mismatch(
            f"`{span[0].module}` and {len(span) - 1} more cannot share {rows} rows in {total} equal parts",
            hint="the tensor is not the fused weight that its name says",
        )
    first = 0
    for piece in span:
        height = rows // total * piece.weight
        yield Stretch(source, piece, first, height)
        first += height


def _cut(row: Row, param: str, pieces: Mapping[str, list[Stretch]]) -> Cut:
    """Fill the pieces of one target row from the stretches that cover them."""
    unit = _unit(row.span, pieces)
    parts: list[Part] = []
    transposed = False
    for piece in row.span:
        covering = [
            s
            for s in pieces.get(piece.module, ())
            if s.piece.start < piece.stop and piece.start < s.piece.stop
        ]
        if not covering:
            height = unit * piece.weight
            if height.denominator != 1:
                raise Mismatch(f"`{row.native}`: `{piece.module}` would have {height} rows")
            parts.append(Part(None, 0, int(height)))
            continue
        transposed |= covering[0].piece.transposed != piece.transposed
        parts += _fill(piece, sorted(covering, key=lambda s: s.piece.start))
    return Cut(row, param, _joined(parts), transposed)


def _unit(span: Span, pieces: Mapping[str, list[Stretch]]) -> Fraction:
    """The height of a piece of weight 1, from any piece whose rows are known."""
    for piece in span:
        for stretch in pieces.get(piece.module, ()):
            whole = Fraction(stretch.height) / (stretch.piece.stop - stretch.piece.start)
            return whole * (piece.stop - piece.start) / piece.weight
    return Fraction(0)


def _fill(piece: Piece, covering: Sequence[Stretch]) -> list[Part]:
    """The parts of sources that make up one piece, with the gaps between them.

    Raises Unrepresentable where two of them change the same rows.
    """
    parts: list[Part] = []
    at = piece.start
    for stretch in covering:
        per_share = Fraction(stretch.height) / (stretch.piece.stop - stretch.piece.start)
        start, stop = max(piece.start, stretch.piece.start), min(piece.stop, stretch.piece.stop)
        if start < at:
            raise _overlapping(piece)
        if start > at:
            parts.append(Part(None, 0, _whole((start - at) * per_share, piece)))
        offset = stretch.first + _whole((start - stretch.piece.start) * per_share, piece)
        parts.append(Part(stretch.source, offset, offset + _whole((stop - start) * per_share, piece)))
        at = stop
    if at < piece.stop:
        parts.append(Part(None, 0, _whole((piece.stop - at) * per_share, piece)))
    return parts


def _overlapping(piece: Piece) -> Unrepresentable:
    return Unrepresentable(
        f"`{piece.module}` is changed by two modules that would become one kind of change",
        code="two-kinds",
        hint="without --as lora they stay apart; or bake the adapter into its base",
    )


def _whole(rows: Fraction, piece: Piece) -> int:
    if rows.denominator != 1:
        raise Mismatch(f"a cut through `{piece.module}` would fall between two rows")
    return int(rows)


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Neighbouring parts of one source that follow on from each other, as one."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last is not None and last.source is part.source is not None and last.stop == part.start:
            joined[-1] = Part(part.source, last.start, part.stop)
        else:
            joined.append(part)
    return tuple(joined)
