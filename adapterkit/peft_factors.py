"""What PEFT's configuration must say for its LoHa and LoKr layers to have the shapes of given factors.

PEFT computes the shapes from the layer's sizes (src/peft/tuners/lokr/layer.py and loha/layer.py,
v0.21.2: update_layer, factorization); a file made elsewhere may have others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from adapterkit.deltas import Change, Hadamard, Kronecker
from adapterkit.errors import Json, Unrepresentable


def loha_fields(changes: Sequence[Change]) -> dict[str, Json]:
    """use_effective_conv2d for these LoHas; Unrepresentable if some kernels have a core and some not."""
    cores = [c.t1 is not None for c in changes if isinstance(c, Hadamard) and _has_kernel(c)]
    return {"use_effective_conv2d": _all_or_none(cores)}


def lokr_fields(changes: Sequence[Change]) -> tuple[dict[str, Json], list[int]]:
    """The fields for these LoKrs, and the rank that each must be given.

    Raises Unrepresentable if PEFT would divide or factor a module in another way.
    """
    products = [change for change in changes if isinstance(change, Kronecker)]
    cores = [c.t2 is not None for c in products if _has_kernel(c) and c.w2 is None]
    both = any(c.w1 is None for c in products)
    fields: dict[str, Json] = {
        "decompose_factor": _factor(products),
        "decompose_both": both,
        "use_effective_conv2d": _all_or_none(cores),
    }
    return fields, [_rank(product, both) for product in products]


def _has_kernel(change: Change) -> bool:
    return math.prod(change.shape[2:]) > 1


def _all_or_none(cores: Sequence[bool]) -> bool:
    if len(set(cores)) > 1:
        raise _refusal("some kernels have a core of their own and some have not")
    return any(cores)


def _rank(product: Kronecker, both: bool) -> int:
    """The rank with which PEFT factors what is factored and leaves whole what is whole."""
    rows, columns = _division(product)
    first, second = max(rows[0], columns[0]), max(rows[1], columns[1])
    rank = product.rank or max(first, second)
    factored = product.w1 is None, product.w2 is None
    ranks = {factor.shape[0] for factor in (product.w1_b, product.w2_b) if factor is not None}
    if (both and rank < first / 2, rank < second / 2) != factored or len(ranks) > 1:
        raise _refusal(f"at rank {rank} it factors matrices of {first} and {second} in another way")
    return rank


def _division(product: Kronecker) -> tuple[tuple[int, int], tuple[int, int]]:
    """How the rows and the columns are divided: each by the first matrix's and the second's sizes."""
    down = _first(product.w1, product.w1_a).shape[0]
    across = _first(product.w1, product.w1_b).shape[1]
    rows, columns = product.shape[:2]
    return (down, rows // down), (across, columns // across)


def _first(whole: Tensor | None, factor: Tensor | None) -> Tensor:
    found = whole if whole is not None else factor
    assert found is not None
    return found


def _factor(products: Sequence[Kronecker]) -> int:
    """The decompose_factor by which PEFT divides every module as it is divided here; -1 is its default."""
    divisions = [division for product in products for division in _division(product)]
    candidates = [-1, *sorted({part for division in divisions for part in division})]
    for candidate in candidates:
        if all(divided(first * second, candidate) == (first, second) for first, second in divisions):
            return candidate
    raise _refusal("no one decompose_factor divides all modules as they are divided here")


def divided(size: int, factor: int) -> tuple[int, int]:
    """How PEFT divides `size`: by `factor` if that goes, else as evenly as it can with no part above it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor < 0 else min(math.isqrt(size), factor)
    smaller = next(part for part in range(limit, 0, -1) if size % part == 0)
    return smaller, size // smaller


def _refusal(why: str) -> Unrepresentable:
    return Unrepresentable(
        f"PEFT cannot build these factors: {why}",
        code="peft-factors",
        hint="--as lora expands them exactly to low rank",
    )
