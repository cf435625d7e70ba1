"""Whether a change changes nothing, told from its tensors alone."""

from __future__ import annotations

from torch import Tensor

from adapterkit.deltas.change import Change
from adapterkit.deltas.hadamard import Hadamard
from adapterkit.deltas.kronecker import Kronecker
from adapterkit.deltas.low_rank import LowRank
from adapterkit.deltas.whole import Whole


def is_zero(change: Change) -> bool:
    """Whether the delta is exactly zero because a factor of it is; False where that would need the base."""
    if getattr(change, "scale", 1.0) == 0:
        return True
    match change:
        case LowRank():
            factors: list[Tensor | None] = [change.up, change.down, change.mid]
        case Hadamard() | Kronecker():
            factors = list(change.tensors().values())
        case Whole(replaces=False):
            factors = [change.value]
        case _:
            return False
    return any(factor is not None and not bool(factor.any()) for factor in factors)
