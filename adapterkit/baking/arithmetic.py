"""The numbers of one baked tensor: the base's, what the changes add in float32, rounded once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from adapterkit import deltas
from adapterkit.baking.desk import Desk, desk
from adapterkit.baking.effects import Share
from adapterkit.baking.plan import Baked
from adapterkit.baking.planning import replaces
from adapterkit.baking.survival import Survival
from adapterkit.checkpoint import Checkpoint
from adapterkit.deltas import AdaLora, Change, ExpertsLowRank, LowRank, Magnitude, Tokens, Vera, Whole
from adapterkit.errors import located
from adapterkit.linalg.rounding import Rounding, round_to, seed_of
from adapterkit.stores import torch_dtype

# Of large tensors every so many rows are measured: looking at all would take as long as baking.
_EVERY = 32
# Numbers of a tensor that are measured in any case.
_FEW = 1 << 16
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Manner:
    """How results are rounded, and where they are computed. seed: of stochastic rounding."""

    how: Rounding = "nearest"
    seed: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (an immutable value)


class _Part(Protocol):
    """What one share adds. start, stop: the rows of the tensor that it acts on."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...

    def add(self, total: Tensor, weight: Tensor, first: int) -> None:
        """Put its part into `total`, float32 rows (n, columns) from `first`; `weight` are the base's rows."""


