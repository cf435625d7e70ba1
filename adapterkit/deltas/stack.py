"""Changes of several weights as one change of the weight that stacks their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from adapterkit.deltas.alike import plain_low_rank, present, with_one_scale
from adapterkit.deltas.change import Change
from adapterkit.deltas.glora import Glora
from adapterkit.deltas.hadamard import Hadamard
from adapterkit.deltas.kronecker import Kronecker
from adapterkit.deltas.low_rank import LowRank
from adapterkit.deltas.magnitude import Magnitude
from adapterkit.deltas.rotation import InputButterfly, InputRotation, Rotation
from adapterkit.deltas.scaling import Scaling
from adapterkit.deltas.tensors import placed, same, stacked, written
from adapterkit.deltas.whole import Whole
from adapterkit.errors import Mismatch, Unrepresentable, UsageError

Kind = TypeVar("Kind", bound=Change)


def stack(parts: Sequence[Change | None], heights: Sequence[int]) -> Change:
    """The parts on top of each other; None leaves the rows of its height unchanged.

    Parts of low rank that share their `down` keep it once, the others become blocks side by side, so
    that `take` finds each part again. Scales that differ become the most common one, by a factor on
    the others' `up`, rounded once (to float32 where the stored dtype would overflow or flush to zero).

    Raises Unrepresentable where the parts are not of one kind or the kind cannot say the whole, Mismatch
    where a part has not the height given, UsageError where all are None.
    """
    there = present(parts)
    if not there or len(parts) != len(heights):
        raise UsageError(f"{len(parts)} parts and {len(heights)} heights: nothing to stack", code="no-parts")
    for part, height in zip(parts, heights, strict=True):
        if part is not None and part.rows not in (height, None):
            raise Mismatch(f"a part of shape {written(part.shape)} cannot fill {height} rows")
    if len(parts) == 1:
        return there[0]
    if len({(type(part), part.kind) for part in there}) > 1:
        names = " and ".join(sorted({part._title for part in there}))
        raise _refusal(names, "they are different kinds of change", there[0]._way_out)
    return _stack_kind(parts, heights, there[0])


def _stack_kind(parts: Sequence[Change | None], heights: Sequence[int], first: Change) -> Change:
    match first:
        case LowRank():
            return _stack_low_rank(_of(LowRank, parts), heights)
        case Hadamard():
            return _stack_hadamard(_of(Hadamard, parts), heights)
        case Kronecker():
            return _stack_kronecker(_of(Kronecker, parts), heights)
        case Whole():
            return _stack_whole(_of(Whole, parts), heights)
        case Magnitude():
            return _stack_magnitude(_of(Magnitude, parts), heights)
        case Glora():
            return _stack_glora(_of(Glora, parts))
        case Scaling():
            return _stack_scaling(_of(Scaling, parts), heights)
        case Rotation(kind="oft"):
            return _stack_rotation(_of(Rotation, parts), heights)
        case InputRotation():
            return _stack_input_rotation(_of(InputRotation, parts), heights)
        case InputButterfly():
            return _stack_input_butterfly(_of(InputButterfly, parts), heights)
    raise _refusal(first._title, "no larger change of the kind does the same", first._way_out)


def _stack_low_rank(parts: Sequence[LowRank | None], heights: Sequence[int]) -> LowRank:
    alike = plain_low_rank(parts)
    owners, owned = _sharing(alike, lambda a, b: same(a.down, b.down))
    columns = _starts(owner.down.shape[0] for owner in owners)
    blocks = [
        (row, columns[owner], part.up)
        for row, owner, part in zip(_starts(heights), owned, alike, strict=False)
        if part is not None
    ]
    first = owners[0]
    up = placed(blocks, (sum(heights), columns[-1], *first.up.shape[2:]))
    return replace(first, up=up, down=stacked([owner.down for owner in owners]))


def _stack_hadamard(parts: Sequence[Hadamard | None], heights: Sequence[int]) -> Hadamard:
    if len({part.shape[1:] for part in present(parts)}) > 1:
        raise Mismatch("LoHas of different inputs do not change one weight")
    if len({part.t1 is None for part in present(parts)}) > 1:
        raise _refusal("LoHa", "only some of the parts have a core", present(parts)[0]._way_out)
    alike = with_one_scale(parts)
    owners, owned = _sharing(alike, _shares_inner_factors)
    first = owners[0]
    starts = list(zip(_starts(heights), owned, alike, strict=False))
    factors: dict[str, object] = {}
    for a, b, t in (("w1_a", "w1_b", "t1"), ("w2_a", "w2_b", "t2")):
        ranks = _starts(getattr(owner, b).shape[0] for owner in owners)
        blocks = [(row, ranks[owner], getattr(part, a)) for row, owner, part in starts if part is not None]
        if getattr(first, t) is None:
            factors[a] = placed(blocks, (sum(heights), ranks[-1]))
        else:
            factors[a] = placed(
                [(rank, row, block) for row, rank, block in blocks], (ranks[-1], sum(heights))
            )
            factors[t] = _core([getattr(owner, t) for owner in owners])
        factors[b] = stacked([getattr(owner, b) for owner in owners])
    return first._with({**factors, "weight_shape": _stacked_shape(first, heights)})


def _shares_inner_factors(a: Hadamard, b: Hadamard) -> bool:
    return all(same(getattr(a, role), getattr(b, role)) for role in ("w1_b", "w2_b", "t1", "t2"))


def _core(cores: Sequence[Tensor]) -> Tensor:
    """Cores (r, r, …) as blocks on the diagonal of one."""
    if len(cores) == 1:
        return cores[0]
    starts = _starts(core.shape[0] for core in cores)
    columns = _starts(core.shape[1] for core in cores)
    blocks = list(zip(starts, columns, cores, strict=False))
    return placed(blocks, (starts[-1], columns[-1], *cores[0].shape[2:]))


def _stack_kronecker(parts: Sequence[Kronecker | None], heights: Sequence[int]) -> Kronecker:
    alike = with_one_scale(parts)
    first = present(alike)[0]
    name = first.fold_roles[0]
    others = [role for role in ("w1", "w1_b", "w2", "w2_a", "w2_b", "t2") if role != name]
    if not all(same(getattr(first, role), getattr(part, role)) for part in present(alike) for role in others):
        raise _refusal("LoKr", "the parts do not share their second factor", first._way_out)
    if any(height % first.block for height in heights):
        raise _refusal("LoKr", f"a part is not made of blocks of {first.block} rows", first._way_out)
    rows = [
        getattr(first, name).new_zeros(height // first.block, getattr(first, name).shape[1])
        if part is None
        else getattr(part, name)
        for part, height in zip(alike, heights, strict=True)
    ]
    return first._with({name: stacked(rows), "weight_shape": _stacked_shape(first, heights)})


def _stack_whole(parts: Sequence[Whole | None], heights: Sequence[int]) -> Whole:
    there = present(parts)
    if there[0].replaces and len(there) < len(parts):
        raise _refusal(there[0]._title, "a part has no value to put in place")
    if len({part.shape[1:] for part in there}) > 1:
        raise Mismatch("whole deltas of different inputs do not change one weight")
    alike = with_one_scale(parts)
    first = present(alike)[0]
    values = [
        first.value.new_zeros(height, *first.value.shape[1:]) if part is None else part.value
        for part, height in zip(alike, heights, strict=True)
    ]
    return replace(first, value=stacked(values))


def _stack_magnitude(parts: Sequence[Magnitude | None], heights: Sequence[int]) -> Magnitude:
    there = present(parts)
    if any(part.axis == "in" for part in there):
        raise _refusal(there[0]._title, "the length of a column is that of all its rows")
    if len(there) < len(parts):
        raise _refusal(there[0]._title, "a part without magnitude keeps the base's, which is not known")
    inner = stack([part.inner for part in there], heights)
    return Magnitude(inner, stacked([part.vector for part in there]))


def _stack_glora(parts: Sequence[Glora | None]) -> Glora:
    alike = with_one_scale(_all_present(parts))
    first = present(alike)[0]
    shared = ("a1", "a2", "b2", "bm")
    if not all(same(getattr(first, role), getattr(part, role)) for part in present(alike) for role in shared):
        raise _refusal(first._title, "the parts do not share what they do to the input")
    return replace(first, b1=stacked([part.b1 for part in present(alike)]))


def _stack_scaling(parts: Sequence[Scaling | None], heights: Sequence[int]) -> Scaling:
    there = present(parts)
    first = there[0]
    if len({(part.on_input, part.additive, part.vector.ndim) for part in there}) > 1:
        raise _refusal(first._title, "the parts do not scale in one way")
    shape = _stacked_shape(first, heights)
    if first.on_input:
        if not all(same(first.vector, part.vector) for part in _all_present(parts)):
            raise _refusal(first._title, "the parts scale their input differently")
        return replace(first, weight_shape=shape)
    axis, nothing = first.long_axis, 0.0 if first.additive else 1.0
    vectors = [
        part.vector.movedim(axis, 0)
        if part is not None
        else first.vector.new_full((height, *(1,) * (first.vector.ndim - 1)), nothing)
        for part, height in zip(parts, heights, strict=True)
    ]
    return replace(first, vector=stacked(vectors).movedim(0, axis), weight_shape=shape)


def _stack_rotation(parts: Sequence[Rotation | None], heights: Sequence[int]) -> Rotation:
    there = present(parts)
    first, size = there[0], there[0].blocks.shape[-1]
    if any(part.blocks.shape[-1] != size for part in there) or any(height % size for height in heights):
        raise _refusal(first._title, f"not all parts are made of blocks of {size} rows")
    blocks = [
        first.blocks.new_zeros(height // size, size, size) if part is None else part.blocks
        for part, height in zip(parts, heights, strict=True)
    ]
    whole = replace(
        first,
        blocks=stacked(blocks),
        rescale=_stacked_rescale(parts, heights),
        weight_shape=_stacked_shape(first, heights),
    )
    # Where no part reaches its limit, which grows with its rows, the whole does not either.
    if len({part.constraint for part in there}) > 1 or any(part.is_constrained for part in there):
        raise _refusal(first._title, "its constraint binds all blocks together")
    return whole


def _stacked_rescale(parts: Sequence[Rotation | None], heights: Sequence[int]) -> Tensor | None:
    known = next((part.rescale for part in present(parts) if part.rescale is not None), None)
    if known is None:
        return None
    return stacked(
        [
            known.new_ones(height, *known.shape[1:]) if part is None or part.rescale is None else part.rescale
            for part, height in zip(parts, heights, strict=True)
        ]
    )


def _stack_input_rotation(parts: Sequence[InputRotation | None], heights: Sequence[int]) -> InputRotation:
    there = _all_present(parts)
    first = there[0]
    facts = {(part.block_share, part.cayley_neumann, part.terms, part.inverse) for part in there}
    shared = all(same(first.blocks, part.blocks) and same(first.scaled, part.scaled) for part in there)
    if len(facts) > 1 or not shared:
        raise _refusal(first._title, "the parts rotate their input differently")
    return replace(first, weight_shape=_stacked_shape(first, heights))


def _stack_input_butterfly(parts: Sequence[InputButterfly | None], heights: Sequence[int]) -> InputButterfly:
    there = _all_present(parts)
    first = there[0]
    if not all(same(first.blocks, part.blocks) for part in there):
        raise _refusal(first._title, "the parts rotate their input differently")
    axis = first.long_axis
    rescale = torch.cat([part.rescale for part in there], dim=axis)
    return replace(first, rescale=rescale, weight_shape=_stacked_shape(first, heights))


def _refusal(what: str, why: str, hint: str = "keep the weights apart, or bake them") -> Unrepresentable:
    return Unrepresentable(f"{what} cannot be stacked: {why}", code="stack", hint=hint)


def _all_present(parts: Sequence[Kind | None]) -> list[Kind]:
    there = present(parts)
    if len(there) < len(parts):
        raise _refusal(there[0]._title, "it would also change the rows of the missing part")
    return there


def _stacked_shape(first: Change, heights: Sequence[int]) -> tuple[int, ...] | None:
    known: tuple[int, ...] | None = getattr(first, "weight_shape", None)
    return None if known is None else (sum(heights), *known[1:])


def _of(kind: type[Kind], parts: Sequence[Change | None]) -> list[Kind | None]:
    return [part if isinstance(part, kind) else None for part in parts]


def _starts(sizes: Iterable[int]) -> list[int]:
    """Where each of them begins, and the end of the last."""
    return [0, *accumulate(sizes)]


def _sharing(
    parts: Sequence[Kind | None], shares: Callable[[Kind, Kind], bool]
) -> tuple[list[Kind], list[int]]:
    """(owners, owner of each part): the first of those that share a factor owns it.

    A missing part is given the first owner, of which it will use no rank.
    """
    owners: list[Kind] = []
    owned: list[int] = []
    for part in parts:
        if part is None:
            owned.append(0)
            continue
        known = next((place for place, owner in enumerate(owners) if shares(owner, part)), len(owners))
        if known == len(owners):
            owners.append(part)
        owned.append(known)
    return owners, owned
