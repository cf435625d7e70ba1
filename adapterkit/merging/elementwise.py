"""Methods that look at numbers one by one: they need the whole delta, or its numbers in some basis.

TIES: Yadav et al. 2023, arXiv:2306.01708.  DARE: Yu et al. 2024, arXiv:2311.03099.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from adapterkit.merging.settings import Divide, Settings


def trimmed(values: Tensor, density: float, generator: torch.Generator | None = None) -> Tensor:
    """The largest numbers by size, `density` of all, and zeros in place of the others.

    As many as the whole number below density · count, but one at least; of equal ones all.
    """
    sizes = values.abs()
    kept = max(1, int(density * values.numel()))
    if kept == values.numel():
        return values
    return torch.where(sizes >= _at_rank(sizes, values.numel() - kept), values, 0.0)


def _at_rank(numbers: Tensor, rank: int) -> float:
    """The number that `rank` others are not above; NumPy's partition takes an eighth of torch's kthvalue."""
    if numbers.device.type != "cpu":
        return float(numbers.flatten().kthvalue(rank + 1).values)
    return float(np.partition(numbers.flatten().numpy(), rank)[rank])


def dropped(values: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each number kept with probability `density` and divided by it, so that the mean stays."""
    if density == 1.0:
        return values
    chances = torch.rand(values.shape, generator=generator, dtype=torch.float32).to(values.device)
    return torch.where(chances < density, values / density, 0.0)


def elected(weighted: Sequence[Tensor], strengths: Sequence[float], divide: Divide = "strengths") -> Tensor:
    """For each number the sign of the sum, and of the adapters those that agree with it.

    Where the sum is exactly zero no sign wins, and the result is zero. With `divide` "strengths" the
    result is the mean weighted by the sizes of the strengths; with all of them equal that is the
    disjoint mean of the paper.
    """
    winner = sum_of(weighted).sign()
    total, share = torch.zeros_like(winner), torch.zeros_like(winner)
    for one, strength in zip(weighted, strengths, strict=True):
        agrees = (one * winner > 0).to(one)
        total.addcmul_(agrees, one)
        share.add_(agrees, alpha=abs(strength) if divide == "strengths" else 1.0)
    if divide == "nothing":
        return total
    # Where nobody agrees, the total is zero as well.
    return total.div_(share.clamp_min_(torch.finfo(share.dtype).tiny))


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Of tensors of one shape, in their order; the very tensor where there is one."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def _generator(seed: int, name: str, key: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}\0{name}\0{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


# How each delta is thinned out, and whether signs are elected.
_MANNERS: dict[str, tuple[Callable[[Tensor, float, torch.Generator], Tensor], bool]] = {
    "ties": (trimmed, True),
    "dare": (dropped, False),
    "dare-ties": (dropped, True),
    "magnitude": (trimmed, False),
}


def combined(
    values: Sequence[Tensor],
    strengths: Sequence[float],
    names: Sequence[str],
    key: str,
    method: str,
    settings: Settings,
) -> Tensor:
    """The deltas of all adapters, or their numbers in one basis, as one tensor of their shape.

    key, names: of the weight and of the adapters; what DARE drops depends on them and on the seed
    alone, not on the order of either.
    """
    sparsify, elects = _MANNERS[method]
    weighted = [
        sparsify(value, settings.density, _generator(settings.seed, name, key)) * strength
        for value, strength, name in zip(values, strengths, names, strict=True)
    ]
    return elected(weighted, strengths, settings.divide) if elects else sum_of(weighted)
