"""GLoRA: a low-rank delta beside one that is a low-rank multiple of the weight itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterkit.deltas.change import Change, mismatch, require_matrices
from adapterkit.deltas.low_rank import LowRank


@dataclass(frozen=True, eq=False)
class Glora(Change):
    """scale · (W @ a1 @ a2 + b1 @ b2), after arXiv:2306.07967 and `lycoris/modules/glora.py`.

    a1 (i, r), a2 (r, i) mix the weight's input channels; b1 (o, r), b2 (r, i[, h, w]) and bm (r, r, h, w)
    are the up, down and mid of a LowRank. Convolutions may carry trailing ones.
    """

    a1: Tensor
    a2: Tensor
    b1: Tensor
    b2: Tensor
    bm: Tensor | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        a1, a2, b2 = tuple(self.a1.shape), tuple(self.a2.shape), tuple(self.b2.shape)
        require_matrices(a1=self.a1, a2=self.a2, b1=self.b1, b2=self.b2, bm=self.bm)
        if a1[1] != a2[0] or a1[0] != a2[1] or any(side != 1 for side in a1[2:] + a2[2:]):
            raise mismatch("a1", a1, "a2", a2, "their product is not a square of the input channels")
        if a1[0] != self.own.shape[1]:
            raise mismatch("a1", a1, "b2", b2, "input channels differ")

    @property
    def own(self) -> LowRank:
        """The part that does not depend on the weight, without the scale."""
        return LowRank(self.b1, self.b2, mid=self.bm)

    @property
    def kind(self) -> str:
        return "glora"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.own.shape

    @property
    def rank(self) -> int:
        return self.b2.shape[0]

    @property
    def fold_roles(self) -> tuple[str, ...]:
        return ("a2", "b2")

    def _delta(self, base: Tensor | None, work: torch.dtype) -> Tensor:
        assert base is not None
        mixed = base.movedim(1, -1) @ self.a1.flatten(1).to(work) @ self.a2.flatten(1).to(work)
        own = self.own.dense(base, work)
        return (mixed.movedim(-1, 1) + own).mul_(self.scale)

    def _take(self, start: int, stop: int) -> Change:
        return replace(self, b1=self.b1[start:stop])
