"""The factors of a weighted sum, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from adapterkit.linalg.product_svd import gram
from adapterkit.merging.tasks import Task, cast


@dataclass(eq=False)
class Stack:
    """Made when they are asked for and held until they are released; made again when asked for later.

    dtype: float64; float32 where that does.
    """

    tasks: Sequence[Task]
    dtype: torch.dtype = torch.float64
    _factors: tuple[Tensor, Tensor] | None = field(default=None, init=False)
    _grams: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(up (o, R), down (R, n)), scales and strengths in up: their product is the weighted sum."""
        if self._factors is None:
            ups = [cast(task.up, self.dtype) * (task.scale * task.strength) for task in self.tasks]
            downs = [cast(task.down, self.dtype) for task in self.tasks]
            self._factors = torch.cat(ups, dim=1), torch.cat(downs)
        return self._factors

    @property
    def grams(self) -> tuple[Tensor, Tensor]:
        """upᵀ up and down downᵀ, (R, R)."""
        if self._grams is None:
            up, down = self.factors()
            self._grams = gram(up), gram(down.T)
        return self._grams

    def inner_products(self) -> Tensor:
        """(T, T) of the tasks' deltas at strength 1, from the Gram matrices."""
        rows, columns = self.grams
        strengths = torch.tensor([task.strength for task in self.tasks], dtype=torch.float64)
        products = (rows.double() * columns).cpu()
        ends = list(accumulate((task.rank for task in self.tasks), initial=0))
        blocks = [
            [float(products[first:last, start:stop].sum()) for start, stop in pairwise(ends)]
            for first, last in pairwise(ends)
        ]
        return torch.tensor(blocks, dtype=torch.float64) / (strengths[:, None] * strengths)

    def release(self) -> None:
        self._factors = self._grams = None
