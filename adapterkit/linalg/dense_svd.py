"""The leading singular values and vectors of a dense matrix, by the cheaper of two ways.

Either the eigenproblem of the Gram matrix on the short side, in float64: its cost grows with the cube
of that side. Or subspace iteration from a random start (Halko, Martinsson and Tropp 2011,
arXiv:0909.4061), with the shift of dashSVD (Feng, Yu, Xie and Tang 2024, arXiv:2404.09276) and a stop
that is told from how the captured energy grows: the large multiplications in float32, all that is of
the size of the rank in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adapterkit.linalg.decomposition import Decomposition, Vectors, fix_signs
from adapterkit.linalg.factorisations import (
    NotConverged,
    cholesky,
    eigh,
    inverses,
    placed,
    require_finite,
    svd,
    wide,
)

# Steps after which a subspace that has not converged is left for the exact way.
_STEPS = 60
# How much of one step's gain the next one brings, at the least: the first steps are too hopeful where
# the noise is flat.
_SLOWEST = 0.6
# The tolerance of an exact result, whose excess comes out below 1e-7: rounding the factors to 16 bits
# adds more.
_EXACT = 1e-8
# Where less than this share of the energy is left out, float32 does not tell how much.
_FAINT = 1e-5
# Numbers that are turned into float64 at once: to be multiplied, and to be gone through once.
_BLOCK = 2**22
_CACHED = 2**16


def dense_svd(
    matrix: Tensor, rank: int, *, exact: bool = False, tolerance: float = 1e-3, seed: int = 0
) -> Decomposition:
    """The `rank` leading singular values of a matrix (o, n) in any floating dtype, on any device.

    The error of the truncation is at most (1 + tolerance) times the least possible, plus 1e-6 of the
    norm for float32 numbers; exact: within 1e-7 of the least.  What is small is float64.  Vectors are
    float32 or float64, on the matrix's device; those of a singular value of zero are zero.
    Raises Refused (code "nonfinite") where the matrix holds NaN or infinity, AdapterkitError (code
    "no-convergence") where nothing converges.
    """
    energy = energy_of(matrix)
    require_finite(energy)
    rank = max(1, min(rank, *matrix.shape))
    flat = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    found = None
    try:
        if _iteration_pays(flat.shape[0], rank):
            found = _iterated(flat, rank, energy, _EXACT if exact else tolerance, seed)
        if found is None:
            found = _by_gram(flat, rank)
    except NotConverged:
        found = _by_svd(flat, rank)
    values, left, right = found
    u, vt = fix_signs(*((left, right) if flat is matrix else (right.T, left.T)))
    return Decomposition(values.cpu(), energy, (matrix.shape[0], matrix.shape[1]), _leading(u, vt))


def energy_of(matrix: Tensor) -> float:
    """‖matrix‖² in float64: a float32 sum over some ten million squares is off by a thousandth."""
    total = 0.0
    for block in torch.split(matrix, max(1, _CACHED // max(1, matrix.shape[1]))):
        numbers = wide(block).reshape(-1)
        total += float(torch.dot(numbers, numbers))
    return total


def _iteration_pays(side: int, rank: int) -> bool:
    """Whether iterating takes less time than the eigenproblem; measured on sides of 320 to 4096."""
    return side >= 128 and 5 * rank < side


def _iterated(
    flat: Tensor, rank: int, energy: float, tolerance: float, seed: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(values, left (a, rank), right (rank, b)) of a matrix (a, b), a <= b, by subspace iteration.

    None where it does not settle.
    """
    side, flat = flat.shape[0], flat if flat.dtype == torch.float64 else flat.float()
    width = min(side, rank + max(16, rank // 2))
    generator = torch.Generator().manual_seed(seed)
    basis = _orthonormal(torch.randn(side, width, generator=generator).to(flat))
    captured: list[float] = []
    for _ in range(_STEPS):
        image = flat.T @ basis
        squares, turn = eigh(_gram(image))
        squares = squares.clamp_min(0.0)
        lengths = inverses(squares.sqrt())
        captured.append(float(squares[:rank].sum()))
        if _settled(captured, energy, tolerance, torch.finfo(flat.dtype).eps / 10):
            left = basis @ turn[:, :rank].to(basis)
            if energy - captured[-1] < _FAINT * energy or tolerance <= _EXACT:
                return _refined(flat, _orthonormal(wide(left)))
            right = (image @ (turn * lengths)[:, :rank].to(image)).T
            return squares[:rank].sqrt(), left, right
        # The shift is safe below half the least eigenvalue that the subspace can follow; those found
        # are never larger than the true ones.
        shifted = turn * (lengths * float(squares[-1]) / 2)
        basis = _orthonormal(flat @ (image @ (turn * lengths).to(image)) - basis @ shifted.to(basis))
    return None


def _settled(captured: list[float], energy: float, tolerance: float, rounding: float) -> bool:
    """Whether what further steps would still gain is within the tolerance, if gains keep shrinking.

    rounding: the share of the energy below which gains are none.
    """
    if len(captured) < 3:
        return False
    before, last = captured[-2] - captured[-3], captured[-1] - captured[-2]
    # Where the spectrum is flat, gains shrink ever more slowly: half the way to not at all is allowed for.
    ratio = max(_SLOWEST, (1.0 + last / before) / 2) if before > 0 else _SLOWEST
    if ratio >= 1.0:
        return last <= rounding * energy
    remaining = last * ratio / (1.0 - ratio)
    # The relative error is a root: its excess is half that of the energy left out.
    return remaining <= max(2.0 * tolerance * (energy - captured[-1]), rounding * energy)


def _gram(tall: Tensor) -> Tensor:
    """tallᵀ tall in float64, on the CPU: what is of the size of the rank is quickest there."""
    numbers = wide(tall)
    return (numbers.T @ numbers).cpu()


def _orthonormal(tall: Tensor) -> Tensor:
    """Orthonormal columns spanning the same space, by the Cholesky factor of their angles in float64.

    Where columns depend on each other, by eigenvectors, and what there is none of stays zero.
    """
    numbers = wide(tall)
    gram = _gram(numbers)
    lengths = inverses(gram.diagonal().sqrt())
    angles = gram * lengths[:, None] * lengths
    lower = cholesky(angles)
    if lower is not None and float(lower.diagonal().min()) > 1e-5:
        eye = torch.eye(lower.shape[0], dtype=lower.dtype)
        turn = torch.linalg.solve_triangular(lower, eye, upper=False).T
    else:
        squares, vectors = eigh(angles)
        turn = vectors * inverses(torch.where(squares > 1e-10, squares, 0.0).sqrt())
    found: Tensor = numbers @ (lengths[:, None] * turn).to(numbers)
    return found.to(tall)


def _by_gram(flat: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values, left (a, rank), right (rank, b)) by the eigenvectors of flat flatᵀ, a <= b, in float64."""
    gram = torch.zeros(())
    for block in _blocks(flat):
        numbers = wide(block)
        gram = gram.to(numbers) + numbers @ numbers.T
    left = eigh(gram)[1][:, :rank]
    return _by_lengths(flat, left, _projected(flat, left))


def _refined(flat: Tensor, left: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same within the space of orthonormal columns (a, rank), in float64."""
    right = _projected(flat, left)
    turn = eigh(_gram(right.T))[1].to(left)
    return _by_lengths(flat, left @ turn, turn.T @ right)


def _projected(flat: Tensor, left: Tensor) -> Tensor:
    return torch.cat([left.T @ wide(block) for block in _blocks(flat)], dim=1)


def _by_lengths(flat: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same from left vectors and right = leftᵀ flat, whose rows are as long as the values are large.

    A length keeps digits that the root of an eigenvalue has lost.
    """
    values, order = torch.linalg.vector_norm(right, dim=1).sort(descending=True, stable=True)
    values = torch.where(values > flat.shape[1] * 1e-16 * values[0], values, 0.0)
    left, right = left[:, order] * (values > 0), inverses(values)[:, None] * right[order]
    return values, placed(left, flat.device), placed(right, flat.device)


def _blocks(flat: Tensor) -> tuple[Tensor, ...]:
    """Some columns at a time, so that not all of them are there in float64 as well."""
    return torch.split(flat, max(1, _BLOCK // flat.shape[0]), dim=1)


def _by_svd(flat: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    u, values, vt = svd(wide(flat))
    return values[:rank], placed(u[:, :rank], flat.device), placed(vt[:rank], flat.device)


def _leading(u: Tensor, vt: Tensor) -> Vectors:
    return lambda rank: (u[:, :rank], vt[:rank])