def baked_tensor(base: Checkpoint, baked: Baked, manner: Manner, survival: Survival) -> Tensor:
    """The tensor as it is to be written; `survival` is told what rounding leaves of the change."""
    stored, shares = _ground(base, baked)
    dtype = torch_dtype(baked.after.dtype)
    result = torch.empty(baked.after.shape, dtype=dtype)
    rows, columns = stored.shape[0], max(1, stored[:1].numel())
    weight, target = stored.reshape(rows, columns), result.view(rows, columns)
    parts = [_part(base, share, stored) for share in sorted(shares, key=_turn)]
    place = desk(manner.device)
    height = max(1, place.numbers // columns)
    seed = seed_of(baked.key, manner.seed)
    sample = _Sample(max(1, min(_EVERY, stored.numel() // _FEW)))
    for start, stop, touched in _segments(parts, rows):
        if not touched and dtype == stored.dtype:
            target[start:stop] = weight[start:stop]
            continue
        for first in range(start, stop, height):
            last = min(first + height, stop)
            with place.work():
                before, total = place.lay(weight[first:last])
                for part in touched:
                    part.add(total, before, first)
                rounded = _put_down(total, target[first:last], manner.how, seed, first * columns, place)
                if touched:
                    sample.take(before, total, rounded)
    sample.measure(survival, baked.key)
    return result


@dataclass
class _Sample:
    """Every so many rows of a tensor, as they were, as they are wanted, and rounded; measured together.

    Measuring block by block would take longer in calls than in arithmetic.
    """

    every: int
    rows: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    numbers: int = 0

    def take(self, before: Tensor, wanted: Tensor, rounded: Tensor) -> None:
        every = slice(None, None, self.every)
        self.rows.append((before[every].clone(), wanted[every].clone(), rounded[every].clone()))
        self.numbers += wanted.numel()

    def measure(self, survival: Survival, key: str) -> None:
        if self.rows:
            before, wanted, rounded = (torch.cat(each) for each in zip(*self.rows, strict=True))
            survival.add(key, before, wanted, rounded, self.numbers)


def _ground(base: Checkpoint, baked: Baked) -> tuple[Tensor, Sequence[Share]]:
    """The tensor that is added to, and what is added: an adapter's own numbers are its ground, if it has any.

    PEFT keeps an embedding that was resized beside its LoRA. A base that is widened gets zeros.
    """
    for share in baked.shares:
        if _is_all(share, baked):
            value = share.effect.change.tensors()["value"]
            return value, [other for other in baked.shares if other is not share]
    stored = base.store.tensor(baked.source)
    if tuple(stored.shape) == baked.after.shape:
        return stored, baked.shares
    wide = torch.zeros(baked.after.shape, dtype=stored.dtype)
    wide[tuple(map(slice, stored.shape))] = stored
    return wide, baked.shares


def _is_all(share: Share, baked: Baked) -> bool:
    """Whether a share puts its numbers in the place of the whole tensor."""
    change = share.effect.change
    alone = isinstance(change, Whole) and change.replaces and change.scale == share.strength == 1.0
    placed = share.first == share.start == 0 and not share.transposed
    return alone and placed and change.shape == baked.after.shape


def _turn(share: Share) -> int:
    """Replacements come before what the same adapter adds to them; rows of tokens hold against it."""
    return -1 if replaces(share) else int(isinstance(share.effect.change, Tokens))


def _put_down(total: Tensor, target: Tensor, how: Rounding, seed: int, start: int, place: Desk) -> Tensor:
    """The sum, rounded, in its place; returned where it was computed."""
    if (
        how == "nearest"
        and target.dtype in _HALVES
        and total.device == target.device
        and _is_small(total, target.dtype)
    ):
        return target.copy_(total)
    rounded = _rounded(total, target.dtype, how, seed, start)
    place.put(rounded, target)
    return rounded


def _is_small(total: Tensor, dtype: torch.dtype) -> bool:
    """Whether all numbers are surely finite and within the dtype, so that a plain cast rounds them.

    No square is larger than the sum of all, however that is rounded; NaN is never less. One product takes
    a quarter of the time that looking for the largest does.
    """
    numbers, largest = total.reshape(-1), torch.finfo(dtype).max
    return total.dtype == torch.float32 and float(numbers.dot(numbers)) < largest * largest


def _rounded(total: Tensor, dtype: torch.dtype, how: Rounding, seed: int, start: int) -> Tensor:
    return (
        total if dtype == total.dtype == torch.float64 else round_to(total.float(), dtype, how, seed, start)
    )


def _segments(parts: Sequence[_Part], rows: int) -> Iterator[tuple[int, int, list[_Part]]]:
    """The rows between which what acts on them changes."""
    edges = sorted({0, rows, *(edge for part in parts for edge in (part.start, part.stop))})
    for start, stop in pairwise(edges):
        yield start, stop, [part for part in parts if part.start < stop and start < part.stop]


def _part(base: Checkpoint, share: Share, stored: Tensor) -> _Part:
    """How a share is added, the quickest way that its kind has."""
    with located(share.effect.where):
        if share.transposed:
            return _turned_part(base, share, stored)
        change, start, stop = share.effect.change, share.start, share.stop
        if isinstance(change, Whole) and change.replaces:
            return _Replacement(start, stop, change.value[share.first :], change.scale, share.strength)
        if isinstance(change, Tokens):
            return _Rows(start, stop, share.first, change, share.strength)
        if isinstance(change, AdaLora | Vera | LowRank):
            return _ranks(change, share, start, stop)
        if _is_by_rows(change):
            return _ByRows(start, stop, share.first, change, share.strength, tuple(stored.shape[1:]))
        return _Dense(start, stop, _delta(base, share, stored).flatten(1), share.strength)


def _turned_part(base: Checkpoint, share: Share, stored: Tensor) -> _Part:
    """The part of a tensor that is kept transposed: its rows are the change's columns."""
    change, rows = share.effect.change, stored.shape[0]
    if _covers(share, stored):
        if isinstance(change, AdaLora | Vera | LowRank):
            return _ranks(deltas.transpose(change.low_rank()), share, 0, rows)
        if isinstance(change, Whole) and change.replaces:
            return _Replacement(0, rows, change.value.T, change.scale, share.strength)
    return _Columns(share.start, share.stop, rows, _delta(base, share, stored), share.strength)


def _covers(share: Share, stored: Tensor) -> bool:
    """Whether a transposed share is all of the tensor, and all of its change."""
    return (share.start, share.stop) == (0, stored.shape[-1]) and share.effect.shape[0] == share.stop


def _is_by_rows(change: Change) -> bool:
    """Whether the delta of some rows costs no more than their part of the whole."""
    if isinstance(change, Magnitude):
        return change.axis == "out" and _is_by_rows(change.inner)
    return isinstance(change, LowRank | ExpertsLowRank | Whole | deltas.Scaling | deltas.Glora)


def _delta(base: Checkpoint, share: Share, stored: Tensor) -> Tensor:
    """The delta of a share's rows, made with all rows of the change's weight."""
    place, change = share.effect.place, share.effect.change
    rows = stored.shape[-1] if share.transposed else stored.shape[0]
    if share.first == share.start == 0 and share.stop == rows == share.effect.shape[0]:
        weight: Tensor | None = stored.T if share.transposed else stored
    else:
        weight = base.tensor(place.component, place.span, place.param)
    assert weight is not None
    delta = change.dense(weight, torch.float64 if stored.dtype == torch.float64 else torch.float32)
    return delta[share.first : share.first + share.stop - share.start]


def _ranks(change: Change, share: Share, start: int, stop: int) -> _Part:
    plain = change.low_rank()
    up, down = plain.matrices()
    rows = up[share.first : share.first + stop - start]
    return _Ranks(start, stop, rows.float(), down.float(), plain.scale * share.strength)


def _within(part: _Part, total: Tensor, first: int) -> tuple[slice, slice]:
    """Which rows of the block a part acts on, and which of its own they are."""
    low, high = max(first, part.start), min(first + total.shape[0], part.stop)
    return slice(low - first, high - first), slice(low - part.start, high - part.start)


@dataclass(frozen=True, eq=False)
class _Ranks:
    """factor · up @ down."""

    start: int
    stop: int
    up: Tensor
    down: Tensor
    factor: float

    def add(self, total: Tensor, weight: Tensor, first: int) -> None:
        here, mine = _within(self, total, first)
        up, down = self.up[mine].to(total), self.down.to(total)
        total[here].addmm_(up, down, alpha=self.factor)


@dataclass(frozen=True, eq=False)
class _Dense:
    start: int
    stop: int
    delta: Tensor
    factor: float

    def add(self, total: Tensor, weight: Tensor, first: int) -> None:
        here, mine = _within(self, total, first)
        total[here].add_(self.delta[mine].to(total), alpha=self.factor)


@dataclass(frozen=True, eq=False)
class _Columns:
    """A delta (columns, rows) of some columns of a tensor that is kept transposed."""

    left: int
    right: int
    stop: int
    delta: Tensor
    factor: float
    start: int = 0

    def add(self, total: Tensor, weight: Tensor, first: int) -> None:
        here, mine = _within(self, total, first)
        total[here, self.left : self.right].add_(self.delta.T[mine].to(total), alpha=self.factor)


@dataclass(frozen=True, eq=False)
class _ByRows:
    """A change whose rows are made as they are needed. rest: the weight's other axes."""

    start: int
    stop: int
    top: int
    change: Change
    factor: float
    rest: tuple[int, ...]

    def add(self, total: Tensor, weight: Tensor, first: int) -> None:
        here, mine = _within(self, total, first)
        change = self.change.take(self.top + mine.start, self.top + mine.stop)
        delta = change.dense(weight[here].reshape(-1, *self.rest), total.dtype)
        total[here].add_(delta.reshape(total[here].shape), alpha=self.factor)


@dataclass(frozen=True, eq=False)
class _Replacement:
    """Numbers put in the base's place, or between the two at another strength than 1."""

    start: int
    stop: int
    value: Tensor
    scale: float
    factor: float

    def add(self, total: Tensor, weight: Tensor, first: int) -> None:
        here, mine = _within(self, total, first)
        value = self.value[mine].to(total).reshape(total[here].shape) * self.scale
        _put(total[here], weight[here], value, self.factor)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Some rows replaced, whatever was added to them."""

    start: int
    stop: int
    top: int
    change: Tokens
    factor: float

    def add(self, total: Tensor, weight: Tensor, first: int) -> None:
        here, mine = _within(self, total, first)
        for place, index in enumerate(self.change.indices or ()):
            if mine.start <= index - self.top < mine.stop:
                row = here.start + index - self.top - mine.start
                _put(total[row], weight[row], self.change.rows_[place].to(total), self.factor)


def _put(total: Tensor, weight: Tensor, value: Tensor, factor: float) -> None:
    # At strength 1 the numbers themselves: w + (v − w) need not be v.
    total.copy_(value if factor == 1.0 else weight.to(total.dtype).lerp(value, factor))
