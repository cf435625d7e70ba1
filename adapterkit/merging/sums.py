"""The sum of what several adapters change at one place, each at its strength: exact, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from adapterkit import deltas
from adapterkit.deltas import Change, ExpertsLowRank, Magnitude
from adapterkit.deltas.strength import at_strength
from adapterkit.deltas.tensors import common_dtype
from adapterkit.errors import Mismatch, Unrepresentable, located
from adapterkit.merging.inputs import Contribution
from adapterkit.specs.kinds import KINDS

# Values put in place of the base's: adapters that agree on them can be merged whatever their strengths.
_REPLACING = frozenset({"set", "reshape", "tokens"})


def summed(found: Sequence[Contribution], dtype: torch.dtype | None = None) -> tuple[Change, ...]:
    """All contributions to one place, each at its strength, as one change (or as those of a single one).

    dtype: of the factors, if wider than the common one. What strengths and scales multiply is rounded
    once, to the wider of both.
    Raises Unrepresentable, naming the module, for kinds that have no sum or no other strength, Mismatch
    where shapes differ.
    """
    if not found:
        return ()
    if common := replacements(found):
        return (*common, *summed(_without_replacements(found), dtype))
    if len(found) == 1:
        with located(found[0].where):
            made = [at_strength(change, found[0].strength) for change in found[0].changes]
        return tuple(_positive(change) for change in made if change is not None)
    for one in found:
        _require_linear(one, found)
    wide = _common([change for one in found for change in one.changes], dtype)
    changes = [
        _widened(change, wide)
        for one in found
        for single in one.changes
        if (change := at_strength(single, one.strength)) is not None
    ]
    with located(" and ".join(one.where for one in found)):
        return (_positive(_added(changes)),)


def replacements(found: Sequence[Contribution]) -> tuple[Change, ...]:
    """The replacements that several contributions make, all of them and all alike; () if it is not that."""
    first, *others = (tuple(c for c in one.changes if c.kind in _REPLACING) for one in found)
    same = all(len(other) == len(first) and all(map(deltas.identical, other, first)) for other in others)
    return first if others and same else ()


def _without_replacements(found: Sequence[Contribution]) -> list[Contribution]:
    rest = (replace(one, changes=tuple(c for c in one.changes if c.kind not in _REPLACING)) for one in found)
    return [one for one in rest if one.changes]


def _positive(change: Change) -> Change:
    """The same change with a scale that is not negative: no reader expects an alpha below zero."""
    scale: float = getattr(change, "scale", 1.0)
    if scale >= 0 or not change.fold_roles:
        return change
    role = change.fold_roles[0]
    factor: Tensor = getattr(change, role)
    return change._with({"scale": -scale, role: -factor})


def _common(changes: Sequence[Change], dtype: torch.dtype | None) -> torch.dtype:
    """The narrowest dtype that holds all numbers of these changes, and those of `dtype`."""
    tensors = [tensor for change in changes for tensor in change.tensors().values()]
    return common_dtype(tensors if dtype is None else [*tensors, torch.empty(0, dtype=dtype)])


def _widened(change: Change, dtype: torch.dtype) -> Change:
    """The change with its tensors in a dtype that holds every value of theirs."""
    wider = {
        name: tensor.to(dtype)
        for name, tensor in vars(change).items()
        if isinstance(tensor, Tensor) and tensor.dtype != dtype
    }
    return change._with(wider) if wider else change


def _added(changes: Sequence[Change]) -> Change:
    experts = [change for change in changes if isinstance(change, ExpertsLowRank)]
    if experts and len(experts) == len(changes):
        return _added_experts(experts)
    return deltas.add(changes)


def _added_experts(parts: Sequence[ExpertsLowRank]) -> ExpertsLowRank:
    """Ranks side by side within each expert; up counts the experts fastest, down slowest."""
    first = parts[0]
    if any(part.shape != first.shape for part in parts):
        raise Mismatch(f"changes of shapes {[list(part.shape) for part in parts]} do not change one weight")
    up_dtype = common_dtype([part.up for part in parts])
    down_dtype = common_dtype([part.down for part in parts])
    ups = [
        (part.up.to(up_dtype) * part.scale).reshape(part.up.shape[0], part.rank, part.count) for part in parts
    ]
    downs = [part.down.to(down_dtype).reshape(part.count, part.rank, -1) for part in parts]
    up, down = torch.cat(ups, dim=1).flatten(1), torch.cat(downs, dim=1).flatten(0, 1)
    return replace(first, up=up, down=down, scale=1.0)


def _require_linear(one: Contribution, found: Sequence[Contribution]) -> None:
    refused = next((change for change in one.changes if change.needs_base), None)
    if refused is None:
        return
    others = " and ".join(f"`{other.name}`" for other in found if other is not one)
    hint = "--base MODEL makes it a plain delta"
    if isinstance(refused, Magnitude):
        hint += "; --allow magnitude leaves its magnitudes out, which is another change"
    title = "DoRA" if isinstance(refused, Magnitude) else KINDS[refused.kind].title
    raise Unrepresentable(
        f"{one.where}: {title} depends on the weight, and {others} changes it as well: "
        "their sum is no change that an adapter can make",
        code="merge-kind",
        hint=hint,
        details={"module": one.native, "input": one.name, "kind": refused.kind},
    )
