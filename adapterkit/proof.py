"""How far a written adapter is from the one that was asked for, all modules together."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from adapterkit import deltas
from adapterkit.adapter import Adapter
from adapterkit.compare import pairs_of, units
from adapterkit.deltas import Change
from adapterkit.linalg.pool import each
from adapterkit.linalg.products import product_inner
from adapterkit.specs.families import Place

Base = Callable[[Place], Tensor | None]


def total_error(
    requested: Adapter, written: Adapter, sample: int | None = None, base: Base | None = None
) -> float | None:
    """√(Σ ‖a − b‖² / Σ ‖a‖²) of the deltas, module by module, in float64; 0 for what is bit-identical.

    sample: about how many modules, spread evenly; None for all of them.
    base: the weight that a place changes, for kinds whose delta depends on it. Without it they count
    for nothing where both sides have the same, and make the error infinite where they differ.
    None where both change nothing that could be measured. Numbers that are not finite on both sides
    are passed over.
    """
    every = units(requested, written)
    step = max(1, len(every) // sample) if sample else 1
    pairs = [(*pair, unit.place) for unit in every[::step] for pair in pairs_of(unit, requested, written)]
    found = each(lambda pair: _squares(*pair, base), pairs)
    difference = math.fsum(one for one, _ in found)
    size = math.fsum(two for _, two in found)
    if not difference:
        return 0.0 if size else None
    return math.sqrt(difference / size) if size and math.isfinite(difference) else math.inf


def _squares(
    one: Change | None, two: Change | None, place: Place | None, base: Base | None
) -> tuple[float, float]:
    """(‖one − two‖², ‖one‖²); a side that is None changes nothing."""
    if one is None or two is None:
        present = one if one is not None else two
        assert present is not None
        square = math.inf if present.needs_base else _size(present)
        return square, square if one is not None else 0.0
    if one.needs_base or two.needs_base:
        return _on_base(one, two, base(place) if base and place else None)
    left, right = _factors(one), _factors(two)
    if left is None or right is None:
        first, second = _flat(one), _flat(two)
        size, other = float(first.square().sum()), float(second.square().sum())
        difference = float(first.sub_(second).square().sum())
    else:
        size, other = product_inner(*left, *left), product_inner(*right, *right)
        # Rounding can leave a little less than nothing.
        difference = max(size - 2 * product_inner(*left, *right) + other, 0.0)
    if not (math.isfinite(size) and math.isfinite(other)):
        return (math.inf if math.isfinite(size) or math.isfinite(other) else 0.0), 0.0
    return (0.0 if deltas.identical(one, two) else difference), size


def _on_base(one: Change, two: Change, weight: Tensor | None) -> tuple[float, float]:
    if weight is None:
        return (0.0 if deltas.identical(one, two) else math.inf), 0.0
    first, second = one.dense(weight).double(), two.dense(weight).double()
    return float((first - second).square().sum()), float(first.square().sum())


def _size(change: Change) -> float:
    factors = _factors(change)
    if factors is None:
        return float(_flat(change).square().sum())
    return max(product_inner(*factors, *factors), 0.0)


def _factors(change: Change) -> tuple[Tensor, Tensor] | None:
    """up with its scale, and down, in float64; None where the product is no larger than they are."""
    rank, shape = change.expanded_rank, change.shape
    if rank is None or not shape or 2 * rank > min(shape[0], math.prod(shape[1:])):
        return None
    small = change.low_rank()
    up, down = small.matrices()
    return up.double() * small.scale, down.double()


def _flat(change: Change) -> Tensor:
    delta = change.dense(dtype=torch.float64)
    return delta.flatten(1) if delta.ndim > 1 else delta
