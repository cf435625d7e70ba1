"""Comparing two adapters as changes of one model, whatever their files look like.

Modules are matched by the canonical rows they change. Where both sides were trained on the same
rows the changes are compared as they are; elsewhere both are cut to the rows they share.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import torch

from adapterkit import deltas
from adapterkit.adapter import Adapter, weight_shape
from adapterkit.deltas import Change
from adapterkit.deltas.zero import is_zero
from adapterkit.errors import AdapterkitError, Unrepresentable
from adapterkit.recut import Source, Stretch, stretches
from adapterkit.specs.families import Place


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two adapters are apart on one module.

    error: ‖a − b‖ / ‖a‖ of the deltas, 0 when bit-identical, infinite when only one changes it.
    cosine: of the angle between the deltas, None where it is not defined or was not asked for.
    """

    component: str
    module: str
    param: str
    error: float
    cosine: float | None = None

    @property
    def name(self) -> str:
        return f"{self.component}.{self.module}" + (f".{self.param}" if self.param == "bias" else "")


_Pair = tuple[Change | None, Change | None]


@dataclass(frozen=True)
class _Unit:
    """Something to compare: the same place on both sides, or one canonical module cut out of both."""

    component: str
    module: str
    param: str
    left: Sequence[Stretch]
    right: Sequence[Stretch]
    place: Place | None = None


def units(a: Adapter, b: Adapter) -> list[_Unit]:
    """Everything that one of the adapters changes, matched up."""
    found = []
    for place in a.changes:
        if place in b.changes:
            name = " + ".join(dict.fromkeys(piece.module for piece in place.span))
            found.append(_Unit(place.component, name, place.param, (), (), place))
    left, right = _cut_up(a, b), _cut_up(b, a)
    for key in dict.fromkeys([*left, *right]):
        found.append(_Unit(*key, left.get(key, ()), right.get(key, ())))
    return found


def differences(
    a: Adapter, b: Adapter, *, sample: int | None = None, cosines: bool = False
) -> Iterator[Difference]:
    """Compare module by module.

    sample: about how many modules, spread evenly; None for all of them.
    """
    every = units(a, b)
    step = max(1, len(every) // sample) if sample else 1
    for unit in every[::step]:
        with _one_thread():
            found = _difference(unit, a, b, cosines)
        yield found


def _difference(unit: _Unit, a: Adapter, b: Adapter, cosines: bool) -> Difference:
    pairs = pairs_of(unit, a, b)
    shape = weight_shape(a.family, unit.place) if unit.place else None
    error = max((_error(one, two, shape) for one, two in pairs), default=0.0)
    cosine = _cosine(pairs, error) if cosines else None
    return Difference(unit.component, unit.module, unit.param, error, cosine)


def pairs_of(unit: _Unit, a: Adapter, b: Adapter) -> list[_Pair]:
    """What the two adapters change of a unit, side against side; None where a side changes nothing."""
    if unit.place is not None:
        return _by_kind(a.changes[unit.place], b.changes[unit.place])
    return list(_pairs(unit.left, unit.right))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small factorisations on one thread: several only wait for each other (five times as long on two)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _by_kind(left: Sequence[Change], right: Sequence[Change]) -> list[_Pair]:
    """Several changes of one weight, kind against kind where both sides have the same, else as sums."""
    kinds = [change.kind for change in left]
    if len(set(kinds)) == len(kinds) and sorted(kinds) == sorted(change.kind for change in right):
        others = {change.kind: change for change in right}
        return [(change, others[change.kind]) for change in left]
    return [(_sum(left), _sum(right))]


def _cut_up(adapter: Adapter, other: Adapter) -> dict[tuple[str, str, str], list[Stretch]]:
    """The adapter's changes of places that the other does not have, by canonical module."""
    found: dict[tuple[str, str, str], list[Stretch]] = defaultdict(list)
    for place, changes in adapter.changes.items():
        if place not in other.changes:
            for stretch in stretches(Source(place, _sum(changes))):
                found[(place.component, stretch.piece.module, place.param)].append(stretch)
    return found


def _sum(changes: Sequence[Change]) -> Change:
    return deltas.add(changes)


def _pairs(left: Sequence[Stretch], right: Sequence[Stretch]) -> Iterator[_Pair]:
    """Both sides of each run of rows between two cuts of either."""
    cuts = sorted({edge for s in (*left, *right) for edge in (s.piece.start, s.piece.stop)})
    for start, stop in pairwise(cuts):
        one, two = _part(left, start, stop), _part(right, start, stop)
        if one is not None or two is not None:
            yield one, two


def _part(side: Sequence[Stretch], start: Fraction, stop: Fraction) -> Change | None:
    """All that one side changes in the rows from `start` to `stop` of a module, as shares."""
    found = []
    for stretch in side:
        piece = stretch.piece
        if piece.start <= start and stop <= piece.stop:
            per_share = Fraction(stretch.height) / (piece.stop - piece.start)
            first = stretch.first + int((start - piece.start) * per_share)
            change = _take(stretch.source.change, first, first + int((stop - start) * per_share))
            found.append(deltas.transpose(change) if piece.transposed else change)
    return _sum(found) if found else None


def _take(change: Change, start: int, stop: int) -> Change:
    try:
        return change.take(start, stop)
    except Unrepresentable:
        # A Kronecker product cannot be cut everywhere, its exact expansion can.
        return change.low_rank().take(start, stop)


def _error(one: Change | None, two: Change | None, shape: tuple[int, ...] | None) -> float:
    if one is None or two is None:
        present = one if one is not None else two
        return 0.0 if present is None or is_zero(present) else math.inf
    if isinstance(one, deltas.Scaling):
        # The weight's other side does not matter to it, and a square one fits rows and columns.
        shape = (one.vector.numel(), one.vector.numel())
    try:
        return deltas.relative_error(one, two)
    except AdapterkitError:
        # Its own tensors do not tell the weight's shape, or its delta is not known without the base.
        return _by_tensors(one, two) if shape is None else _on_base(one, two, shape)


def _on_base(one: Change, two: Change, shape: tuple[int, ...]) -> float:
    try:
        return deltas.relative_error(one, two, shape)
    except AdapterkitError:
        # A model of another width than the family's.
        return _by_tensors(one, two)


def _by_tensors(one: Change, two: Change) -> float:
    """The greatest relative error of the tensors themselves; infinite for changes of two kinds."""
    left, right = one.tensors(), two.tensors()
    if type(one) is not type(two) or left.keys() != right.keys():
        return math.inf
    errors = []
    for role, tensor in left.items():
        other = right[role]
        if tensor.numel() != other.numel():
            return math.inf
        first, second = tensor.double().flatten(), other.double().flatten()
        size = float(first.norm())
        errors.append(float((first - second).norm()) / size if size else float(second.norm() > 0))
    return max(errors, default=0.0)


def _cosine(pairs: Sequence[_Pair], error: float) -> float | None:
    whole = [(one, two) for one, two in pairs if one is not None and two is not None]
    if len(whole) != 1 or whole[0][0].needs_base or whole[0][1].needs_base:
        return None
    if error == 0.0:
        return None if is_zero(whole[0][0]) else 1.0
    return deltas.cosine(*whole[0])
