"""Singular values of Kronecker products from their two factors, and the product nearest to a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from adapterkit.errors import Mismatch
from adapterkit.linalg.decomposition import Decomposition, fix_signs
from adapterkit.linalg.dense_svd import dense_svd, energy_of
from adapterkit.linalg.factorisations import require_finite, svd, wide
from adapterkit.linalg.pool import on_one_thread

# The short side of a factor of which all values are found in less time than the largest ones.
_SMALL = 256


def kronecker_svd(w1: Tensor, w2: Tensor, most: int | None = None) -> Decomposition:
    """Of w1 (a, b) ⊗ w2 (c, d), a matrix of (a · c, b · d), scale included.

    Singular values are the products of theirs, vectors the Kronecker products of theirs, of which only
    those are made that are asked for (Golub and Van Loan, Matrix Computations, 12.3.1).  In float64.
    Raises as `product_svd` does.
    """
    first, second = wide(w1), wide(w2)
    energy = energy_of(first) * energy_of(second)
    require_finite(energy)
    u1, values1, vt1 = _spectrum(first, most)
    u2, values2, vt2 = _spectrum(second, most)
    products, order = (values1[:, None] * values2).flatten().sort(descending=True, stable=True)
    kept = order[: products.numel() if most is None else most]
    values = products[: kept.numel()].clone()

    @on_one_thread
    def vectors(rank: int) -> tuple[Tensor, Tensor]:
        i, j = kept[:rank] // values2.numel(), kept[:rank] % values2.numel()
        there = values[:rank] > 0
        u = torch.einsum("ar,cr->acr", u1[:, i], u2[:, j]).flatten(0, 1) * there
        vt = torch.einsum("rb,rd->rbd", vt1[i], vt2[j]).flatten(1) * there[:, None]
        return fix_signs(u, vt)

    if products.numel() == min(first.shape) * min(second.shape):
        energy = float(products.square().sum())
    shape = first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]
    return Decomposition(values.cpu(), energy, shape, vectors)


def _spectrum(factor: Tensor, most: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(u, values, vt) of a factor: no product among the largest `most` has any but its largest `most`."""
    if most is None or min(factor.shape) <= _SMALL:
        return svd(factor)
    found = dense_svd(factor, most, exact=True)
    u, vt = found.vectors(found.rank)
    return u, found.values.to(u), vt


def nearest_kronecker(matrix: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, float]:
    """(w1 of `shape`, w2, relative error) with w1 ⊗ w2 nearest to a matrix (o, n) in the Frobenius norm.

    The best rank-one approximation of the matrix whose rows are the blocks of the other (Van Loan and
    Pitsianis 1993, "Approximation with Kronecker products").  Both factors are of one norm.
    Raises Mismatch where `shape` does not divide the matrix's.
    """
    (o, n), (a, b) = matrix.shape, shape
    if o % a or n % b:
        raise Mismatch(
            f"a matrix of {o}x{n} is not made of {a}x{b} blocks",
            code="no-blocks",
            hint="choose a first factor whose sides divide the matrix's",
            details={"matrix": [o, n], "blocks": [a, b]},
        )
    rows, columns = o // a, n // b
    blocks = matrix.reshape(a, rows, b, columns).transpose(1, 2).reshape(a * b, rows * columns)
    found = dense_svd(blocks, 1, exact=True)
    first, second = found.factors(1)
    return first.reshape(a, b), second.reshape(rows, columns), found.error(1)
