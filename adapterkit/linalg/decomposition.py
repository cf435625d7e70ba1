"""The leading singular values of a matrix, with a way to its leading singular vectors.

Every decomposition of a change ends here, whatever it was computed from, so that the choice of ranks
and the making of factors are the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Vectors = Callable[[int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Decomposition:
    """M ≈ u · diag(values) · vt, for M of shape (o, n).

    values: (k,) float64, descending, none negative, on the CPU.
    energy: ‖M‖² (Frobenius) in float64: all of it, also what lies beyond the k values.
    shape: (o, n).
    vectors: the leading singular vectors when they are asked for: rank -> (u (o, rank), vt (rank, n)),
    signs fixed. They are made late because most are never needed.
    held: the factors for a scale of 1, where they are made already; then they are not made again.
    """

    values: Tensor
    energy: float
    shape: tuple[int, int]
    vectors: Vectors
    held: tuple[Tensor, Tensor] | None = None

    @property
    def rank(self) -> int:
        """How many singular values are known."""
        return self.values.numel()

    def left_out(self, rank: int) -> float:
        """‖M − its best approximation of `rank`‖² (Eckart and Young, 1936).

        The values that are left out are added up where they are known to the end: the difference of
        two nearly equal energies would be rounding alone.
        """
        beyond = max(0.0, self.energy - float(self.values.square().sum())) if self._cut_off else 0.0
        return float(self.values[rank:].square().sum()) + beyond

    def error(self, rank: int) -> float:
        """The relative Frobenius error of keeping `rank` values; 0 for a zero matrix."""
        return math.sqrt(min(1.0, self.left_out(rank) / self.energy)) if self.energy else 0.0

    def factors(self, rank: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """(up (o, rank), down (rank, n)) with scale · up @ down the best approximation of that rank.

        Both carry the square root of the values, which leaves the widest margin in half precision.
        A negative scale is taken up by `up`.
        """
        if self.held is not None and scale == 1.0:
            return self.held[0][:, :rank], self.held[1][:rank]
        u, vt = self.vectors(rank)
        roots = (self.values[:rank] / abs(scale)).sqrt().to(u)
        return u * math.copysign(1.0, scale) * roots, roots[:, None] * vt

    @property
    def _cut_off(self) -> bool:
        """Whether there may be values beyond those that are known."""
        return self.rank < min(self.shape)


def fix_signs(u: Tensor, vt: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each pair of vectors so that the largest entry of u is positive: an SVD leaves the sign open."""
    if not u.numel():
        return u, vt
    largest = u.abs().argmax(dim=-2, keepdim=True)
    signs = torch.where(u.gather(-2, largest) < 0, -1.0, 1.0).to(u)
    return u * signs, vt * signs.transpose(-1, -2)
