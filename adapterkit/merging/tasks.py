"""What one adapter does to one weight, as the methods take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit import deltas
from adapterkit.deltas import Change, Whole


@dataclass(frozen=True, eq=False)
class Task:
    """A delta and its strength.

    name: of the adapter.  up (o, r), down (r, n): as they are stored, n being i · h · w.
    scale: scale · up @ down is the delta at strength 1.
    strength: what the user multiplies it by.
    """

    name: str
    up: Tensor
    down: Tensor
    scale: float
    strength: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """What to compute elementwise in: float32, or float64 where the factors are that wide."""
        return torch.float64 if torch.float64 in (self.up.dtype, self.down.dtype) else torch.float32

    def factors(self) -> tuple[Tensor, Tensor]:
        """(up, down) in float64 with up @ down the delta at strength 1."""
        return cast(self.up, torch.float64) * self.scale, cast(self.down, torch.float64)

    def dense(self) -> Tensor:
        """The delta (o, n) at strength 1."""
        return (self.up.to(self.dtype) @ self.down.to(self.dtype)).mul_(self.scale)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In float32 or float64; from half precision to the latter by way of the former, which is quicker."""
    return (tensor.float() if tensor.dtype.itemsize < 4 else tensor).to(dtype)


def task_of(name: str, changes: Sequence[Change], strength: float) -> Task:
    """The task of all that one adapter changes in one weight of two axes or more.

    A whole delta gets an identity beside it, on its shorter side.
    Raises what `deltas.add` raises.
    """
    total = deltas.add(changes)
    if not isinstance(total, Whole):
        plain = total.low_rank()
        return Task(name, *plain.matrices(), plain.scale, strength)
    matrix = total.value.flatten(1)
    rows, columns = matrix.shape
    eye = torch.eye(min(rows, columns), dtype=matrix.dtype, device=matrix.device)
    up, down = (eye, matrix) if rows <= columns else (matrix, eye)
    return Task(name, up, down, total.scale, strength)
