"""The factors of a weighted sum, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from adapterkit.linalg.product_svd import grams
from adapterkit.merging.tasks import Task


@dataclass(eq=False)
class Stack:
    """Made when they are asked for and held until they are released; made again when asked for later."""

    tasks: Sequence[Task]
    _factors: tuple[Tensor, Tensor] | None = field(default=None, init=False)
    _grams: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(up (o, R), down (R, n)) in float64, scales and strengths in up: their product is the sum."""
        if self._factors is None:
            pairs = [task.factors() for task in self.tasks]
            ups = [up.mul_(task.strength) for (up, _), task in zip(pairs, self.tasks, strict=True)]
            self._factors = torch.cat(ups, dim=1), torch.cat([down for _, down in pairs])
        return self._factors

    @property
    def grams(self) -> tuple[Tensor, Tensor]:
        """upᵀ up and down downᵀ, (R, R)."""
        if self._grams is None:
            self._grams = grams(*self.factors())
        return self._grams

    def inner_products(self) -> Tensor:
        """(T, T) of the tasks' deltas at strength 1, from the Gram matrices."""
        rows, columns = self.grams
        strengths = torch.tensor([task.strength for task in self.tasks], dtype=torch.float64)
        products = (rows * columns).cpu()
        ends = list(accumulate((task.rank for task in self.tasks), initial=0))
        blocks = [
            [float(products[first:last, start:stop].sum()) for start, stop in pairwise(ends)]
            for first, last in pairwise(ends)
        ]
        return torch.tensor(blocks, dtype=torch.float64) / (strengths[:, None] * strengths)

    def release(self) -> None:
        self._factors = self._grams = None
