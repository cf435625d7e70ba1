"""Orthogonal finetuning: the weight's rows or columns rotated in blocks (arXiv:2306.07280)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterkit.deltas.change import Change, cut_shape, mismatch, require_matrices
from adapterkit.deltas.tensors import written
from adapterkit.errors import Mismatch


@dataclass(frozen=True, eq=False)
class Rotation(Change):
    """Rows rotated by Cayley transforms, as LyCORIS and kohya write it; then rows times `rescale`.

    With Q = blocks − blocksᵀ and R = (I + Q)(I − Q)⁻¹, both per block:
    OFT: blocks (n, b, b), group g of b rows becomes R[g]ᵀ @ W[g] (`lycoris/functional/diag_oft.py`).
    BOFT: blocks (m, n, b, b), m stages that each bring distant rows together and apply R, untransposed
    (`lycoris/functional/boft.py`; arXiv:2311.06243).

    `constraint` is the file's alpha: ‖Q‖ over all blocks together is held to constraint · rows; 0 is
    no limit. `rescale` is (o, 1, …).
    """

    blocks: Tensor
    rescale: Tensor | None = None
    constraint: float = 0.0
    weight_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.blocks.shape)
        require_matrices(blocks=self.blocks)
        if len(shape) not in (3, 4) or shape[-1] != shape[-2]:
            raise Mismatch(f"`blocks` is {written(shape)}: not square blocks")
        if self.rescale is not None and self.rescale.numel() != self.rows:
            raise Mismatch(
                f"`rescale` is {written(self.rescale.shape)} but `blocks` is {written(shape)}: rows differ"
            )
        if self.weight_shape is not None and self.weight_shape[0] != self.rows:
            raise mismatch("blocks", shape, "weight", self.weight_shape, "rows differ")

    @property
    def kind(self) -> str:
        return "oft" if self.blocks.ndim == 3 else "boft"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight_shape or ()

    @property
    def rows(self) -> int:
        return self.blocks.shape[-3] * self.blocks.shape[-1]

    @property
    def is_constrained(self) -> bool:
        """Whether the limit on ‖Q‖ changes the rotation."""
        return self.constraint > 0.0 and float(self._generators().norm()) > self.constraint * self.rows

    def _delta(self, base: Tensor | None, work: torch.dtype) -> Tensor:
        assert base is not None
        weight = base.flatten(1)
        turned = cayley(self._limited()).to(work)
        if self.kind == "oft":
            eye = torch.eye(turned.shape[-1], dtype=work, device=base.device)
            grouped = weight.reshape(*self.blocks.shape[:2], -1)
            delta = torch.einsum("gnm,gnk->gmk", turned - eye, grouped).flatten(0, 1)
        else:
            delta = _butterfly(weight, turned, unit=1) - weight
        if self.rescale is not None:
            rescale = self.rescale.to(work).reshape(-1, 1)
            delta = rescale * delta + (rescale - 1.0) * weight
        return delta.reshape(base.shape)

    def _take(self, start: int, stop: int) -> Change:
        if self.kind == "boft":
            raise self._uncut(start, stop, "its stages mix rows of the whole weight")
        size = self.blocks.shape[-1]
        if start % size or stop % size:
            raise self._uncut(start, stop, f"they cut through its blocks of {size} rows")
        part = replace(
            self,
            blocks=self.blocks[start // size : stop // size],
            rescale=None if self.rescale is None else self.rescale[start:stop],
            weight_shape=cut_shape(self.weight_shape, start, stop),
        )
        if self.is_constrained or part.is_constrained:
            raise self._uncut(start, stop, "its constraint binds all blocks together")
        return part

    def _generators(self) -> Tensor:
        blocks = self.blocks.double()
        return blocks - blocks.mT

    def _limited(self) -> Tensor:
        generators = self._generators()
        limit = self.constraint * self.rows
        return generators * (limit / generators.norm()) if self.is_constrained else generators


@dataclass(frozen=True, eq=False)
class InputRotation(Change):
    """Columns rotated: W' = W · blockdiag(R)ᵀ, PEFT's and OneTrainer's `oft_R` (OFTv2).

    blocks (n, b·(b − 1)/2) holds the strict upper triangles, row by row, of skew matrices Q; one row
    serves all blocks if `block_share`. R is (I − Q)(I + Q)⁻¹, or, where `cayley_neumann`, a truncated
    series of `terms` terms for (I + Q)(I − Q)⁻¹: the sign of Q differs between the two
    (`peft/tuners/oft/layer.py`: _cayley_batch). A kernel is flattened with the columns.

    `inverse`: W' = W · blockdiag(R), as PEFT rotates embeddings and OneTrainer convolutions.
    `scaled` is OneTrainer's flag that Q is to be divided by 2·√(b − 1) (`modules/module/oft_utils.py`).
    """

    blocks: Tensor
    scaled: Tensor | None = None
    block_share: bool = False
    cayley_neumann: bool = True
    terms: int = 5
    inverse: bool = False
    weight_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        require_matrices(blocks=self.blocks)
        size = self.block_size
        if self.blocks.ndim != 2 or size * (size - 1) // 2 != self.blocks.shape[1]:
            raise Mismatch(f"`blocks` is {written(self.blocks.shape)}: its rows are no triangles")
        if self.scaled is not None and self.scaled.numel() != 1:
            raise Mismatch(f"`scaled` is {written(self.scaled.shape)}: not one flag")
        if self.weight_shape is not None:
            self._check_weight(self.weight_shape)

    def _check_weight(self, weight_shape: tuple[int, ...]) -> None:
        count, columns = self.blocks.shape[0], math.prod(weight_shape[1:])
        shared = self.block_share and count == 1 and columns % self.block_size == 0
        if not shared and columns != count * self.block_size:
            raise Mismatch(
                f"`blocks` is {written(self.blocks.shape)} but the weight is {written(weight_shape)}"
            )

    @property
    def kind(self) -> str:
        return "oft_input"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight_shape or ()

    @property
    def block_size(self) -> int:
        """b, from the size of a triangle."""
        return (1 + math.isqrt(1 + 8 * self.blocks.shape[-1])) // 2

    def _delta(self, base: Tensor | None, work: torch.dtype) -> Tensor:
        assert base is not None
        turned = self._rotations() - torch.eye(self.block_size, dtype=torch.float64, device=base.device)
        turned = turned.to(work) if self.inverse else turned.mT.to(work)
        columns = base.reshape(base.shape[0], -1, self.block_size)
        turned = turned.expand(columns.shape[1], -1, -1)
        return torch.einsum("ogk,gkc->ogc", columns, turned).reshape(base.shape)

    def _rotations(self) -> Tensor:
        size = self.block_size
        upper = torch.zeros(self.blocks.shape[0], size, size, dtype=torch.float64, device=self.blocks.device)
        row, column = torch.triu_indices(size, size, 1, device=self.blocks.device)
        upper[:, row, column] = self.blocks.double()
        skew = upper - upper.mT
        if self.scaled is not None and bool(self.scaled) and size > 1:
            skew = skew / (2.0 * math.sqrt(size - 1))
        return _neumann(skew, self.terms) if self.cayley_neumann else cayley(-skew)

    def _take(self, start: int, stop: int) -> Change:
        return replace(self, weight_shape=cut_shape(self.weight_shape, start, stop))


@dataclass(frozen=True, eq=False)
class EmbeddingRotation(InputRotation):
    """The rotation of an embedding's columns, which PEFT turns the other way than a linear layer's."""

    inverse: bool = True

    @property
    def kind(self) -> str:
        return "oft_embedding"


@dataclass(frozen=True, eq=False)
class InputButterfly(Change):
    """Columns rotated in stages, then rows times `rescale`: W' = rescale · W · Rᵀ, PEFT's BOFT.

    blocks (m, n, b, b); R is the product of stages P B Pᵀ, the later ones to the left, with B block-diagonal
    of (I − Q)(I + Q)⁻¹, Q = (blocks − blocksᵀ) / 2, and P the stage's permutation
    (`peft/tuners/boft/layer.py`). rescale is (o, 1), or (1, o) for convolutions.
    """

    blocks: Tensor
    rescale: Tensor
    weight_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.blocks.shape)
        require_matrices(blocks=self.blocks, rescale=self.rescale)
        if len(shape) != 4 or shape[-1] != shape[-2]:
            raise Mismatch(f"`blocks` is {written(shape)}: not stages of square blocks")
        if self.weight_shape is not None:
            self._check_weight(self.weight_shape)

    def _check_weight(self, weight_shape: tuple[int, ...]) -> None:
        columns = self.blocks.shape[1] * self.blocks.shape[2]
        if math.prod(weight_shape[1:]) != columns or weight_shape[0] != self.rescale.numel():
            raise Mismatch(
                f"`blocks` is {written(self.blocks.shape)} and `rescale` {written(self.rescale.shape)} "
                f"but the weight is {written(weight_shape)}"
            )

    @property
    def kind(self) -> str:
        return "boft_input"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight_shape or (self.rescale.numel(), self.blocks.shape[1] * self.blocks.shape[2])

    def _delta(self, base: Tensor | None, work: torch.dtype) -> Tensor:
        assert base is not None
        blocks = self.blocks.double()
        turned = cayley((blocks.mT - blocks) / 2.0).to(work)
        weight = base.flatten(1)
        columns = _butterfly(weight.T, turned, unit=self.blocks.shape[-1] // 2).T
        return (self.rescale.to(work).reshape(-1, 1) * columns - weight).reshape(base.shape)

    @property
    def long_axis(self) -> int:
        """The axis of `rescale` that counts rows."""
        return 1 if self.rescale.shape[0] == 1 and self.rescale.ndim > 1 else 0

    def _take(self, start: int, stop: int) -> Change:
        rescale = self.rescale.narrow(self.long_axis, start, stop - start)
        return replace(self, rescale=rescale, weight_shape=cut_shape(self.weight_shape, start, stop))


def cayley(skew: Tensor) -> Tensor:
    """(I + Q)(I − Q)⁻¹ of skew matrices Q (…, b, b): rotations."""
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    rotated: Tensor = torch.linalg.solve(eye - skew, eye + skew)
    return rotated


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """I + 2Q + 2Q² + … + Qⁿ with n = terms − 1, as PEFT sums it: there, three terms come out as four."""
    coefficients = {1: [], 2: [2.0]}.get(terms, [2.0] * (max(terms, 4) - 2) + [1.0])
    power = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    total = power
    for coefficient in coefficients:
        power = power @ skew
        total = total + coefficient * power
    return total


def _butterfly(rows: Tensor, turned: Tensor, unit: int) -> Tensor:
    """Rows (o, i) through the stages of `turned` (m, n, b, b).

    Stage s rotates the rows of two half blocks that lie 2^s half blocks apart; `unit` is how many rows
    of one half come before those of the other: one in LyCORIS, all in PEFT.
    """
    size = turned.shape[-1]
    for stage, rotations in enumerate(turned):
        order = _partners(rows.shape[0], 2**stage * (size // 2), unit).to(rows.device)
        gathered = rows[order].reshape(-1, size, rows.shape[1])
        mixed = torch.empty_like(rows)
        mixed[order] = torch.einsum("gij,gjk->gik", rotations, gathered).flatten(0, 1)
        rows = mixed
    return rows


def _partners(count: int, distance: int, unit: int) -> Tensor:
    """Which rows stand side by side when each meets the one `distance` further on."""
    rows = torch.arange(count)
    if distance == unit:
        return rows
    return rows.reshape(-1, 2, distance // unit, unit).transpose(1, 2).flatten()
