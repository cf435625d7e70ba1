"""Several changes of one weight as one, and the change of a transposed weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from adapterkit.deltas.alike import plain_low_rank, present
from adapterkit.deltas.change import Change
from adapterkit.deltas.low_rank import LowRank
from adapterkit.deltas.magnitude import Magnitude
from adapterkit.deltas.tensors import common_dtype, computing_dtype, stacked, written
from adapterkit.deltas.whole import Whole
from adapterkit.errors import Mismatch, Unrepresentable, UsageError


def add(changes: Sequence[Change]) -> Change:
    """The sum of several changes of one weight, exactly.

    Changes with a low-rank form put their ranks side by side, with the most common of their scales, as
    in `stack`. As soon as a whole delta is among them, the sum is one, in float32.

    Raises Unrepresentable where a change depends on the base or replaces it, Mismatch where shapes
    differ, UsageError for none.
    """
    if not changes:
        raise UsageError("nothing to add", code="no-parts")
    if len(changes) == 1:
        return changes[0]
    for change in changes:
        if change.needs_base:
            raise Unrepresentable(
                f"{change._title} depends on the weight: its sum with another change is none of its kind",
                code="add",
                hint="bake them into the base one after the other",
            )
    if any(isinstance(change, Whole) for change in changes):
        return _added_whole(changes)
    return _added_ranks([change.low_rank() for change in changes])


def transpose(change: Change) -> Change:
    """The change of the transposed weight, for a file or base that keeps (i, o).

    Raises Unrepresentable for convolutions and for kinds that say it in another form or not at all.
    """
    match change:
        case LowRank() if change.mid is None and change.up.ndim == change.down.ndim == 2:
            return replace(change, up=change.down.T, down=change.up.T)
        case Whole() if change.value.ndim == 2:
            return replace(change, value=change.value.T)
        case Whole() if change.value.ndim == 1:
            return change
        case Magnitude():
            return replace(
                change, inner=transpose(change.inner), axis="in" if change.axis == "out" else "out"
            )
    raise Unrepresentable(
        f"{change._title} of shape {written(change.shape)} has no transposed form",
        code="transpose",
        hint=change._way_out,
    )


def _added_ranks(parts: Sequence[LowRank]) -> LowRank:
    alike = present(plain_low_rank(parts))
    if len({part.up.shape[0] for part in alike}) > 1:
        raise _unequal(parts)
    dtype = common_dtype([part.up for part in alike])
    up = torch.cat([part.up.to(dtype) for part in alike], dim=1)
    return replace(alike[0], up=up, down=stacked([part.down for part in alike]))


def _added_whole(changes: Sequence[Change]) -> Whole:
    shape = next(change.shape for change in changes if isinstance(change, Whole))
    if any(math.prod(change.shape) != math.prod(shape) for change in changes):
        raise _unequal(changes)
    dtype = computing_dtype(*(tensor for change in changes for tensor in change.tensors().values()))
    total = changes[0].dense(dtype=dtype).reshape(shape)
    for change in changes[1:]:
        total += change.dense(dtype=dtype).reshape(shape)
    return Whole(total)


def _unequal(changes: Sequence[Change]) -> Mismatch:
    shapes = ", ".join(written(change.shape) for change in changes)
    return Mismatch(f"changes of shapes {shapes} do not change one weight")
