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
    return any(factor is not None and not _any(factor) for factor in factors)


def _any(tensor: Tensor) -> bool:
    # A trained factor shows it in its first row; only a zero one is read to the end.
    return bool(tensor[:1].any()) or bool(tensor.any())
