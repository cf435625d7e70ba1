"""How the inputs of a merge stand to each other: sizes, angles, and what their sum keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.errors import Json
from adapterkit.merging.tasks import Task

ALL = ""


@dataclass(frozen=True, eq=False)
class Interference:
    """Inner products of the inputs' deltas (Frobenius), by block and over all.

    names: of the inputs.  grams: block -> (T, T) at strength 1; `ALL` for all blocks together.
    weighted: the same at the strengths of the merge.
    """

    names: tuple[str, ...]
    grams: Mapping[str, Tensor]
    weighted: Mapping[str, Tensor]

    @property
    def blocks(self) -> tuple[str, ...]:
        return tuple(block for block in self.grams if block != ALL)

    def norms(self, block: str = ALL) -> list[float]:
        """‖delta‖ of each input at strength 1."""
        sizes: list[float] = self.grams[block].diagonal().clamp_min(0).sqrt().tolist()
        return sizes

    def cosine(self, first: int, second: int, block: str = ALL) -> float | None:
        """Of the angle between two inputs; None where one of them changes nothing."""
        gram = self.grams[block]
        lengths = math.sqrt(max(0.0, float(gram[first, first] * gram[second, second])))
        return max(-1.0, min(1.0, float(gram[first, second]) / lengths)) if lengths else None

    def pairs(self) -> list[tuple[int, int]]:
        count = len(self.names)
        return [(first, second) for first in range(count) for second in range(first + 1, count)]

    def kept(self, block: str = ALL) -> float | None:
        """‖Σ‖² of the weighted sum over Σ‖·‖² of its terms: 1 for inputs that do not meet at all,
        above it where they add up, below where they cancel; None where nothing is changed."""
        gram = self.weighted[block]
        alone = float(gram.diagonal().sum())
        return max(0.0, float(gram.sum())) / alone if alone else None

    def as_json(self) -> dict[str, Json]:
        return {
            "norms": dict(zip(self.names, self.norms(), strict=True)),
            "pairs": [self._pair(first, second) for first, second in self.pairs()],
            "kept": self.kept(),
            "blocks": {block: {"kept": self.kept(block)} for block in self.blocks},
        }

    def _pair(self, first: int, second: int) -> dict[str, Json]:
        return {
            "inputs": [self.names[first], self.names[second]],
            "cosine": self.cosine(first, second),
            "blocks": {block: self.cosine(first, second, block) for block in self.blocks},
        }


class Meeting:
    """Adds up inner products, weight by weight."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._grams: dict[str, Tensor] = {ALL: self._zeros()}
        self._weighted: dict[str, Tensor] = {ALL: self._zeros()}

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self.names), len(self.names), dtype=torch.float64)

    def add(self, block: str, tasks: Sequence[Task], gram: Tensor) -> None:
        """The tasks of one weight and their inner products."""
        places = torch.tensor([self.names.index(task.name) for task in tasks])
        strengths = torch.tensor([task.strength for task in tasks], dtype=torch.float64)
        self._add(self._grams, block, places, gram)
        self._add(self._weighted, block, places, gram * strengths[:, None] * strengths)

    def _add(self, into: dict[str, Tensor], block: str, places: Tensor, gram: Tensor) -> None:
        for name in (ALL, block):
            total = into.setdefault(name, self._zeros())
            total[places[:, None], places] += gram

    def result(self) -> Interference:
        return Interference(self.names, self._grams, self._weighted)


def inner_products(tasks: Sequence[Task]) -> Tensor:
    """(T, T) of the deltas of one weight at strength 1, through the Gram matrices of their factors.

    ⟨B_s A_s, B_t A_t⟩ = ⟨B_sᵀ B_t, A_s A_tᵀ⟩: no delta is formed. In float32, which is enough for
    what people read.
    """
    ups = [task.up.float() for task in tasks]
    downs = [task.down.float() for task in tasks]
    ranks = [task.rank for task in tasks]
    gram = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    for first, task in enumerate(tasks):
        # One multiplication for all that are left: the Gram matrix is symmetric.
        rows = ups[first].T @ torch.cat(ups[first:], dim=1)
        columns = downs[first] @ torch.cat(downs[first:]).T
        sums = (rows.double() * columns).sum(dim=0).cpu()
        for second, part in enumerate(torch.split(sums, ranks[first:]), first):
            product = float(part.sum()) * task.scale * tasks[second].scale
            gram[first, second] = gram[second, first] = product
    return gram
